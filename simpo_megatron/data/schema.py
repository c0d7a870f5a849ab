"""One row of a preference file -> one `Preference`, whichever of the usual schemas the row is in.

    prompt    chosen, rejected       read as
    str       str                    prompt and completions, as they are
    -         str                    the common prefix is the prompt
    list      list of messages       a conversation; turns of the prompt that a response repeats are not doubled
    - or str  list of messages       the lists hold the conversation (UltraFeedback-binarized)
    str       one assistant message  the string is the user's turn

The response is the last turn of a conversation, the assistant's. All earlier turns are the prompt.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from simpo_megatron.errors import UserError

# {"role": str, "content": str, ...}. Other keys are passed to the chat template; keys that are null are left out.
Message = dict[str, Any]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt: three strings, or a list of messages and two assistant messages.

    Attributes:
        where: place of the row, for errors.
        prompt: a string, or the messages before the response.
        chosen: the preferred response.
        rejected: the other response.
        weight: factor of the pair's loss.
        margin: target reward margin of this pair, in place of gamma.
        scores: of the chosen and of the rejected response.
        reference_logps: summed log-probs of both under a reference model.
    """

    where: str
    prompt: str | list[Message]
    chosen: str | Message
    rejected: str | Message
    weight: float = 1.0
    margin: float | None = None
    scores: tuple[float | None, float | None] = (None, None)
    reference_logps: tuple[float | None, float | None] = (None, None)

    @property
    def tie(self) -> bool:
        """Whether the two scores are equal."""
        return self.scores[0] is not None and self.scores[0] == self.scores[1]

    @property
    def conversational(self) -> bool:
        """Whether the prompt is a list of messages."""
        return isinstance(self.prompt, list)

    @property
    def texts(self) -> tuple[str, str]:
        """The text of the chosen and of the rejected response, without the chat template."""
        chosen, rejected = (r if isinstance(r, str) else r["content"] for r in (self.chosen, self.rejected))
        return chosen, rejected


def parse_preference(row: Mapping[str, Any], where: str) -> Preference:
    """Reads one row.

    Args:
        row: its columns.
        where: place of the row, for errors.

    Raises:
        UserError: the row is in none of the schemas, or a number in it cannot be used.
    """
    for name in ("chosen", "rejected"):
        if name not in row:
            raise UserError(f"{where}: no `{name}`; a row needs `chosen` and `rejected`, this one has {_keys(row)}")
        if row[name] is None:
            raise UserError(f"{where}: `{name}` is null; give a string or a list of messages, or remove the row")
    responses = row["chosen"], row["rejected"]
    if all(isinstance(response, str) for response in responses):
        prompt, chosen, rejected = _from_text(row, where)
    elif all(isinstance(response, list) for response in responses):
        prompt, chosen, rejected = _from_messages(row, where)
    else:
        kinds = " and ".join(f"`{name}` is {kind_of(row[name])}" for name in ("chosen", "rejected"))
        raise UserError(f"{where}: {kinds}; both must be strings or both lists of messages")

    weight = _number(row, "weight", where)
    if weight is not None and weight < 0:
        raise UserError(f"{where}: `weight` is {weight:g}; it must be zero or more")
    return Preference(
        where=where,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        weight=1.0 if weight is None else weight,
        margin=_number(row, "margin", where),
        scores=(_number(row, "score_chosen", where), _number(row, "score_rejected", where)),
        reference_logps=_reference_logps(row, where),
    )


def _reference_logps(row: Mapping[str, Any], where: str) -> tuple[float | None, float | None]:
    """The columns of TRL: summed log-probs of both responses under a reference model; both or none."""
    chosen, rejected = (_number(row, name, where) for name in ("ref_chosen_logps", "ref_rejected_logps"))
    if (chosen is None) != (rejected is None):
        given, other = ("chosen", "rejected") if rejected is None else ("rejected", "chosen")
        raise UserError(f"{where}: `ref_{given}_logps` without `ref_{other}_logps`; give both, or leave both out")
    for name, value in (("ref_chosen_logps", chosen), ("ref_rejected_logps", rejected)):
        if value is not None and value > 0:
            raise UserError(f"{where}: `{name}` is {value:g}; the log-prob of a response is at most 0")
    return chosen, rejected


def _from_text(row: Mapping[str, Any], where: str) -> tuple[str, str, str]:
    chosen, rejected = (_text(row[name], f"{where}: `{name}`") for name in ("chosen", "rejected"))
    prompt = row.get("prompt")
    if prompt is None:
        split = _common_prefix(chosen, rejected)
        return chosen[:split], chosen[split:], rejected[split:]
    if not isinstance(prompt, str):
        raise UserError(
            f"{where}: `prompt` is {kind_of(prompt)} but `chosen` and `rejected` are strings; make all three strings, "
            "or all three lists of messages"
        )
    return _text(prompt, f"{where}: `prompt`"), chosen, rejected


def _common_prefix(chosen: str, rejected: str) -> int:
    """Length of the implicit prompt: the common prefix without a space at its end, which belongs to the next word.

    The last character of the shorter text always belongs to the response, as in TRL's `extract_prompt`.
    """
    longest = max(min(len(chosen), len(rejected)) - 1, 0)
    split = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    differs = chosen[split : split + 1] != rejected[split : split + 1]
    return split - 1 if differs and split and chosen[split - 1] == " " else split


def _from_messages(row: Mapping[str, Any], where: str) -> tuple[list[Message], Message, Message]:
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        prompt = _messages(prompt, f"{where}: `prompt`")
    elif isinstance(prompt, str):
        prompt = _text(prompt, f"{where}: `prompt`")
    elif prompt is not None:
        raise UserError(f"{where}: `prompt` is {kind_of(prompt)}; it must be a string or a list of messages")

    before, chosen = _split_last(prompt, row["chosen"], f"{where}: `chosen`")
    other, rejected = _split_last(prompt, row["rejected"], f"{where}: `rejected`")
    if before != other:
        same = next((i for i, (a, b) in enumerate(zip(before, other, strict=False)) if a != b), None)
        turn = (min(len(before), len(other)) if same is None else same) + 1
        raise UserError(
            f"{where}: `chosen` and `rejected` differ at message {turn}, before the last; they must answer the same "
            "conversation, so give both the same earlier messages"
        )
    return before, chosen, rejected


def _split_last(prompt: str | list[Message] | None, value: list[Any], what: str) -> tuple[list[Message], Message]:
    """The messages before the response, and the response."""
    messages = _messages(value, what)
    if not messages or messages[-1]["role"] != "assistant":
        last = f"ends with a {messages[-1]['role']!r} message" if messages else "is an empty list"
        raise UserError(f"{what} {last}; the last message must be the assistant's response")
    before, response = messages[:-1], messages[-1]
    if isinstance(prompt, list):
        if not before or prompt[-len(before) :] == before:
            before = prompt
        elif before[: len(prompt)] != prompt:
            before = prompt + before
    elif isinstance(prompt, str) and not before:
        before = [{"role": "user", "content": prompt}]
    if not before:
        raise UserError(f"{what} is a response without a prompt; add `prompt` or the messages before the response")
    return before, response


def prompt_messages(value: Any, what: str) -> list[Message]:
    """The messages of a prompt without a response; a text is the user's turn.

    Args:
        value: of the column.
        what: place and name of the column, for errors.

    Raises:
        UserError: it is neither a text nor a list of messages, or it is empty.
    """
    if isinstance(value, str) and value:
        return [{"role": "user", "content": _text(value, what)}]
    if not isinstance(value, list) or not value:
        found = "missing" if value is None else "empty" if value in ("", []) else kind_of(value)
        raise UserError(f"{what} is {found}; it must be a text or a list of messages")
    return _messages(value, what)


def _messages(value: list[Any], what: str) -> list[Message]:
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            found = _keys(message) if isinstance(message, dict) else kind_of(message)
            raise UserError(f'{what} message {number} is not {{"role": ..., "content": ...}} but {found}; convert it')
        _text(message.get("content"), f"{what} message {number}: `content`")
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {kind_of(value)}; it must be a string")
    return check_unicode(value, what)


def check_unicode(text: str, what: str) -> str:
    """The same text.

    Args:
        text: of a row.
        what: it is, for the error.

    Raises:
        UserError: it has a surrogate that is not part of a pair, which no UTF-8 file can hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud83d" alone is legal JSON; tokenizers cannot encode it
        raise UserError(
            f"{what} has half a surrogate pair ({text[error.start]!a}) at character {error.start + 1}; remove it"
        ) from None
    return text


def _number(row: Mapping[str, Any], name: str, where: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if not is_number(value):
        raise UserError(f"{where}: `{name}` is {shown(value)}; it must be {NUMBER}, or be left out")
    return float(value)


def check_json(value: Any, what: str) -> None:
    """Checks that a JSON file can hold a value of a row.

    Args:
        value: a column, or the whole row.
        what: it is, for the error.

    Raises:
        UserError: it has half a surrogate pair, or a part that JSON does not know, such as a date of a Parquet file.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise UserError(f"{what} cannot be written as JSON ({error}); remove or convert that part") from None
    check_unicode(text, what)


NUMBER = "a finite number of at most 3e38"  # what `is_number` accepts, for errors


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a row is a number that fp32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def shown(value: Any) -> str:
    """A value of a row for an error: as JSON names it, and cut where it is long."""
    return "null" if value is None else reprlib.repr(value)


def kind_of(value: Any) -> str:
    """What a value of a row is, for an error: "a list"."""
    kinds = {str: "a string", list: "a list", dict: "an object", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in row) or "no columns"
