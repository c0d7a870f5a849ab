"""A file of rows becomes flat arrays with the same ids, and every row is accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simpo_megatron.data import CHOSEN_CUT, REJECTED_CUT, DataOptions, InMemoryPairs, load_preferences
from simpo_megatron.data.encode import PairEncoder
from simpo_megatron.data.schema import parse_preference
from simpo_megatron.errors import UserError
from tests.support.toy_tokenizers import toy, with_template

Write = Callable[[list[dict[str, Any]]], Path]
TIE = {"score_chosen": 3, "score_rejected": 3.0}


def row(
    chosen: str = " It is blue.", rejected: str = " No.", prompt: str = "What color is the sky?", **more: Any
) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(json.dumps(item) for item in rows))
        return path

    return write


def test_ids_are_those_of_the_encoder(write: Write) -> None:
    rows = [row(f" It is {i}.", prompt="The sky" * (i % 5 + 1)) for i in range(2500)]  # many blocks
    tokenizer = toy("mistral")
    pairs, report = load_preferences(write(rows), tokenizer, DataOptions())
    encoded = PairEncoder(tokenizer, DataOptions()).encode([parse_preference(item, "") for item in rows])
    assert len(pairs) == report.pairs == report.rows == 2500
    for i, pair in enumerate(encoded):
        assert [part.tolist() for part in pairs.pair(i)] == [pair.prompt, pair.chosen, pair.rejected]
    packed = [2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in encoded]
    assert pairs.pair_tokens.tolist() == packed
    assert pairs.pair_tokens.dtype == np.int64


def test_arrays_and_back(write: Write) -> None:
    pairs, _ = load_preferences(write([row(weight=0.25, margin=-1.5), row()]), toy("qwen"), DataOptions())
    arrays = pairs.arrays()
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        "tokens": "int32",
        "offsets": "int64",
        "prompt_length": "int32",
        "chosen_length": "int32",
        "rejected_length": "int32",
        "row": "int64",
        "weight": "float32",
        "margin": "float32",
        "score_chosen": "float32",
        "score_rejected": "float32",
        "truncated": "uint8",
        "prompt_cut": "uint8",
        "ref_chosen_logps": "float32",
        "ref_rejected_logps": "float32",
    }
    copy = InMemoryPairs.from_arrays({name: array.copy() for name, array in arrays.items()})
    for name, array in copy.arrays().items():
        np.testing.assert_array_equal(array, arrays[name])
    assert pairs.columns["weight"].tolist() == [0.25, 1.0]
    assert pairs.columns["margin"][0] == -1.5
    assert np.isnan(pairs.columns["margin"][1])


def test_dropped_rows_are_counted(write: Write) -> None:
    rows = [
        row(),
        row(chosen=" \n"),
        row(rejected=""),
        row(" No."),
        row(**TIE),
        row(" It is " + "blue " * 20 + "a", " It is " + "blue " * 20 + "b"),
    ]
    path = write(rows)
    pairs, report = load_preferences(path, toy("llama3"), DataOptions(max_length=30, max_prompt_length=20))
    assert len(pairs) == 1
    assert (report.rows, report.pairs) == (6, 1)
    dropped = {reason: count for reason, count in report.dropped.items() if count}
    assert dropped == {"empty": 2, "identical": 1, "tie": 1, "identical_after_truncation": 1}
    assert report.summary(path) == (
        f"{path}: 1 pairs of 6 rows; dropped 2 with an empty response, 1 with identical responses, "
        "1 with equal scores, 1 identical after truncation"
    )


def test_responses_that_only_the_template_makes_identical(write: Write) -> None:
    rows = [{"prompt": "q", "chosen": [{"role": "assistant", "content": text}]} for text in ("a", "b")]
    rows = [{**item, "rejected": [{"role": "assistant", "content": "a\n"}]} for item in rows]
    _, report = load_preferences(write(rows), toy("llama3"), DataOptions())  # this template trims
    assert report.dropped["identical"] == 1
    _, report = load_preferences(write(rows), toy("qwen"), DataOptions())
    assert report.dropped["identical"] == 0


def test_ties_can_be_kept_with_margin_zero(write: Write) -> None:
    rows = [row(), row(margin=2.0, **TIE)]
    pairs, report = load_preferences(write(rows), toy("qwen"), DataOptions(tie_policy="zero-margin"))
    assert np.isnan(pairs.columns["margin"][0])
    assert pairs.columns["margin"][1] == 0
    assert (report.ties_kept, report.dropped["tie"]) == (1, 0)


def test_truncation_is_marked_and_reported(write: Write) -> None:
    long = " sky" * 50
    rows = [
        row(),
        row(chosen=long),
        row(rejected=long),
        row(long, long + "!"),
        row(prompt=long),
        row(prompt="No, the "),
    ]
    rows[3]["rejected"] = " dog" + long
    tokenizer = toy("llama3")
    path = write(rows)
    pairs, report = load_preferences(path, tokenizer, DataOptions(max_length=40, max_prompt_length=20))
    assert pairs.columns["truncated"].tolist() == [0, CHOSEN_CUT, REJECTED_CUT, CHOSEN_CUT | REJECTED_CUT, 0, 0]
    ends = [[pairs.pair(i)[j][-1] == tokenizer.eos_token_id for j in (1, 2)] for i in range(6)]
    assert ends == [[True, True], [False, True], [True, False], [False, False], [True, True], [True, True]]
    assert (report.truncated_prompts, report.truncated_chosen, report.truncated_rejected) == (1, 2, 2)
    assert report.summary("p") == (
        "p: 6 pairs of 6 rows\n  1 prompts cut, 2 chosen responses cut (no EOS), 2 rejected responses cut (no EOS)"
    )


def test_summary_of_ties_and_merges(write: Write) -> None:
    rows = [row("sky is", "dog is", prompt="No, the ", **TIE)]
    _, report = load_preferences(write(rows), toy("llama3"), DataOptions(tie_policy="zero-margin"))
    assert report.boundary_merges == 2
    assert report.summary("p").splitlines() == [
        "p: 1 pairs of 1 rows",
        "  1 ties kept with margin 0, 2 of 2 responses tokenized apart from their prompt (tools/inspect_data.py says "
        "whether that is a fault)",
    ]


def test_no_pair_left(write: Write) -> None:
    path = write([row(chosen=""), row(**TIE), row(**TIE)])
    with pytest.raises(UserError) as caught:
        load_preferences(path, toy("qwen"), DataOptions())
    assert str(caught.value) == (
        f"{path}: no pair is left of 3 rows: dropped 1 with an empty response, 2 with equal scores; fix the data"
    )


def test_an_error_names_the_row(write: Write) -> None:
    path = write([row(), {"prompt": "p", "chosen": "c"}])
    with pytest.raises(UserError, match=rf"^{path}:2: no `rejected`"):
        load_preferences(path, toy("qwen"), DataOptions())
    path = write([row(), row(), {"prompt": "q", "chosen": [], "rejected": []}])
    with pytest.raises(UserError, match=rf"^{path}:3: `chosen` is an empty list"):
        load_preferences(path, with_template("qwen", None), DataOptions())


def test_progress_goes_to_a_terminal_on_stderr_alone(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write([row()])
    load_preferences(path, toy("qwen"), DataOptions(), progress=True)
    assert capsys.readouterr() == ("", ""), "a log file gets no bar"
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    load_preferences(path, toy("qwen"), DataOptions(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Tokenizing" in err


def test_mixed_schemas(write: Write) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = {"chosen": chat, "rejected": [chat[0], {"role": "assistant", "content": "b"}]}
    for rows in ([row(), other], [row()] * 150 + [other]):  # in one block and in two
        path = write(rows)
        with pytest.raises(UserError) as caught:
            load_preferences(path, toy("llama3"), DataOptions())
        first = (len(rows) - 2) // 100 * 100 + 1  # of the block before, or of the same one
        assert str(caught.value) == (
            f"{path}:{len(rows)}: the row is a conversation (lists of messages), but {path}:{first} is plain strings; "
            "give rows of one schema, or two files as a blend"
        )


@pytest.mark.parametrize(
    ("options", "reason", "rows"),
    [
        (
            {"min_score_gap": 0.5},
            "low_gap",
            [row(score_chosen=1, score_rejected=0.6), row(score_chosen=1, score_rejected=2)],
        ),
        ({"max_length_ratio": 3}, "length_ratio", [row(" It is blue " * 9), row(rejected=" It is blue " * 40)]),
        ({"duplicates": "drop"}, "duplicate", [row(score_chosen=1, score_rejected=0), row()]),
    ],
)
def test_cleaning_is_counted(write: Write, options: dict[str, Any], reason: str, rows: list[dict[str, Any]]) -> None:
    good = row(score_chosen=1, score_rejected=0)
    path = write([good, *rows])
    settings = {"max_length": 300, "max_prompt_length": 100}
    pairs, report = load_preferences(path, toy("llama3"), DataOptions(**settings, **options))
    assert {name: count for name, count in report.dropped.items() if count} == {reason: 2}
    assert len(pairs) == report.pairs == 1
    assert len(load_preferences(path, toy("llama3"), DataOptions(**settings))[0]) == 3, "nothing is dropped unasked"


def test_a_gap_needs_scores(write: Write) -> None:
    path = write([row()])
    with pytest.raises(UserError, match="no `score_chosen` and `score_rejected`, which --min-score-gap compares"):
        load_preferences(path, toy("llama3"), DataOptions(min_score_gap=0.1))
