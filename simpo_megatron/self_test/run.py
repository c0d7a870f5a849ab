"""Runs rows one after the other. A row that fails or crashes is a FAILED row, and the next one runs.

    with benches("cpu", save=None) as bench:
        found = run_rows(chosen_rows(bench), bench)

After each row all ranks agree on what they found (`ranks.py`). If a rank does not answer, rank 0 prints the table so
far and the program ends with exit code 1.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from simpo_megatron import compat
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from simpo_megatron.parallel.together import raise_on_all_ranks
from simpo_megatron.self_test.guard import Guard, Limits
from simpo_megatron.self_test.models import SEED, layout_config, tiny_checkpoint
from simpo_megatron.self_test.ranks import NoAnswer, Ranks, leave_layout
from simpo_megatron.self_test.rows import Bench, Outcome, Row, worst
from simpo_megatron.trainer.distributed import initialize, resolve_device
from simpo_megatron.trainer.setup import build_transformer_config

LIMITS = {"cpu": Limits(row=150, after_crash=150), "cuda": Limits(row=300, after_crash=30)}
ADVICE = "look at what the other ranks have printed"
AGREE_SECONDS = 75  # for the other ranks to end a row


@dataclass
class Found:
    """A row and what it found.

    Attributes:
        name: of the row.
        outcome: the worst of all ranks.
        seconds: on this rank.
    """

    name: str
    outcome: Outcome
    seconds: float = 0.0


@dataclass
class Journal:
    """The rows so far. `finish` is called once: at the end, or where the ranks no longer answer each other.

    Attributes:
        found: the rows so far.
        started: prints that a row has begun.
        ended: prints what it found.
        finish: prints the table; rank 0 alone does something.
    """

    found: list[Found] = field(default_factory=list)
    started: Callable[[Row], None] = lambda row: None
    ended: Callable[[Found], None] = lambda found: None
    finish: Callable[[list[Found]], None] = lambda found: None

    def add(self, found: Found) -> None:
        """Takes a row that has ended."""
        self.found.append(found)
        self.ended(found)


@contextlib.contextmanager
def benches(device: str, save: Path | None) -> Iterator[Bench]:
    """Joins the processes, and makes the folders that the rows need. They are removed when the block ends.

    Args:
        device: --device.
        save: --save; None for a temporary folder of rank 0.

    Raises:
        UserError: --device cuda without a GPU, or a folder cannot be made.
    """
    device = resolve_device(device)
    if device == "cpu":
        torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        models = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="simpo_self_test.")))
        alone = Bench(device, 0, 1, models, models)
        path = tiny_checkpoint(models, "llama")
        config = layout_config(alone, path, {})
        transformer = build_transformer_config(config, read_hf_checkpoint(path))
        if not dist.is_initialized():
            stack.callback(_leave)
        initialize(transformer, config.parallel.distributed_timeout_minutes, device, SEED)
        leave_layout()
        made: list[str] = [""]
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                try:
                    made[0] = tempfile.mkdtemp(prefix="self_test.", dir=save)
                except OSError as error:
                    raise UserError(f"--save {save} cannot be used: {error.strerror}; give another folder") from error
        dist.broadcast_object_list(made, src=0)
        if dist.get_rank() == 0:
            stack.callback(shutil.rmtree, made[0], ignore_errors=True)
        layers = ("local", "transformer_engine") if compat.have_transformer_engine() else ("local",)
        yield Bench(device, dist.get_rank(), dist.get_world_size(), models, Path(made[0]), layers)


def _leave() -> None:
    with contextlib.suppress(Exception):  # ranks that no longer answer are left
        dist.destroy_process_group()


def run_rows(rows: Sequence[Row], bench: Bench, journal: Journal | None = None) -> list[Found]:
    """Runs rows in their order. Every rank calls it with the same rows.

    Args:
        rows: to run.
        bench: from `benches`.
        journal: gets each row; None for one that prints nothing.

    Returns:
        What was found; the same on every rank. If a rank no longer answers, the last one says so and the rows after it
        are absent.
    """
    journal = journal or Journal()
    ranks = Ranks(timedelta(seconds=AGREE_SECONDS))
    for row in rows:
        if missing := row.missing(bench):
            journal.add(Found(row.name, Outcome("not here", missing)))
            continue
        journal.started(row)
        started = time.perf_counter()
        end = partial(_give_up, row, journal)
        try:
            with Guard(LIMITS[bench.device], ranks.crash, end):
                outcome = _run(row, bench, ranks)
        except NoAnswer as error:
            outcome = Outcome("FAILED", f"a rank no longer answers: {ranks.crash() or error}", ADVICE)
            journal.add(Found(row.name, outcome, time.perf_counter() - started))
            break
        except BaseException:  # SIGTERM of torchrun after another rank has ended, or the keyboard
            journal.add(Found(row.name, Outcome("FAILED", "stopped before it ended", ADVICE)))
            raise
        journal.add(Found(row.name, outcome, time.perf_counter() - started))
    return journal.found


def _give_up(row: Row, journal: Journal, reason: str) -> None:
    """Ends the process from a thread: the main thread is stuck in a collective or on the device."""
    advice = "see where the ranks wait with py-spy dump; run this row alone with --only"
    journal.add(Found(row.name, Outcome("FAILED", f"the ranks no longer answer: {reason}", advice)))
    journal.finish(journal.found)
    sys.stdout.flush()
    os._exit(1)


def _run(row: Row, bench: Bench, ranks: Ranks) -> Outcome:
    """Runs a row on this rank, and agrees on the outcome with the others.

    Raises:
        NoAnswer: a rank does not answer.
    """
    outcome, error = None, None
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            outcome = row.function(bench)
    except Exception as raised:
        error = _one_line(raised)
    if error is not None:  # here nothing refers any more to the frames of the row, and so to its groups
        ranks.announce_crash(f"rank {bench.rank}: {error}")
    everyone = ranks.agree((outcome, error))
    errors = [(rank, text) for rank, (_, text) in enumerate(everyone) if text]
    if not errors:
        return worst([of_rank for of_rank, _ in everyone])
    ranks.restart()
    # A rank that was left waiting has an error about its collective: the error that says more is that of another rank.
    own = [entry for entry in errors if not _is_of_a_collective(entry[1])] or errors
    rank, text = own[0]
    on = f"{len(own)} ranks" if len(own) > 1 else f"rank {rank}"
    return Outcome("FAILED", f"{on}: {text}", row.advice)


def _one_line(error: Exception) -> str:
    """The kind of an error, its message and where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"


def _is_of_a_collective(text: str) -> bool:
    return any(word in text for word in ("gloo/transport", "Connection closed", "Timed out", "NCCL"))
