"""Rows -> tokenized pairs, a block of rows at a time, and counts of what became of every row.

`encode_rows` works on one block. It is a pure function, so several processes may call it. `CrossBlockFilter` sees all
blocks in order and decides what needs more than one block: duplicates, and schemas that change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simpo_megatron.data.counts import DataReport, nothing_left
from simpo_megatron.data.encode import EncodedPair, PairEncoder, truncate
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.pairs import CHOSEN_CUT, REJECTED_CUT, InMemoryPairs, concatenate
from simpo_megatron.data.reading import Row, read_rows, row_blocks, row_number, with_progress
from simpo_megatron.data.schema import Preference, parse_preference
from simpo_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedRows:
    """The pairs kept of some rows, in their order: P of them.

    Attributes:
        pairs: the pairs.
        merges: uint8 [P], responses tokenized alone.
        digest: uint64 [P], of the ids of each pair; None unless duplicates are dropped.
        report: of all rows. Pairs that are kept are not in it: `CrossBlockFilter` counts them.
        first: where the first row stands, and whether it is a conversation; None without rows.
    """

    pairs: InMemoryPairs
    merges: np.ndarray
    digest: np.ndarray | None
    report: DataReport
    first: tuple[str, bool] | None


def encode_rows(rows: Iterable[Row], encoder: PairEncoder) -> EncodedRows:
    """Parses, tokenizes and truncates rows, and drops what `encoder.options` says.

    Raises:
        UserError: a row is in none of the schemas, or cannot be encoded; it is named.
    """
    report, options = DataReport(), encoder.options
    preferences: list[Preference] = []
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
    return EncodedRows(
        pairs=pairs,
        merges=np.array([pair.boundary_merges for _, pair in kept], np.uint8),
        digest=_digests(pairs) if options.duplicates == "drop" else None,
        report=report,
        first=first,
    )


class CrossBlockFilter:
    """Drops duplicates across blocks and sums their reports. Blocks must arrive in order.

    Attributes:
        report: of all blocks so far, the pairs that are kept included.
    """

    def __init__(self) -> None:
        self.report = DataReport()
        self._seen: set[int] = set()
        self._first: tuple[str, bool] | None = None

    def __call__(self, encoded: EncodedRows) -> EncodedRows:
        """The block without pairs that an earlier row holds, where it has digests.

        Raises:
            UserError: the schema is another than that of earlier blocks.
        """
        if encoded.first is not None:
            self._first = self._first or encoded.first
            check_schema(self._first, encoded.first)
        if encoded.digest is not None:
            encoded = self._without_duplicates(encoded, encoded.digest)
        self.report.add(encoded.report)
        columns = encoded.pairs.columns
        kept = DataReport(
            pairs=len(encoded.pairs),
            ties_kept=int((columns["score_chosen"] == columns["score_rejected"]).sum()),
            truncated_prompts=int(columns["prompt_cut"].sum()),
            truncated_chosen=int((columns["truncated"] & CHOSEN_CUT != 0).sum()),
            truncated_rejected=int((columns["truncated"] & REJECTED_CUT != 0).sum()),
            boundary_merges=int(encoded.merges.sum()),
        )
        self.report.add(kept)
        return encoded

    def _without_duplicates(self, encoded: EncodedRows, digest: np.ndarray) -> EncodedRows:
        keep = np.ones(len(digest), bool)
        for i, value in enumerate(digest.tolist()):
            keep[i] = value not in self._seen
            self._seen.add(value)
        encoded.report.dropped["duplicate"] += int((~keep).sum())
        return replace(encoded, pairs=encoded.pairs.take(keep), merges=encoded.merges[keep], digest=digest[keep])


def load_preferences(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    eos_token_ids: Iterable[int] = (),
    progress: bool = False,
) -> tuple[InMemoryPairs, DataReport]:
    """Reads and tokenizes the pairs of a source, in its order.

    Args:
        path: the source, see `reading.py`.
        tokenizer: of the model.
        options: how to tokenize and to truncate, and which pairs to keep.
        eos_token_ids: ids that end a response besides tokenizer.eos_token_id.
        progress: show a bar on stderr.

    Returns:
        The pairs, and the counts of what became of the rows.

    Raises:
        UserError: the source or a row cannot be read, or no pair is left.
    """
    encoder, cross_block_filter = PairEncoder(tokenizer, options, eos_token_ids), CrossBlockFilter()
    rows = read_rows(path)
    shown = with_progress(rows, f"Tokenizing {path}") if progress else rows
    parts = [cross_block_filter(encode_rows(block, encoder)).pairs for block in row_blocks(shown)]
    report = cross_block_filter.report
    if not report.pairs:
        raise nothing_left(path, report)
    return concatenate(parts), report


def check_schema(first: tuple[str, bool], other: tuple[str, bool]) -> None:
    """Compares the schemas of two rows; each is given by its place and whether it is a conversation.

    Raises:
        UserError: one is a conversation and the other is not: the file mixes two sources, or its export is broken.
    """
    if first[1] != other[1]:
        kinds = {True: "a conversation (lists of messages)", False: "plain strings"}
        raise UserError(
            f"{other[0]}: the row is {kinds[other[1]]}, but {first[0]} is {kinds[first[1]]}; give rows of one "
            "schema, or two files as a blend"
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
            f"{preference.where}: no `score_chosen` and `score_rejected`, which --min-score-gap compares; add them or "
            "drop the flag"
        )
    return "low_gap" if not preference.tie and chosen - rejected < options.min_score_gap else None


def _untrainable(pair: EncodedPair, cut: EncodedPair, options: DataOptions) -> str | None:
    if not pair.chosen or not pair.rejected:  # the tokenizer's normalizer removed the whole text
        return "empty"
    if pair.chosen == pair.rejected:
        return "identical"
    shorter, longer = sorted((len(pair.chosen), len(pair.rejected)))
    if options.max_length_ratio is not None and longer > options.max_length_ratio * shorter:
        return "length_ratio"
    return "identical_after_truncation" if cut.chosen == cut.rejected else None


def _pairs(kept: list[tuple[Preference, EncodedPair]]) -> InMemoryPairs:
    """Pairs in memory. A column of `pairs.COLUMNS` that is not filled here holds its default."""
    preferences, pairs = [preference for preference, _ in kept], [pair for _, pair in kept]
    lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs], np.int32).reshape(-1, 3)
    ids = chain.from_iterable(part for p in pairs for part in (p.prompt, p.chosen, p.rejected))
    columns = {
        "row": [row_number(p.where) for p in preferences],
        "weight": [p.weight for p in preferences],
        "margin": [_or_nan(0.0 if p.tie else p.margin) for p in preferences],
        "score_chosen": [_or_nan(p.scores[0]) for p in preferences],
        "score_rejected": [_or_nan(p.scores[1]) for p in preferences],
        "truncated": [CHOSEN_CUT * p.chosen_cut | REJECTED_CUT * p.rejected_cut for p in pairs],
        "prompt_cut": [p.prompt_cut for p in pairs],
        "ref_chosen_logps": [_or_nan(p.reference_logps[0]) for p in preferences],
        "ref_rejected_logps": [_or_nan(p.reference_logps[1]) for p in preferences],
    }
    return InMemoryPairs.build(np.fromiter(ids, np.int32, count=int(lengths.sum())), lengths, columns)


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


def _digests(pairs: InMemoryPairs) -> np.ndarray:
    """uint64 [P]. Among 10 million pairs, two different ones have the same digest with a chance of 3 in a million."""
    found = np.empty(len(pairs), np.uint64)
    for i in range(len(pairs)):
        digest = hashlib.blake2b(pairs.tokens[pairs.offsets[i] : pairs.offsets[i + 1]].tobytes(), digest_size=8)
        digest.update(np.array([pairs.prompt_length[i], pairs.chosen_length[i]]).tobytes())
        found[i] = int.from_bytes(digest.digest(), "little")
    return found
