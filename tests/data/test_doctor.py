"""Every fault planted, and what is sound left alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from simpo_megatron import data
from simpo_megatron.data import DataOptions
from simpo_megatron.data.checks import CHECKS
from simpo_megatron.data.doctor import Doctor
from simpo_megatron.data.packing import packing_figures
from simpo_megatron.data.prepare import prepare
from simpo_megatron.data.prepared_set import PreparedPairs
from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.report import print_report, sections, summary, write_html
from tests.support.toy_tokenizers import MISTRAL, THINKING, toy, with_template
from tools.toy_tokenizer import train_tokenizer

OPTIONS = DataOptions(max_length=60, max_prompt_length=30)


def row(
    i: int = 0, prompt: str = "What color is the sky?", chosen: str = "It is blue.", rejected: str = "No.", **more: Any
) -> dict[str, Any]:
    ask = {"role": "user", "content": f"{prompt} {i}"}
    answers = [[ask, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return {"chosen": answers[0], "rejected": answers[1], "score_chosen": 2, "score_rejected": 1, **more}


def examine(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast | None = None,
    options: DataOptions = OPTIONS,
    seq_length: int = 200,
    valid: Sequence[dict[str, Any]] = (),
    eos: Sequence[int] = (),
) -> Doctor:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    doctor = Doctor(tokenizer or toy("llama3"), options, eos, seq_length)
    if valid:
        other = tmp_path / "valid.jsonl"
        other.write_text("".join(json.dumps(item) + "\n" for item in valid))
        doctor.remember_prompts(str(other))
    doctor.examine_rows(read_rows(path))
    doctor.finish()
    return doctor


def found(doctor: Doctor) -> dict[str, int]:
    return {name: finding.count for name, finding in doctor.findings.items() if finding.count}


def test_nothing_is_found_in_sound_rows(tmp_path: Path) -> None:
    doctor = examine(tmp_path, [row(i) for i in range(250)])
    assert found(doctor) == {"length_bias": 250}
    assert doctor.rows == len(doctor.lengths) == 250
    assert not any(doctor.blocks(name) for name in CHECKS)


@pytest.mark.parametrize(
    ("name", "rows", "blocks"),
    [
        ("empty", [row(0, chosen=" ")], True),
        ("identical", [row(0, chosen="No.")], True),
        ("tie", [row(0, score_chosen=1)], False),
        ("inverted", [row(0, score_chosen=0)], True),
        ("duplicate", [row(0), row(1), row(0)], True),
        ("contradictory", [row(0), row(0, chosen="No.", rejected="It is blue.")], True),
        ("odd_text", [row(0, chosen="It \x07 is")], True),
        ("odd_text", [row(0, prompt="wrong \ufffd encoding")], True),
        ("special", [row(0, chosen="It<|eot_id|> is")], True),
        ("eos_lost", [row(0, rejected="No, the sky " * 30)], True),
        ("prompt_cut", [row(0, prompt="No, the sky " * 30)], False),
    ],
)
def test_a_planted_fault_is_named_with_its_row(
    tmp_path: Path, name: str, rows: list[dict[str, Any]], blocks: bool
) -> None:
    doctor = examine(tmp_path, rows)
    assert doctor.findings[name].count == 1
    assert doctor.findings[name].examples == [f"{tmp_path / 'pairs.jsonl'}:{len(rows)}"]
    assert doctor.blocks(name) == blocks
    assert set(found(doctor)) == {name}


def test_few_of_a_kind_do_not_block(tmp_path: Path) -> None:
    rows = [row(i) for i in range(99)] + [row(3)]
    doctor = examine(tmp_path, rows)
    assert doctor.findings["duplicate"].count == 1 and not doctor.blocks("duplicate")


def test_a_template_that_writes_the_prompt_in_two_ways(tmp_path: Path) -> None:
    doctor = examine(tmp_path, [row(0), row(1)], with_template("qwen", THINKING))
    assert doctor.findings["template"].count == 2 and doctor.blocks("template")
    assert "--assistant-header response" in doctor.fix("template")
    options = DataOptions(max_length=60, max_prompt_length=30, assistant_header="response")
    assert not examine(tmp_path, [row(0)], with_template("qwen", THINKING), options).findings["template"].count


def test_validation_prompts_in_the_training_data(tmp_path: Path) -> None:
    doctor = examine(tmp_path, [row(i) for i in range(50)], valid=[row(7, chosen="Another answer.")])
    assert doctor.findings["leak"].count == 1 and doctor.blocks("leak")
    assert doctor.findings["leak"].examples == [f"{tmp_path / 'pairs.jsonl'}:8"]


def test_pairs_that_outgrow_their_row(tmp_path: Path) -> None:
    doctor = examine(tmp_path, [row(0, chosen="the sky " * 20)], seq_length=100)
    assert doctor.blocks("too_long") and "--seq-length" in doctor.fix("too_long")


def test_truncation_names_the_length_that_would_do(tmp_path: Path) -> None:
    doctor = examine(tmp_path, [row(0, rejected="No, the sky " * 30)])
    (longest,) = doctor.whole
    assert doctor.fix("eos_lost") == f"--max-length {longest} (99 % of the pairs fit)"


def test_a_tokenizer_without_eos_or_bos(tmp_path: Path) -> None:
    bare = with_template("qwen", "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    bare.eos_token = None
    doctor = examine(tmp_path, [row(0)], bare)
    assert doctor.blocks("missing_eos")
    silent = with_template("mistral", MISTRAL.replace("{{ bos_token }}", ""))
    silent.backend_tokenizer.post_processor = None  # nobody writes BOS now
    doctor = examine(tmp_path, [row(0)], silent)
    assert doctor.findings["missing_bos"].count == 1 and not doctor.blocks("missing_bos")


def test_a_prepared_set_is_read_back_from_its_ids(tmp_path: Path) -> None:
    model, source = tmp_path / "model", tmp_path / "pairs.jsonl"
    toy("llama3").save_pretrained(model)
    rows = [row(0), row(1, score_chosen=0), row(0), row(2, rejected="No, the sky " * 30), row(3, chosen="\x07")]
    source.write_text("".join(json.dumps(item) + "\n" for item in rows))
    prepare(source, model, tmp_path / "set", OPTIONS)
    doctor = Doctor(toy("llama3"), OPTIONS, (), 200)
    doctor.examine_prepared(PreparedPairs(tmp_path / "set"))
    assert found(doctor) == {"inverted": 1, "duplicate": 1, "eos_lost": 1, "odd_text": 1}
    assert doctor.findings["eos_lost"].examples == [f"{tmp_path / 'set'} row 4"]
    assert doctor.fix("eos_lost") == "--max-length above 60"


def test_two_bos_in_a_prepared_set(tmp_path: Path) -> None:
    model, source = tmp_path / "model", tmp_path / "pairs.jsonl"
    toy("llama3").save_pretrained(model)
    source.write_text(json.dumps(row(0)) + "\n")
    prepare(source, model, tmp_path / "set", OPTIONS)
    bos = toy("llama3").bos_token_id
    content = bytearray((tmp_path / "set.bin").read_bytes())
    content[4:8] = int(bos).to_bytes(4, "little")
    (tmp_path / "set.bin").write_bytes(content)
    doctor = Doctor(toy("llama3"), OPTIONS, (), 200)
    doctor.examine_prepared(PreparedPairs(tmp_path / "set", verify=False))
    assert doctor.blocks("double_bos")


def test_the_view_marks_what_is_scored(tmp_path: Path) -> None:
    view = examine(tmp_path, [row(0)]).views[0]
    for tokens, answer in ((view.chosen, "It is blue."), (view.rejected, "No.")):
        assert "".join(text for text, kind in tokens if kind == "scored") == answer
        assert [text for text, kind in tokens if kind == "eos"] == ["<|eot_id|>"]
        prompt = "".join(text for text, kind in tokens if kind == "prompt")
        assert prompt.startswith("<|begin_of_text|>") and prompt.endswith("assistant<|end_header_id|>\n\n")


def test_the_page_holds_no_markup_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script>"
    doctor = examine(tmp_path, [row(0, chosen=evil), row(0, chosen=evil)])
    write_html(doctor, "a <b> title", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page and "a &lt;b&gt; title" in page
    assert "--duplicates drop" in page and "<svg" in page and "src=" not in page
    print_report(doctor, "[red]title")
    out = capsys.readouterr().out
    assert "blocks" in out and "--duplicates drop" in out and "[red]title" in out


def test_what_was_found_is_first_and_the_rest_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(i, score_chosen=1) for i in range(9)] + [row(0, score_chosen=0), row(1, score_chosen=1)]
    doctor = examine(tmp_path, rows)
    source = str(tmp_path / "pairs.jsonl")
    faults, *_ = sections(doctor, source)
    marks = [(mark, title) for mark, title, *_ in faults.rows]
    assert marks == [
        ("blocks", CHECKS["duplicate"].title),
        ("blocks", CHECKS["inverted"].title),
        ("warns", CHECKS["tie"].title),
    ], "by severity, then by count"
    assert faults.rows[1][2:4] == ("1", "10")
    [line] = faults.lines
    absent = [check.title for name, check in CHECKS.items() if name not in ("duplicate", "inverted", "tie")]
    assert line == f"Not found: {'; '.join(absent)}."
    write_html(doctor, source, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    print_report(doctor, source)
    out = " ".join(capsys.readouterr().out.split())
    assert summary(doctor) in page and summary(doctor) in out
    assert page.index("blocks>blocks") < page.index("warns>warns") < page.index("Not found: ")
    assert page.count("<tr>") == 1 + 3 + 1 + 3, "the faults that were found, and the three lengths"
    for cell in (
        "fault",
        "examples",
        "median",
        "longest",
        "packed rows of 200",
        "--share-prompts would save",
        "chosen",
    ):
        assert cell in page and cell in out


def text(prompt: str | None, chosen: str, rejected: str) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected, **({} if prompt is None else {"prompt": prompt})}


def test_prompts_that_end_with_newlines_do_not_straddle(tmp_path: Path) -> None:
    """Alone the two newlines are one token, before a response they are two; no token spans the boundary."""
    tokenizer = train_tokenizer(["amber\n\n"] * 4, 300, ["<|bos|>", "<|eot|>"], None)  # cuts words as GPT-2 does
    alone, before = tokenizer.tokenize("amber\n\n"), tokenizer.tokenize("amber\n\nbirch")
    assert before[: len(alone)] != alone, "the case needs other tokens before a response"
    rows = [text("amber\n\n", f"birch {i}", "cedar") for i in range(9)]
    doctor = examine(tmp_path, rows, tokenizer)
    assert doctor.findings["boundary"].count == 0 and not doctor.blocks("boundary")


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        (text("No, the ", "sky is blue.", "dog. What"), "no space at the end of prompts"),
        (text(None, "No, the sky is blue.", "No, the skies"), "give the rows an explicit `prompt`"),
    ],
)
def test_advice_fits_the_form_of_the_data(tmp_path: Path, row: dict[str, Any], advice: str) -> None:
    doctor = examine(tmp_path, [row])
    assert doctor.blocks("boundary") and advice in doctor.fix("boundary")
    assert doctor.findings["missing_bos"].count == 0


def test_text_gets_no_advice_on_templates(tmp_path: Path) -> None:
    silent = with_template("mistral", None)
    silent.backend_tokenizer.post_processor = None
    doctor = examine(tmp_path, [text("What color?", " Blue.", " Green.")], silent)
    assert not doctor.findings["missing_bos"].count, "text begins with BOS wherever the tokenizer has one"


def test_the_pair_that_was_asked_for_is_shown_first(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in [row(0), row(0), row(1)]))
    doctor = Doctor(toy("llama3"), OPTIONS, (), 200, show=3)
    doctor.examine_rows(read_rows(path))
    assert [view.where.partition(",")[0] for view in doctor.views] == [f"{path}:3", f"{path}:2"]


def test_the_readme_lists_every_check_with_its_limit() -> None:
    text = Path(data.__file__).with_name("README.md").read_text(encoding="utf-8")
    _, _, table = text.partition("| fault | blocks above |\n|---|---|\n")
    limits = [line.split("|")[2].strip() for line in table.partition("\n\n")[0].splitlines()]
    words = {None: "-", 0: "0"}
    assert limits == [words.get(check.limit) or f"{check.limit:.0%}".replace("%", " %") for check in CHECKS.values()]


def test_packing_figures_by_hand() -> None:
    figures = packing_figures(np.array([[2, 3, 1], [1, 2, 2], [2, 2, 2]]), 10, batch=2)
    assert figures["tokens"] == 8 + 6 + 8 and figures["rows"] == figures["fewest_rows"] == 3
    assert figures["padding_packed"] == pytest.approx(1 - 22 / 30)
    assert figures["padding_unpacked"] == pytest.approx(1 - 22 / 30), "six sequences of five"
    assert figures["saved_by_shared_prompts"] == pytest.approx(5 / 22)
