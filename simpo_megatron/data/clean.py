"""Rows -> tokenized pairs, a block of rows at a time, and the count of what became of every row.

A block is worked on by a pure function (`encode_rows`), so worker processes may; what needs more than one block to decide
(duplicates, schemas that change) is `CrossBlockFilter`'s, which sees the blocks in order.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simpo_megatron.data.encode import EncodedPair, PairEncoder, truncate
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.pairs import CHOSEN_CUT, REJECTED_CUT, InMemoryPairs, concatenate
from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.schema import Preference, parse_preference
from simpo_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = tuple[str, dict[str, Any]]
"""Where a row stands, and its columns."""

BLOCK_ROWS = 100  # rows held as Python objects at a time
_DROPPED = {
    "empty": "with an empty response",
    "identical": "with identical responses",
    "tie": "with equal scores",
    "low_gap": "with a score gap below --min-score-gap",
    "length_ratio": "with responses of too unequal length",
    "duplicate": "that repeat an earlier row",
    "identical_after_truncation": "identical after truncation",
}


@dataclass
class DataReport:
    """What became of the rows of a file. Truncation and merges are counted over the pairs that are kept."""

    rows: int = 0
    pairs: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_DROPPED, 0))
    """Rows by the reason; see `_DROPPED`."""
    ties_kept: int = 0
    truncated_prompts: int = 0
    truncated_chosen: int = 0
    truncated_rejected: int = 0
    boundary_merges: int = 0
    """Responses tokenized on their own because a token straddled their boundary with the prompt."""

    def summary(self, path: str | Path) -> str:
        """One line on rows and pairs and, when there is something to say, one on cuts, ties and merges."""
        drops = self.drops()
        lines = [f"{path}: {self.pairs} pairs of {self.rows} rows" + (f"; dropped {drops}" if drops else "")]
        notes = {
            "prompts cut": self.truncated_prompts,
            "chosen responses cut (no EOS)": self.truncated_chosen,
            "rejected responses cut (no EOS)": self.truncated_rejected,
            "ties kept with margin 0": self.ties_kept,
            "responses tokenized apart from their prompt": self.boundary_merges,
        }
        if any(notes.values()):
            lines.append("  " + ", ".join(f"{count} {note}" for note, count in notes.items() if count))
        return "\n".join(lines)

    def drops(self) -> str:
        """The rows that were dropped, by reason; empty where none was."""
        return ", ".join(f"{count} {_DROPPED[reason]}" for reason, count in self.dropped.items() if count)

    def add(self, other: "DataReport") -> None:
        """Counts the rows of `other` too."""
        for name, value in vars(other).items():
            if name == "dropped":
                for reason, count in value.items():
                    self.dropped[reason] += count
            else:
                setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class EncodedRows:
    """The pairs kept of some rows, in their order: P of them."""

    pairs: InMemoryPairs
    row: np.ndarray  # int64 [P], the row of the source, from 1
    scores: np.ndarray  # float32 [P, 2], NaN where there is none
    prompt_cut: np.ndarray  # bool [P]
    merges: np.ndarray  # uint8 [P], responses tokenized apart
    digest: np.ndarray  # uint64 [P] of the ids; none unless duplicates are dropped
    report: DataReport  # of all of the rows; kept pairs are counted by `CrossBlockFilter`
    first: tuple[str, bool] | None  # where the first row stands, and whether it is a conversation


def encode_rows(rows: Iterable[Row], encoder: PairEncoder, options: DataOptions) -> EncodedRows:
    """Parses, tokenizes and truncates rows. Raises UserError naming the row that is in none of the schemas."""
    report, preferences = DataReport(), []
    first: tuple[str, bool] | None = None
    for where, row in rows:
        preference = parse_preference(row, where)
        first = first or (where, preference.conversational)
        check_schema(first, (where, preference.conversational))
        report.rows += 1
        reason = _unusable(preference, options)
        if reason:
            report.dropped[reason] += 1
        else:
            preferences.append(preference)
    kept: list[tuple[Preference, EncodedPair]] = []
    for preference, pair in zip(preferences, encoder.encode(preferences), strict=True):
        cut = truncate(pair, options, encoder.bos)
        reason = _untrainable(pair, cut, options)
        if reason:
            report.dropped[reason] += 1
        else:
            kept.append((preference, cut))
    pairs = _pairs(kept)
    digests = [_digest(pairs, i) for i in range(len(pairs))] if options.duplicates == "drop" else []
    scores = [[np.nan if score is None else score for score in preference.scores] for preference, _ in kept]
    return EncodedRows(
        pairs=pairs,
        row=np.array([row_number(preference.where) for preference, _ in kept], np.int64),
        scores=np.array(scores, np.float32).reshape(-1, 2),
        prompt_cut=np.array([pair.prompt_cut for _, pair in kept], bool),
        merges=np.array([pair.boundary_merges for _, pair in kept], np.uint8),
        digest=np.array(digests, np.uint64),
        report=report,
        first=first,
    )


class CrossBlockFilter:
    """Drops duplicates across blocks and sums their reports. Blocks must arrive in order."""

    def __init__(self, options: DataOptions) -> None:
        self.report = DataReport()
        self._seen: set[int] | None = set() if options.duplicates == "drop" else None
        self._first: tuple[str, bool] | None = None

    def __call__(self, encoded: EncodedRows) -> EncodedRows:
        """The block without pairs that stood in an earlier row. Raises UserError for a schema that changes."""
        if encoded.first is not None:
            self._first = self._first or encoded.first
            check_schema(self._first, encoded.first)
        if self._seen is not None:
            encoded = self._without_duplicates(encoded, self._seen)
        self.report.add(encoded.report)
        for name, values in {
            "pairs": np.ones(len(encoded.row)),
            "ties_kept": encoded.scores[:, 0] == encoded.scores[:, 1],
            "truncated_prompts": encoded.prompt_cut,
            "truncated_chosen": encoded.pairs.truncated & CHOSEN_CUT != 0,
            "truncated_rejected": encoded.pairs.truncated & REJECTED_CUT != 0,
            "boundary_merges": encoded.merges,
        }.items():
            setattr(self.report, name, getattr(self.report, name) + int(values.sum()))
        return encoded

    @staticmethod
    def _without_duplicates(encoded: EncodedRows, seen: set[int]) -> EncodedRows:
        keep = np.ones(len(encoded.row), bool)
        for i, digest in enumerate(encoded.digest.tolist()):
            keep[i] = digest not in seen
            seen.add(digest)
        encoded.report.dropped["duplicate"] += int((~keep).sum())
        return EncodedRows(
            pairs=encoded.pairs.take(keep),
            row=encoded.row[keep],
            scores=encoded.scores[keep],
            prompt_cut=encoded.prompt_cut[keep],
            merges=encoded.merges[keep],
            digest=encoded.digest[keep],
            report=encoded.report,
            first=encoded.first,
        )


def load_preferences(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    options: DataOptions,
    *,
    eos_token_ids: Iterable[int] = (),
    progress: bool = False,
) -> tuple[InMemoryPairs, DataReport]:
    """Read and tokenize the preference pairs of a source (see `reading.py`), in its order.

    `eos_token_ids` are ids that end a response besides tokenizer.eos_token_id. `progress` shows a bar on stderr.
    Raises UserError for a file or row that cannot be read, and when no pair is left.
    """
    encoder, gate = PairEncoder(tokenizer, options, eos_token_ids), CrossBlockFilter(options)
    rows = read_rows(path)
    shown = with_progress(rows, f"Tokenizing {path}") if progress else rows
    parts = [gate(encode_rows(block, encoder, options)).pairs for block in row_blocks(shown)]
    if not gate.report.pairs:
        raise nothing_left(path, gate.report)
    return concatenate(parts), gate.report


def nothing_left(path: str | Path, report: DataReport) -> UserError:
    """The error of a source all of whose rows were dropped."""
    return UserError(f"{path}: no pair is left of {report.rows} rows: dropped {report.drops()}; mend the data.")


def row_blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in lists of BLOCK_ROWS, the last one shorter."""
    iterator = iter(rows)
    while block := list(islice(iterator, BLOCK_ROWS)):
        yield block


def row_number(where: str) -> int:
    """The number a place ends with: "pairs.jsonl:7" and "pairs.parquet row 7" are 7; 0 without one."""
    digits = where[len(where.rstrip("0123456789")) :]
    return int(digits) if digits else 0


def check_schema(first: tuple[str, bool], other: tuple[str, bool]) -> None:
    """Raises UserError where one row is a conversation and another is not: two sources, or a broken export."""
    if first[1] != other[1]:
        kinds = {True: "a conversation (lists of messages)", False: "plain strings"}
        raise UserError(
            f"{other[0]}: the row is {kinds[other[1]]}, but {first[0]} is {kinds[first[1]]}; give rows of one schema, or "
            "two files as a blend."
        )


def _unusable(preference: Preference, options: DataOptions) -> str | None:
    if not all(text.strip() for text in preference.texts):
        return "empty"
    if preference.chosen == preference.rejected:
        return "identical"
    if preference.tie and options.tie_policy == "drop":
        return "tie"
    if options.min_score_gap is None:
        return None
    chosen, rejected = preference.scores
    if chosen is None or rejected is None:
        raise UserError(
            f"{preference.where}: no `score_chosen` and `score_rejected`, which --min-score-gap compares; add them or drop "
            "the flag."
        )
    return "low_gap" if not preference.tie and chosen - rejected < options.min_score_gap else None


def _untrainable(pair: EncodedPair, cut: EncodedPair, options: DataOptions) -> str | None:
    if not pair.chosen or not pair.rejected:  # the tokenizer's normalizer removed all of the text
        return "empty"
    if pair.chosen == pair.rejected:
        return "identical"
    shorter, longer = sorted((len(pair.chosen), len(pair.rejected)))
    if options.max_length_ratio is not None and longer > options.max_length_ratio * shorter:
        return "length_ratio"
    return "identical_after_truncation" if cut.chosen == cut.rejected else None


def _pairs(kept: list[tuple[Preference, EncodedPair]]) -> InMemoryPairs:
    lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for _, p in kept], np.int32).reshape(-1, 3)
    ids = chain.from_iterable(part for _, p in kept for part in (p.prompt, p.chosen, p.rejected))
    margins = [0.0 if preference.tie else preference.margin for preference, _ in kept]
    return InMemoryPairs(
        tokens=np.fromiter(ids, np.int32, count=int(lengths.sum())),
        offsets=np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))]),
        prompt_length=lengths[:, 0].copy(),
        chosen_length=lengths[:, 1].copy(),
        rejected_length=lengths[:, 2].copy(),
        weight=np.array([preference.weight for preference, _ in kept], np.float32),
        margin=np.array([np.nan if margin is None else margin for margin in margins], np.float32),
        truncated=np.array([CHOSEN_CUT * p.chosen_cut | REJECTED_CUT * p.rejected_cut for _, p in kept], np.uint8),
    )


def _digest(pairs: InMemoryPairs, i: int) -> int:
    """64 bits of the ids of a pair: of 10 million pairs two that differ meet with a chance of 3 in a million."""
    found = hashlib.blake2b(pairs.tokens[pairs.offsets[i] : pairs.offsets[i + 1]].tobytes(), digest_size=8)
    found.update(np.array([pairs.prompt_length[i], pairs.chosen_length[i]]).tobytes())
    return int.from_bytes(found.digest(), "little")


def with_progress(rows: Iterable[Any], description: str) -> Iterator[Any]:
    """The rows, counted in a bar on stderr."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    # Off a terminal it would leave a line among the errors.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(rows, total=None, description=description)
