"""What a run reports: lines and a progress bar on the terminal, `SAVE/metrics.jsonl`, TensorBoard, Weights & Biases.

Rank 0 alone writes. On the other ranks every method does nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import timedelta
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


def print_line(text: str) -> None:
    """Prints a line on rank 0."""
    if dist.get_rank() == 0:
        _console().print(text, markup=False)


def _console() -> Console:
    return Console(file=sys.stdout, soft_wrap=True, highlight=False)


class Logger:
    """Reports metrics and messages.

    Args:
        config: of the run; it names the files and services.
        total_steps: of the whole run, for the progress bar.
        first_step: the step that the run starts from; records of later steps are removed from metrics.jsonl.

    Raises:
        UserError: a file cannot be written, or Weights & Biases cannot start.
    """

    def __init__(self, config: Config, total_steps: int, first_step: int) -> None:
        self.enabled = dist.get_rank() == 0
        if not self.enabled:
            return
        self.console = _console()
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
            disable=not self.console.is_interactive,  # else it would print an empty line at the end
        )
        self.task = self.progress.add_task("", total=total_steps, completed=first_step)
        try:
            self.metrics_file = _open_metrics_file(config.checkpoint.save, first_step)
            self.tensorboard = _tensorboard_writer(config)
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be written: {error.strerror}; make it writable, or choose another --save"
            ) from error
        self.wandb = _start_wandb(config)

    def start(self) -> None:
        """Shows the progress bar."""
        if self.enabled:
            self.progress.start()

    def message(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.enabled:
            self.console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Moves the progress bar to a step."""
        if self.enabled:
            self.progress.update(self.task, completed=step)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of a step, under their full names, to metrics.jsonl, TensorBoard and Weights & Biases."""
        if not self.enabled:
            return
        if self.metrics_file is not None:
            self.metrics_file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.metrics_file.flush()
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def step_line(self, step: int, metrics: dict[str, float]) -> None:
        """Prints the line of a training step."""
        if self.enabled:
            left = timedelta(seconds=round(metrics["seconds/left"])) if "seconds/left" in metrics else None
            self.message(
                f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}  {_readable(metrics, STEP_COLUMNS)}"
                + ("" if left is None else f"  left {left}")
            )

    def eval_line(self, step: int, metrics: dict[str, float]) -> None:
        """Prints the line of an evaluation."""
        if self.enabled:
            self.message(f"eval at step {step}  {_readable(metrics, EVAL_COLUMNS)}")

    def summary(self, evaluations: dict[int, dict[str, float]]) -> None:
        """Prints a table of the metrics of the held-out pairs at the first and the last evaluation.

        Args:
            evaluations: by step, in order. A resumed run begins with the first one after the resume.
        """
        if not self.enabled or not evaluations:
            return
        first, last = next(iter(evaluations)), next(reversed(evaluations))
        shown = {"before" if first == 0 else f"step {first}": evaluations[first]} if first != last else {}
        shown["after"] = evaluations[last]
        table = Table("held-out pairs", *shown)
        for name in evaluations[last]:
            table.add_row(name, *(f"{metrics[name]:.4f}" for metrics in shown.values()))
        self.console.print(table)

    def close(self) -> None:
        """Removes the progress bar and closes the files."""
        if not self.enabled:
            return
        self.progress.stop()
        for sink in (self.metrics_file, self.tensorboard):
            if sink is not None:
                sink.close()
        if self.wandb is not None:
            self.wandb.finish()


# Metric, its short name on the terminal, and its format.
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
    ("tflops_per_gpu", "TFLOP/s", ".3g"),
    ("mfu", "MFU", ".1%"),
    ("memory_gib", "GiB", ".1f"),
    ("memory_reserved_gib", "reserved", ".1f"),
)


def _readable(metrics: dict[str, float], columns: Iterable[tuple[str, str, str]]) -> str:
    return "  ".join(f"{label} {metrics[name]:{form}}" for name, label, form in columns if name in metrics)


def _open_metrics_file(save: Path | None, first_step: int) -> TextIO | None:
    """Opens SAVE/metrics.jsonl to append to it; None without --save."""
    if save is None:
        return None
    save.mkdir(parents=True, exist_ok=True)
    path = save / "metrics.jsonl"
    _remove_records_after(path, first_step)
    return path.open("a", encoding="utf-8")


def _tensorboard_writer(config: Config) -> Any:
    save = config.checkpoint.save
    directory = config.log.tensorboard_dir or (save / "tensorboard" if save else None)
    if directory is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory))


def _start_wandb(config: Config) -> Any:
    if config.log.wandb_project is None:
        return None
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb-project needs wandb; install it with pip install 'simpo-megatron[wandb]'") from error
    try:
        return wandb.init(project=config.log.wandb_project, config=flat(config))
    except wandb.Error as error:
        raise UserError(f"--wandb-project {config.log.wandb_project}: {error}") from error


def _remove_records_after(path: Path, step: int) -> None:
    """Removes the records that a killed run wrote after the checkpoint it now resumes from."""
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
