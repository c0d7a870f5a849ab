"""Counts of what became of the rows of a source: kept, dropped and why, cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from simpo_megatron.errors import UserError

_DROPPED = {  # why a row is dropped, and the words for it
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
    """Counts of what became of the rows of a source.

    Attributes:
        rows: read.
        pairs: kept. The counts below, but for `dropped`, are of these pairs alone.
        dropped: rows, by reason.
        ties_kept: pairs with equal scores.
        truncated_prompts: prompts that were cut.
        truncated_chosen: chosen responses that were cut.
        truncated_rejected: rejected responses that were cut.
        boundary_merges: responses tokenized alone, because one token spanned their boundary with the prompt.
    """

    rows: int = 0
    pairs: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_DROPPED, 0))
    ties_kept: int = 0
    truncated_prompts: int = 0
    truncated_chosen: int = 0
    truncated_rejected: int = 0
    boundary_merges: int = 0

    def summary(self, path: str | Path) -> str:
        """One line on rows and pairs, and one on cuts, ties and merges where there are any; `path` is the source."""
        drops = self.drops()
        lines = [f"{path}: {self.pairs} pairs of {self.rows} rows" + (f"; dropped {drops}" if drops else "")]
        notes = {
            "prompts cut": self.truncated_prompts,
            "chosen responses cut (no EOS)": self.truncated_chosen,
            "rejected responses cut (no EOS)": self.truncated_rejected,
            "ties kept with margin 0": self.ties_kept,
            f"of {2 * self.pairs} responses tokenized apart from their prompt (tools/inspect_data.py says whether that "
            "is a fault)": self.boundary_merges,
        }
        if any(notes.values()):
            lines.append("  " + ", ".join(f"{count} {note}" for note, count in notes.items() if count))
        return "\n".join(lines)

    def drops(self) -> str:
        """The rows that were dropped, by reason, as words; empty where none was."""
        return ", ".join(f"{count} {_DROPPED[reason]}" for reason, count in self.dropped.items() if count)

    def add(self, other: DataReport) -> None:
        """Adds the counts of `other`."""
        for name, value in vars(other).items():
            if name == "dropped":
                for reason, count in value.items():
                    self.dropped[reason] += count
            else:
                setattr(self, name, getattr(self, name) + value)


def nothing_left(path: str | Path, report: DataReport) -> UserError:
    """The error for a source without a pair that is kept."""
    return UserError(f"{path}: no pair is left of {report.rows} rows: dropped {report.drops()}; fix the data")
