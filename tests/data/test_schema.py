"""Rows against TRL's reading of the same rows, and the sentence for every row that cannot be read."""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from trl.data_utils import maybe_extract_prompt

from simpo_megatron import data
from simpo_megatron.data.schema import Preference, parse_preference
from simpo_megatron.errors import UserError


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [SYSTEM, user("What color is the sky?"), assistant("Which?"), user("Ours.")]
TEXT_ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}


def parse(row: dict[str, Any]) -> Preference:
    return parse_preference(row, "f.jsonl:3")


def error_of(row: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse(row)
    return str(caught.value)


# Schemas


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "Ja", "rejected": "Nein"},
        {"chosen": "The sky", "rejected": "The sky is green."},
        {"prompt": TURNS, "chosen": [assistant("Blue.")], "rejected": [assistant("Green.")]},
        {"chosen": [*TURNS, assistant("Blue.")], "rejected": [*TURNS, assistant("Green.")]},
        {"prompt": "Ours.", "chosen": [*TURNS, assistant("Blue.")], "rejected": [*TURNS, assistant("Green.")]},
    ],
)
def test_same_split_as_trl(row: dict[str, Any]) -> None:
    preference, expected = parse(row), maybe_extract_prompt(row)
    assert preference.prompt == expected["prompt"]
    chosen, rejected = expected["chosen"], expected["rejected"]
    if preference.conversational:
        chosen, rejected = chosen[0], rejected[0]
    assert (preference.chosen, preference.rejected) == (chosen, rejected)


@given(st.text("ab ", max_size=6), st.text("ab ", max_size=6), st.text("ab ", max_size=6))
def test_implicit_text_prompt_as_trl(prefix: str, chosen: str, rejected: str) -> None:
    row = {"chosen": prefix + chosen, "rejected": prefix + rejected}
    assume(row["chosen"] and row["rejected"])
    # TRL looks at chosen[-1] when nothing is common, which then loses nearly the whole response.
    assume(row["chosen"][0] == row["rejected"][0] or row["chosen"][-1] != " ")
    preference, expected = parse(row), maybe_extract_prompt(row)
    assert (preference.prompt, *preference.texts) == (expected["prompt"], expected["chosen"], expected["rejected"])


def test_nothing_in_common_is_an_empty_prompt() -> None:
    preference = parse({"chosen": "Yes ", "rejected": "No "})
    assert (preference.prompt, *preference.texts) == ("", "Yes ", "No ")


@pytest.mark.parametrize("before", [TURNS, TURNS[1:], TURNS[-1:], []])
def test_repeated_prompt_turns_are_not_doubled(before: list[dict[str, Any]]) -> None:
    row = {"prompt": TURNS, "chosen": [*before, assistant("a")], "rejected": [*before, assistant("b")]}
    assert parse(row).prompt == TURNS


def test_turns_after_the_prompt_belong_to_the_prompt() -> None:
    more = [assistant("Hm?"), user("Go on.")]
    row = {"prompt": TURNS, "chosen": [*more, assistant("a")], "rejected": [*TURNS, *more, assistant("b")]}
    preference = parse(row)
    assert preference.prompt == TURNS + more
    assert preference.texts == ("a", "b")


def test_prompt_string_with_single_answers_is_the_user_turn() -> None:
    preference = parse({"prompt": "Why?", "chosen": [assistant("a")], "rejected": [assistant("b")]})
    assert preference.prompt == [user("Why?")]
    assert preference.conversational


def test_null_keys_of_messages_are_left_out_and_others_kept() -> None:
    row = {
        "chosen": [user("q", name="Ann", tool_calls=None), assistant("a")],
        "rejected": [user("q", name="Ann"), assistant("b", reasoning_content="r")],
    }
    preference = parse(row)
    assert preference.prompt == [user("q", name="Ann")]
    assert preference.rejected == assistant("b", reasoning_content="r")


def test_null_prompt_is_an_implicit_one() -> None:
    assert parse({"prompt": None, "chosen": "The a", "rejected": "The b"}).prompt == "The"


def test_the_rows_of_the_readme() -> None:
    text = Path(data.__file__).with_name("README.md").read_text(encoding="utf-8")
    rows = [json.loads(row) for row in re.findall(r'^\| [\w ]+ \| `({"(?:prompt|chosen)".*})` \|', text, re.MULTILINE)]
    assert [parse(row).prompt for row in rows] == ["The sky is", "The sky is", *[[user("Why?")]] * 3]


# Columns


def test_columns() -> None:
    assert (parse(TEXT_ROW).weight, parse(TEXT_ROW).margin, parse(TEXT_ROW).tie) == (1.0, None, False)
    preference = parse({**TEXT_ROW, "weight": 0, "margin": -0.5, "score_chosen": 7, "score_rejected": 7.0})
    assert (preference.weight, preference.margin, preference.tie) == (0.0, -0.5, True)
    assert not parse({**TEXT_ROW, "score_chosen": None, "score_rejected": None}).tie
    assert not parse({**TEXT_ROW, "score_chosen": 1.0, "score_rejected": 0.5}).tie


def test_reference_log_probs() -> None:
    assert parse(TEXT_ROW).reference_logps == (None, None)
    both = {**TEXT_ROW, "ref_chosen_logps": -12.5, "ref_rejected_logps": 0}
    assert parse(both).reference_logps == (-12.5, 0.0)
    one = {**both, "ref_rejected_logps": None}
    assert error_of(one).endswith("`ref_chosen_logps` without `ref_rejected_logps`; give both, or leave both out")
    positive = {**both, "ref_rejected_logps": 0.5}
    assert error_of(positive).endswith("`ref_rejected_logps` is 0.5; the log-prob of a response is at most 0")


NUMBERS = ["weight", "margin", "score_chosen", "score_rejected", "ref_chosen_logps"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, 10**400, "1", True, [1]])
def test_column_that_is_not_a_finite_number(name: str, value: Any) -> None:
    message = error_of({**TEXT_ROW, name: value})
    assert message.startswith(f"f.jsonl:3: `{name}` is {reprlib.repr(value)}")
    assert message.endswith("; it must be a finite number of at most 3e38, or be left out") and len(message) < 150


def test_negative_weight() -> None:
    assert error_of({**TEXT_ROW, "weight": -0.5}) == "f.jsonl:3: `weight` is -0.5; it must be zero or more"


# Errors

ASSISTANT = assistant("a")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "no `chosen`; a row needs `chosen` and `rejected`, this one has `prompt`"),
        ({}, "no `chosen`; a row needs `chosen` and `rejected`, this one has no columns"),
        (
            {"chosen": "c", "rejected": None},
            "`rejected` is null; give a string or a list of messages, or remove the row",
        ),
        (
            {"prompt": "p", "chosen": "c", "rejected": [ASSISTANT]},
            "`chosen` is a string and `rejected` is a list; both must be strings or both lists of messages",
        ),
        (
            {"chosen": 3, "rejected": {}},
            "`chosen` is a number and `rejected` is an object; both must be strings or both lists of messages",
        ),
        (
            {"prompt": TURNS, "chosen": "c", "rejected": "r"},
            "`prompt` is a list but `chosen` and `rejected` are strings; make all three strings, or all three lists of "
            "messages",
        ),
        (
            {"prompt": 3, "chosen": [ASSISTANT], "rejected": [ASSISTANT]},
            "`prompt` is a number; it must be a string or a list of messages",
        ),
        (
            {"chosen": [*TURNS, ASSISTANT], "rejected": [SYSTEM, user("?"), *TURNS[2:], ASSISTANT]},
            "`chosen` and `rejected` differ at message 2, before the last; they must answer the same conversation, so "
            "give both the same earlier messages",
        ),
        (
            {"chosen": [*TURNS, ASSISTANT], "rejected": [*TURNS[:2], ASSISTANT]},
            "`chosen` and `rejected` differ at message 3, before the last; they must answer the same conversation, so "
            "give both the same earlier messages",
        ),
        (
            {"chosen": TURNS, "rejected": [*TURNS, ASSISTANT]},
            "`chosen` ends with a 'user' message; the last message must be the assistant's response",
        ),
        (
            {"chosen": [user("q"), ASSISTANT], "rejected": []},
            "`rejected` is an empty list; the last message must be the assistant's response",
        ),
        (
            {"chosen": [ASSISTANT], "rejected": [ASSISTANT]},
            "`chosen` is a response without a prompt; add `prompt` or the messages before the response",
        ),
        (
            {"chosen": [{"from": "human", "value": "q"}], "rejected": []},
            '`chosen` message 1 is not {"role": ..., "content": ...} but `from`, `value`; convert it',
        ),
        (
            {"chosen": ["q"], "rejected": []},
            '`chosen` message 1 is not {"role": ..., "content": ...} but a string; convert it',
        ),
        (
            {"chosen": [user("q"), assistant(None)], "rejected": []},
            "`chosen` message 2: `content` is null; it must be a string",
        ),
        (
            {"prompt": [user([{"type": "text"}])], "chosen": [ASSISTANT], "rejected": [ASSISTANT]},
            "`prompt` message 1: `content` is a list; it must be a string",
        ),
        (
            {"prompt": "p", "chosen": "ab\ud83d", "rejected": "r"},
            "`chosen` has half a surrogate pair ('\\ud83d') at character 3; remove it",
        ),
    ],
)
def test_rows_that_cannot_be_read(row: dict[str, Any], message: str) -> None:
    assert error_of(row) in (f"f.jsonl:3: {message}", f"f.jsonl:3 {message}")
