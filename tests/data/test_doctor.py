"""Every fault planted, and what is sound left alone."""

import json

import pytest

from simpo_megatron.data import DataOptions
from simpo_megatron.data.doctor import CHECKS, Doctor, packing_figures
from simpo_megatron.data.prepare import prepare
from simpo_megatron.data.prepared_set import PreparedPairs
from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.report import print_report, write_html
from tests.support.toy_tokenizers import MISTRAL, THINKING, toy, with_template

OPTIONS = DataOptions(max_length=60, max_prompt_length=30)


def row(i=0, prompt="What color is the sky?", chosen="It is blue.", rejected="No.", **more):
    ask = {"role": "user", "content": f"{prompt} {i}"}
    answers = [[ask, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return {"chosen": answers[0], "rejected": answers[1], "score_chosen": 2, "score_rejected": 1, **more}


def examine(tmp_path, rows, tokenizer=None, options=OPTIONS, seq_length=200, valid=(), eos=()):
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


def found(doctor):
    return {name: finding.count for name, finding in doctor.findings.items() if finding.count}


def test_nothing_is_found_in_sound_rows(tmp_path):
    doctor = examine(tmp_path, [row(i) for i in range(250)])
    assert found(doctor) == {"length_bias": 250}
    assert doctor.rows == len(doctor.lengths) == 250
    assert not any(doctor.spoils(name) for name in CHECKS)


@pytest.mark.parametrize(
    ("name", "rows", "spoils"),
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
def test_a_planted_fault_is_named_with_its_row(tmp_path, name, rows, spoils):
    doctor = examine(tmp_path, rows)
    assert doctor.findings[name].count == 1
    assert doctor.findings[name].examples == [f"{tmp_path / 'pairs.jsonl'}:{len(rows)}"]
    assert doctor.spoils(name) == spoils
    assert set(found(doctor)) == {name}


def test_few_of_a_kind_do_not_spoil(tmp_path):
    rows = [row(i) for i in range(99)] + [row(3)]
    doctor = examine(tmp_path, rows)
    assert doctor.findings["duplicate"].count == 1 and not doctor.spoils("duplicate")


def test_a_template_that_writes_the_prompt_in_two_ways(tmp_path):
    doctor = examine(tmp_path, [row(0), row(1)], with_template("qwen", THINKING))
    assert doctor.findings["template"].count == 2 and doctor.spoils("template")
    assert "--assistant-header response" in doctor.mend("template")
    options = DataOptions(max_length=60, max_prompt_length=30, assistant_header="response")
    assert not examine(tmp_path, [row(0)], with_template("qwen", THINKING), options).findings["template"].count


def test_validation_prompts_in_the_training_data(tmp_path):
    doctor = examine(tmp_path, [row(i) for i in range(50)], valid=[row(7, chosen="Another answer.")])
    assert doctor.findings["leak"].count == 1 and doctor.spoils("leak")
    assert doctor.findings["leak"].examples == [f"{tmp_path / 'pairs.jsonl'}:8"]


def test_pairs_that_outgrow_their_row(tmp_path):
    doctor = examine(tmp_path, [row(0, chosen="the sky " * 20)], seq_length=100)
    assert doctor.spoils("too_long") and "--seq-length" in doctor.mend("too_long")


def test_truncation_names_the_length_that_would_do(tmp_path):
    doctor = examine(tmp_path, [row(0, rejected="No, the sky " * 30)])
    (longest,) = doctor.whole
    assert doctor.mend("eos_lost") == f"--max-length {longest} (99 % of the pairs fit)"


def test_a_tokenizer_without_eos_or_bos(tmp_path):
    bare = with_template("qwen", "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    bare.eos_token = None
    doctor = examine(tmp_path, [row(0)], bare)
    assert doctor.spoils("missing_eos")
    silent = with_template("mistral", MISTRAL.replace("{{ bos_token }}", ""))
    silent.backend_tokenizer.post_processor = None  # nobody writes BOS now
    doctor = examine(tmp_path, [row(0)], silent)
    assert doctor.findings["missing_bos"].count == 1 and not doctor.spoils("missing_bos")


def test_a_prepared_set_is_read_back_from_its_ids(tmp_path):
    model, source = tmp_path / "model", tmp_path / "pairs.jsonl"
    toy("llama3").save_pretrained(model)
    rows = [row(0), row(1, score_chosen=0), row(0), row(2, rejected="No, the sky " * 30), row(3, chosen="\x07")]
    source.write_text("".join(json.dumps(item) + "\n" for item in rows))
    prepare(source, model, tmp_path / "set", OPTIONS)
    doctor = Doctor(toy("llama3"), OPTIONS, (), 200)
    doctor.examine_prepared(PreparedPairs(tmp_path / "set"))
    assert found(doctor) == {"inverted": 1, "duplicate": 1, "eos_lost": 1, "odd_text": 1}
    assert doctor.findings["eos_lost"].examples == [f"{tmp_path / 'set'} row 4"]
    assert doctor.mend("eos_lost") == "--max-length above 60"


def test_two_bos_in_a_prepared_set(tmp_path):
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
    assert doctor.spoils("double_bos")


def test_the_view_marks_what_is_scored(tmp_path):
    view = examine(tmp_path, [row(0)]).views[0]
    for tokens, answer in ((view.chosen, "It is blue."), (view.rejected, "No.")):
        assert "".join(text for text, kind in tokens if kind == "scored") == answer
        assert [text for text, kind in tokens if kind == "eos"] == ["<|eot_id|>"]
        prompt = "".join(text for text, kind in tokens if kind == "prompt")
        assert prompt.startswith("<|begin_of_text|>") and prompt.endswith("assistant<|end_header_id|>\n\n")


def test_the_page_holds_no_markup_of_the_data(tmp_path, capsys):
    evil = "<script>alert(1)</script>"
    doctor = examine(tmp_path, [row(0, chosen=evil), row(0, chosen=evil)])
    write_html(doctor, "a <b> title", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page and "a &lt;b&gt; title" in page
    assert "--duplicates drop" in page and "<svg" in page and "src=" not in page
    print_report(doctor, "[red]title")
    out = capsys.readouterr().out
    assert "spoils" in out and "--duplicates drop" in out and "[red]title" in out


def test_packing_figures_by_hand():
    import numpy as np

    figures = packing_figures(np.array([[2, 3, 1], [1, 2, 2], [2, 2, 2]]), 10, batch=2)
    assert figures["tokens"] == 8 + 6 + 8 and figures["rows"] == figures["fewest_rows"] == 3
    assert figures["padding_packed"] == pytest.approx(1 - 22 / 30)
    assert figures["padding_unpacked"] == pytest.approx(1 - 22 / 30), "six sequences of five"
    assert figures["saved_by_shared_prompts"] == pytest.approx(5 / 22)
