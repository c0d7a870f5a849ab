"""The progress bar of long work: bytes, bytes per second and the time left. It shows on a terminal only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from simpo_megatron.checkpoint.transfer.execute import ProgressCallback


@contextmanager
def transfer_bar(label: str, total: int) -> Iterator[ProgressCallback]:
    """Shows a bar of `total` bytes while the block runs; yields the callback that moves it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda size: bar.advance(task, size)
