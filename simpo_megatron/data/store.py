"""All pairs of a file as a few flat arrays, and the report of what became of its rows."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.reading import read_rows
from simpo_megatron.data.schema import Preference, parse_preference
from simpo_megatron.data.tokenize import EncodedPair, PairEncoder, truncate
from simpo_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHOSEN_CUT, REJECTED_CUT = 1, 2
_CHUNK = 1000  # rows held as Python objects at a time
_DROPPED = {
    "empty": "with an empty response",
    "identical": "with identical responses",
    "tie": "with equal scores",
    "identical_after_truncation": "identical after truncation",
}


@dataclass(frozen=True, eq=False)
class PairStore:
    """P pairs. The tokens of pair i are tokens[offsets[i] : offsets[i + 1]]: prompt, chosen, rejected back to back."""

    tokens: np.ndarray
    """int32 [sum of lengths]"""
    offsets: np.ndarray
    """int64 [P + 1]"""
    prompt_length: np.ndarray
    """int32 [P]"""
    chosen_length: np.ndarray
    """int32 [P], EOS included"""
    rejected_length: np.ndarray
    """int32 [P], EOS included"""
    weight: np.ndarray
    """float32 [P]"""
    margin: np.ndarray
    """float32 [P]; NaN: the pair uses gamma"""
    truncated: np.ndarray
    """uint8 [P]; CHOSEN_CUT and REJECTED_CUT where a response was cut and lost its EOS"""

    def __len__(self) -> int:
        return len(self.prompt_length)

    @property
    def pair_tokens(self) -> np.ndarray:
        """int64 [P]: tokens of each pair once packed, with the prompt before both responses."""
        return 2 * self.prompt_length.astype(np.int64) + self.chosen_length + self.rejected_length

    def pair(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views (prompt, chosen, rejected) of pair i, int32."""
        tokens = self.tokens[self.offsets[i] : self.offsets[i + 1]]
        chosen_at = self.prompt_length[i]
        rejected_at = chosen_at + self.chosen_length[i]
        return tokens[:chosen_at], tokens[chosen_at:rejected_at], tokens[rejected_at:]

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields by name, for sending to other ranks."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "PairStore":
        """The store whose `arrays()` these are."""
        return cls(**arrays)


@dataclass
class DataReport:
    """What became of the rows of a file. Truncation and merges are counted over the pairs that are kept."""

    rows: int = 0
    pairs: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_DROPPED, 0))
    """Rows by the reason: empty, identical, tie, identical_after_truncation."""
    ties_kept: int = 0
    truncated_prompts: int = 0
    truncated_chosen: int = 0
    truncated_rejected: int = 0
    boundary_merges: int = 0
    """Responses tokenized on their own because a token straddled their boundary with the prompt."""

    def summary(self, path: str | Path) -> str:
        """One line on rows and pairs and, when there is something to say, one on cuts, ties and merges."""
        drops = self._drops()
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

    def _drops(self) -> str:
        return ", ".join(f"{count} {_DROPPED[reason]}" for reason, count in self.dropped.items() if count)


def load_preferences(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    options: DataOptions,
    *,
    eos_token_ids: Iterable[int] = (),
    progress: bool = False,
) -> tuple[PairStore, DataReport]:
    """Read and tokenize the preference pairs of a file, in its order.

    `eos_token_ids` are ids that end a response besides tokenizer.eos_token_id. `progress` shows a bar on stderr.
    Raises UserError for a file or row that cannot be read, and when no pair is left.
    """
    encoder = PairEncoder(tokenizer, options, eos_token_ids)
    report = DataReport()
    parts: list[PairStore] = []
    rows = read_rows(path)
    for chunk in _chunks(_with_progress(rows, f"Tokenizing {path}") if progress else rows):
        preferences = []
        for where, row in chunk:
            preference = parse_preference(row, where)
            report.rows += 1
            reason = _unusable(preference, options)
            if reason:
                report.dropped[reason] += 1
            else:
                preferences.append(preference)
        kept = []
        for preference, pair in zip(preferences, encoder.encode(preferences), strict=True):
            cut = truncate(pair, options, encoder.bos)
            reason = _untrainable(pair, cut)
            if reason:
                report.dropped[reason] += 1
            else:
                kept.append((preference, cut))
                _count(report, preference, cut)
        parts.append(_store(kept))
    if not report.pairs:
        raise UserError(f"{path}: no pair is left of {report.rows} rows: dropped {report._drops()}; mend the data.")
    return _concatenate(parts), report


def _unusable(preference: Preference, options: DataOptions) -> str | None:
    if not all(text.strip() for text in preference.texts):
        return "empty"
    if preference.chosen == preference.rejected:
        return "identical"
    return "tie" if preference.tie and options.tie_policy == "drop" else None


def _untrainable(pair: EncodedPair, cut: EncodedPair) -> str | None:
    if not pair.chosen or not pair.rejected:  # the tokenizer's normalizer removed all of the text
        return "empty"
    if pair.chosen == pair.rejected:
        return "identical"
    return "identical_after_truncation" if cut.chosen == cut.rejected else None


def _count(report: DataReport, preference: Preference, pair: EncodedPair) -> None:
    report.pairs += 1
    report.ties_kept += preference.tie
    report.truncated_prompts += pair.prompt_cut
    report.truncated_chosen += pair.chosen_cut
    report.truncated_rejected += pair.rejected_cut
    report.boundary_merges += pair.boundary_merges


def _store(kept: list[tuple[Preference, EncodedPair]]) -> PairStore:
    lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for _, p in kept], np.int32).reshape(-1, 3)
    tokens = [np.array(ids, np.int32) for _, p in kept for ids in (p.prompt, p.chosen, p.rejected)]
    margins = [0.0 if preference.tie else preference.margin for preference, _ in kept]
    return PairStore(
        tokens=np.concatenate([np.empty(0, np.int32), *tokens]),
        offsets=np.concatenate([[0], np.cumsum(lengths.sum(axis=1, dtype=np.int64))]),
        prompt_length=lengths[:, 0].copy(),
        chosen_length=lengths[:, 1].copy(),
        rejected_length=lengths[:, 2].copy(),
        weight=np.array([preference.weight for preference, _ in kept], np.float32),
        margin=np.array([np.nan if margin is None else margin for margin in margins], np.float32),
        truncated=np.array([CHOSEN_CUT * p.chosen_cut | REJECTED_CUT * p.rejected_cut for _, p in kept], np.uint8),
    )


def _concatenate(parts: list[PairStore]) -> PairStore:
    arrays = {name: np.concatenate([part.arrays()[name] for part in parts]) for name in parts[0].arrays()}
    starts = np.cumsum([0, *(len(part.tokens) for part in parts)])
    shifted = [part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
    arrays["offsets"] = np.concatenate([np.zeros(1, np.int64), *shifted])
    return PairStore.from_arrays(arrays)


def _chunks(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _with_progress(rows: Iterable[Any], description: str) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    # Off a terminal it would leave a line among the errors.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(rows, total=None, description=description)
