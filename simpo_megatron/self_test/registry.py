"""All rows, in the order of the table. A new feature adds its function, which yields its rows, to `SECTIONS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from simpo_megatron.errors import UserError
from simpo_megatron.self_test.checkpoints import checkpoint_rows
from simpo_megatron.self_test.environment import environment_rows
from simpo_megatron.self_test.family import family_rows
from simpo_megatron.self_test.gradients import gradient_rows
from simpo_megatron.self_test.heads import head_rows
from simpo_megatron.self_test.rows import Bench, Row
from simpo_megatron.self_test.speed import speed_rows

SECTIONS: tuple[Callable[[Bench], Iterable[Row]], ...] = (
    environment_rows,
    head_rows,
    gradient_rows,
    checkpoint_rows,
    speed_rows,
)


def all_rows(bench: Bench) -> list[Row]:
    """Every row of the table on this bench."""
    return [row for section in SECTIONS for row in section(bench)]


def chosen_rows(bench: Bench, only: Sequence[str] = (), checkpoint: Path | None = None) -> list[Row]:
    """The rows whose name holds one of the texts of --only; all without --only.

    Args:
        bench: where they run.
        only: the texts.
        checkpoint: a model whose rows are meant; None for those of the machine.

    Raises:
        UserError: a text is in no name, or the checkpoint cannot be read.
    """
    rows = all_rows(bench) if checkpoint is None else list(family_rows(bench, checkpoint))
    for text in only:
        if not any(text in row.name for row in rows):
            sections = sorted({row.name.partition(":")[0] for row in rows})
            raise UserError(f"--only {text!r} is in the name of no row; names begin with {', '.join(sections)}")
    return [row for row in rows if not only or any(text in row.name for text in only)]
