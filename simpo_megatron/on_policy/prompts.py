"""Prompts that a model is to answer: rows with an id, the part of them that one process answers, and what is kept out.

prompts, report = read_prompts("prompts.jsonl", exclude=("heldout.jsonl",), shard=Shard(1, 4))
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.schema import Message, check_json, prompt_messages, shown
from simpo_megatron.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with a user's turn.

    Attributes:
        id: of the row, or a digest of the messages; unique in a file.
        messages: the conversation.
        where: place of the row, for errors.
        columns: the other columns of the row, for scorers.
    """

    id: str
    messages: list[Message]
    where: str
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """The part of the prompts that a process answers. Which part a prompt is in depends on its id alone.

    Attributes:
        number: of this part, from 1.
        of: number of parts.
    """

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads "2/4".

        Raises:
            UserError: it is not such a text.
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--shard {text} is not a part such as 2/4, the second of four")
        return cls(int(found[1]), int(found[2]))

    def has(self, prompt_id: str) -> bool:
        """Whether the prompt is in this part."""
        return zlib.crc32(prompt_id.encode()) % self.of == self.number - 1


@dataclass
class PromptReport:
    """Counts of what became of the rows.

    Attributes:
        rows: read.
        repeated: rows whose messages and id are those of an earlier row.
        excluded: prompts that are also in an excluded file, letter by letter.
        excluded_alike: prompts that are in one up to case, spaces and punctuation.
        kept: prompts of this shard.
    """

    rows: int = 0
    repeated: int = 0
    excluded: int = 0
    excluded_alike: int = 0
    kept: int = 0

    def summary(self, source: str) -> str:
        """The counts in one line."""
        left_out = [
            f"{count} {what}"
            for count, what in (
                (self.repeated, "that repeat an earlier row"),
                (self.excluded, "that are evaluation prompts"),
                (self.excluded_alike, "that are evaluation prompts up to case, spaces and punctuation"),
            )
            if count
        ]
        return f"{source}: {self.kept} prompts of {self.rows} rows" + (
            f"; left out {', '.join(left_out)}" if left_out else ""
        )


def read_prompts(source: str, exclude: Iterable[str] = (), shard: Shard = Shard()) -> tuple[list[Prompt], PromptReport]:
    """Reads prompts from any source that preference data may come from.

    Args:
        source: rows with `prompt`, a text (the user's turn) or messages, and `id` where they have one.
        exclude: sources of evaluation prompts, which are left out.
        shard: the part that is wanted.

    Raises:
        UserError: a row is of another form, two different prompts have one id, or no prompt is left.
    """
    exact: set[str] = set()
    alike: set[str] = set()
    for name in exclude:
        texts = [user_text(messages) for _, messages in _excluded(name)]
        exact.update(texts)
        alike.update(normalized(text) for text in texts)
    report, found = PromptReport(), dict[str, Prompt]()
    for where, row in read_rows(source):
        report.rows += 1
        prompt = parse_prompt(row, where)
        text = user_text(prompt.messages)
        earlier = found.get(prompt.id)
        if earlier is not None and earlier.messages != prompt.messages:
            raise UserError(
                f"{where}: `id` {prompt.id} is that of another prompt at {earlier.where}; give each its own"
            )
        if earlier is not None:
            report.repeated += 1
        elif text in exact:
            report.excluded += 1
        elif normalized(text) in alike:
            report.excluded_alike += 1
        else:
            found[prompt.id] = prompt
    kept = [prompt for prompt in found.values() if shard.has(prompt.id)]
    report.kept = len(kept)
    if not found:
        raise UserError(f"{report.summary(source)}; no prompt is left to answer, so give other prompts")
    return kept, report


def parse_prompt(row: Mapping[str, Any], where: str) -> Prompt:
    """Reads one row.

    Raises:
        UserError: it has no prompt, an id that is neither a text nor a whole number, or a column that no JSON file can
            hold.
    """
    messages = prompt_messages(row.get("prompt"), f"{where}: `prompt`")
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where}: `prompt` ends with an assistant's message; it must end with what is to be answered")
    prompt_id = row.get("id")
    if prompt_id is None:
        prompt_id = digest(messages)
    if not isinstance(prompt_id, str | int) or isinstance(prompt_id, bool) or prompt_id == "":
        raise UserError(f"{where}: `id` is {shown(prompt_id)}; it must be a text or a whole number, or be left out")
    check_json(row, f"{where}: the row")
    columns = {name: value for name, value in row.items() if name not in ("id", "prompt", "responses")}
    return Prompt(str(prompt_id), messages, where, columns)


def _excluded(source: str) -> Iterator[tuple[str, list[Message]]]:
    """The prompts of preference rows, and of the question files of AlpacaEval, Arena-Hard and MT-Bench."""
    for where, row in read_rows(source):
        turns = row.get("turns")
        first = turns[0] if isinstance(turns, list) and turns else None
        text = first.get("content") if isinstance(first, dict) else first
        prompt = next((row[name] for name in ("prompt", "instruction") if row.get(name) is not None), text)
        if prompt is None and isinstance(row.get("chosen"), list):
            prompt = row["chosen"][:-1]
        yield where, prompt_messages(prompt, f"{where}: `prompt`")


def user_text(messages: list[Message]) -> str:
    """The user's turns of a conversation; two prompts with the same ask the same."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def normalized(text: str) -> str:
    """A text without case, punctuation and repeated spaces.

    >>> normalized("Why is  the sky BLUE?") == normalized("why is the sky blue")
    True
    """
    return " ".join(re.findall(r"\w+", text.casefold()))


def digest(value: Any) -> str:
    """16 hexadecimal digits that tell one JSON value from another."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
