"""Where the numbers go: one line a step under a progress bar, `SAVE/metrics.jsonl`, TensorBoard, Weights & Biases.

Rank 0 alone writes; on the other ranks every method does nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from simpo_megatron.config.arguments import flat
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write


class Logger:
    """Writes rows and lines.

    Raises a UserError where a file cannot be written or wandb cannot start.

    Args:
        config: where to.
        total_steps, first_step: of the progress bar; a resumed run starts in the middle.
    """

    def __init__(self, config: Config, total_steps: int, first_step: int) -> None:
        self.enabled = dist.get_rank() == 0
        if not self.enabled:
            return
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self.total_steps = total_steps
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task = self.progress.add_task("", total=total_steps, completed=first_step)
        try:
            self.rows = self._rows(config.checkpoint.save, first_step)
            self.tensorboard = self._tensorboard(config)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be written: {error.strerror}; mend it, or choose another --save"
            ) from error
        self.wandb = self._wandb(config)

    def _rows(self, save: Path | None, first_step: int) -> TextIO | None:
        if save is None:
            return None
        save.mkdir(parents=True, exist_ok=True)
        path = save / "metrics.jsonl"
        _drop_rows_after(path, first_step)
        return path.open("a", encoding="utf-8")

    def _tensorboard(self, config: Config) -> Any:
        save = config.checkpoint.save
        directory = config.log.tensorboard_dir or (save / "tensorboard" if save else None)
        if directory is None:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(directory))

    def _wandb(self, config: Config) -> Any:
        if config.log.wandb_project is None:
            return None
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb-project needs wandb: pip install 'simpo-megatron[wandb]'") from error
        try:
            return wandb.init(project=config.log.wandb_project, config=flat(config))
        except wandb.Error as error:
            raise UserError(f"--wandb-project {config.log.wandb_project}: {error}") from error

    def start(self) -> None:
        """Shows the progress bar."""
        if self.enabled:
            self.progress.start()

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self.enabled:
            self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Moves the bar to a step."""
        if self.enabled:
            self.progress.update(self.task, completed=step)

    def row(self, step: int, metrics: dict[str, float]) -> None:
        """One row for machines: `step` and the metrics, to every file."""
        if not self.enabled:
            return
        if self.rows is not None:
            self.rows.write(json.dumps({"step": step, **metrics}) + "\n")
            self.rows.flush()
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def step_line(self, step: int, metrics: dict[str, float]) -> None:
        """The readable line of a training step."""
        if self.enabled:
            self.say(
                f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  {_readable(metrics, STEP_COLUMNS)}"
            )

    def eval_line(self, step: int, metrics: dict[str, float]) -> None:
        """The readable line of an evaluation."""
        if self.enabled:
            self.say(f"eval at step {step}  {_readable(metrics, EVAL_COLUMNS)}")

    def summary(self, before: dict[str, float], after: dict[str, float]) -> None:
        """A table of the held-out metrics before and after training."""
        if not self.enabled or not before:
            return
        table = Table("held-out pairs", "before", "after")
        for name, value in before.items():
            table.add_row(name.removeprefix("eval/"), f"{value:.4f}", f"{after[name]:.4f}")
        self.console.print(table)

    def close(self) -> None:
        """Ends the bar and closes the files."""
        if not self.enabled:
            return
        self.progress.stop()
        for sink in (self.rows, self.tensorboard):
            if sink is not None:
                sink.close()
        if self.wandb is not None:
            self.wandb.finish()


EVAL_COLUMNS = (
    ("loss", "loss", ".4f"),
    ("rewards/margins", "margin", "+.4f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("nll_loss", "nll", ".4f"),
)
STEP_COLUMNS = (
    *EVAL_COLUMNS[:3],
    ("grad_norm", "grad", ".3f"),
    ("learning_rate", "lr", ".2e"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("memory_gib", "GiB", ".1f"),
)


def _readable(metrics: dict[str, float], columns: Iterable[tuple[str, str, str]]) -> str:
    return "  ".join(f"{label} {metrics[name]:{form}}" for name, label, form in columns if name in metrics)


def _drop_rows_after(path: Path, step: int) -> None:
    """Takes back what a killed run logged beyond the checkpoint it resumes from."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # the last line of a killed process
            continue
    atomic_write(path, "".join(kept))
