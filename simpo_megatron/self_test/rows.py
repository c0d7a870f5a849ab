"""A row of the table: its name says what it proves; it has a function that runs on every rank.

    Row("gradients: TP 2 + SP", partial(check, settings), processes=2)

The function returns an `Outcome` on the ranks that found something, and None on the others. An exception is a row that
failed. `registry.py` lists the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Result = Literal["proved", "slow", "FAILED", "not here"]
RESULTS: tuple[Result, ...] = ("not here", "proved", "slow", "FAILED")  # the worst last


@dataclass(frozen=True)
class Bench:
    """Where the rows run; the same on every rank, but for `rank` and `models`.

    Attributes:
        device: "cpu" or "cuda".
        rank: of this process.
        processes: of the test.
        models: a folder of this rank alone, for tiny models.
        save: a folder that all ranks should see, for checkpoints; rows write below it.
        implementations: values of --transformer-impl that are installed.
    """

    device: str
    rank: int
    processes: int
    models: Path
    save: Path
    implementations: tuple[str, ...] = ("local",)

    @property
    def on_gpu(self) -> bool:
        """Whether the rows run on GPUs."""
        return self.device == "cuda"


@dataclass(frozen=True)
class Outcome:
    """What a row found.

    Attributes:
        result: in the table.
        figure: the number that counts, or one line of an error.
        advice: what to do; empty where nothing is to be done.
        measured: numbers for the report and the CSV file, by name with the unit in it.
    """

    result: Result
    figure: str = ""
    advice: str = ""
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: what it proves.
        function: runs on every rank.
        processes: it needs a multiple of so many.
        gpu: it needs GPUs.
        advice: what to do if it fails without advice of its own.
    """

    name: str
    function: Callable[[Bench], Outcome | None]
    processes: int = 1
    gpu: bool = False
    advice: str = ""

    def missing(self, bench: Bench) -> str | None:
        """What the row needs and `bench` lacks; None if it can run."""
        if self.gpu and not bench.on_gpu:
            return "needs a GPU"
        if bench.processes % self.processes:
            return f"needs a multiple of {self.processes} processes"
        return None


def judge(error: float, allowed: float, what: str, advice: str) -> Outcome:
    """The outcome of a comparison; a NaN fails.

    Args:
        error: relative.
        allowed: the largest that passes.
        what: is compared.
        advice: what to do if it does not pass.
    """
    figure = f"{what} {error:.1e}, allowed {allowed:.0e}"
    return Outcome("proved", figure) if error <= allowed else Outcome("FAILED", figure, advice)


def worst(outcomes: Sequence[Outcome | None]) -> Outcome:
    """The worst outcome of the ranks; that of the first rank among equals."""
    found = [outcome for outcome in outcomes if outcome is not None]
    return max(found, key=lambda outcome: RESULTS.index(outcome.result)) if found else Outcome("proved")
