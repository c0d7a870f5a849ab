"""Kills a training run at random moments, resumes it each time, and checks that nothing is lost. It runs on a CPU.

    python tools/crash_test.py --folder /tmp/crash --trials 100 --processes 2 -- \
        --hf-checkpoint MODEL --train-data pairs.jsonl --train-iters 8 --save-interval 2 --keep-last 1 --async-save

What follows `--` are flags of training, without --save and --load. The run is made once without a fault. Then it is
started again and again with one fault each:

* kill: SIGKILL to all ranks; processes that write a checkpoint live on;
* term: SIGTERM to all ranks;
* full: a full disk, from a moment on.

The moment is a random one of the moments of the run: an optimizer step, or a file of --save that is opened, renamed or
deleted, by a rank or by a process that writes its checkpoint. After each fault every checkpoint that looks complete
must be complete, and the tracker must name one. When the run comes to its end, its losses and gradient norms must be
those of the run without a fault, bit for bit. At the end no process of a run may be left.

Exit code: 0 if all holds, 1 if not, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import functools
import importlib
import json
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from simpo_megatron import compat
from simpo_megatron.checkpoint.folder import latest_step
from simpo_megatron.checkpoint.formats.torch_dist_writer import FORMAT_FILE
from simpo_megatron.errors import UserError
from simpo_megatron.program import Parser, exit_code
from simpo_megatron.settings import path_value

FAULTS = ("kill", "term", "full")
STEP = "crash_test.step"
MOMENTS = {STEP, "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
_SET_CHILD_SUBREAPER = 36  # of prctl
PATIENCE = 30.0  # seconds that the other ranks get after one has ended


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run.

    Attributes:
        kind: one of `FAULTS`.
        rank: in which process, or in a process that it has forked.
        moment: at which of its moments; counted from 1.
    """

    kind: str
    rank: int
    moment: int


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="crash_test.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=path_value, required=True, help="new folder for runs and their output")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="faults (default 20)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="ranks of the run (default 2)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the faults and moments (default 0)")
    parser.add_argument("training", nargs="*", metavar="FLAG", help="after --: flags of training")
    return parser


class _Moments:
    """Counts the moments of a process, by Python's audit events, and lets the fault happen. Forks go on counting."""

    def __init__(self, save: Path, fault: Fault | None, pids: Any) -> None:
        self.save, self.fault, self.pids = str(save), fault, pids
        self.count, self.full = 0, False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """The audit hook."""
        if event not in MOMENTS or (event != STEP and not self._is_ours(event, args)):
            return
        self.count += 1
        if self.fault is None or self.count < self.fault.moment:
            return
        if self.fault.kind == "full":
            self.full = True
            writes = event == "os.mkdir" or (event == "open" and _writes(*args[1:3]))
            if writes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        elif self.count == self.fault.moment:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL if self.fault.kind == "kill" else signal.SIGTERM)

    def _is_ours(self, event: str, args: tuple[Any, ...]) -> bool:
        relative = event in ("os.remove", "os.rmdir") and args[-1] != -1  # of shutil.rmtree
        return relative or str(args[0]).startswith(self.save)


def _writes(mode: str | None, flags: int) -> bool:
    return any(letter in mode for letter in "wax+") if mode else bool(flags & (os.O_WRONLY | os.O_RDWR))


def _rank(rank: int, port: int, argv: list[str], save: Path, fault: Fault | None, pids: Any, moments: Any) -> None:
    """One rank of a run, in a forked process."""
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from simpo_megatron.train import main
    from simpo_megatron.trainer.engine import Engine

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(pids))}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with Path(f"{save}.rank{rank}.log").open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    hook = _Moments(save, fault if fault is not None and fault.rank == rank else None, pids)
    take_step, write_item = Engine.train_step, filesystem_async._write_item

    def audited_step(self: Engine, batch: Any) -> dict[str, float]:
        sys.audit(STEP)
        return take_step(self, batch)

    @functools.wraps(write_item)  # Megatron looks at the signature
    def write_unless_full(*args: Any, **kwargs: Any) -> Any:
        if hook.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_item(*args, **kwargs)

    Engine.train_step, filesystem_async._write_item = audited_step, write_unless_full
    sys.addaudithook(hook)
    code = main([*argv, "--device", "cpu", "--save", str(save), "--load", str(save)])
    moments[rank] = hook.count
    sys.exit(code)


def start(argv: list[str], save: Path, processes: int, fault: Fault | None) -> tuple[list[int | None], list[int]]:
    """Runs training once.

    Args:
        argv: flags of training.
        save: the folder of --save and --load.
        processes: ranks.
        fault: what goes wrong, or None.

    Returns:
        The exit codes of the ranks (negative: ended by that signal), and how many moments each had (0 where it was
        ended).
    """
    context = multiprocessing.get_context("fork")
    pids, moments = context.Array("i", processes, lock=False), context.Array("i", processes, lock=False)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(rank, port, argv, save, fault, pids, moments)) for rank in range(processes)
    ]
    for index, process in enumerate(ranks):
        process.start()
        pids[index] = process.pid or 0
    while all(process.is_alive() for process in ranks):
        multiprocessing.connection.wait([process.sentinel for process in ranks])
    end = time.monotonic() + PATIENCE
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks], list(moments)


def check_folder(save: Path) -> list[str]:
    """A sentence for everything that is wrong with the checkpoints of a run."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    wrong = []
    for folder in save.glob("iter_*"):
        if not (folder / FORMAT_FILE).is_file():
            wrong.append(f"{folder} is not complete")
            continue
        stored = FileSystemReader(folder).read_metadata().storage_data or {}
        for one in stored.values():
            file = folder / one.relative_path
            if not file.is_file() or file.stat().st_size < one.offset + one.length:
                wrong.append(f"{file} is shorter than {folder} says")
    try:
        latest_step(save)
    except UserError as error:
        wrong.append(str(error))
    return wrong


def _adopt_orphans() -> None:
    """Processes that outlive a rank become children of this one, on Linux, so that `_left_over` sees them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _left_over() -> list[str]:
    """A sentence for every process of a run that does not end by itself; it is killed."""
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=PATIENCE)
    found = [f"process {process.pid} outlived its run" for process in left]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return found


def measured(save: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every training step of a run."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def run(argv: Sequence[str] | None) -> int:
    """Makes the runs and prints a line for each; returns the exit code."""
    args = build_parser().parse_args(argv)
    if args.folder.exists():
        raise UserError(f"--folder {args.folder} exists; give a new folder")
    compat.quiet_megatron()
    _adopt_orphans()
    for name in ("simpo_megatron.trainer.loop", "simpo_megatron.dry_run", "transformers", "torch.utils.tensorboard"):
        importlib.import_module(name)  # once: the ranks are forks
    args.folder.mkdir(parents=True)
    whole, save, choose = args.folder / "whole", args.folder / "run", random.Random(args.seed)
    codes, moments = start(args.training, whole, args.processes, None)
    if any(codes):
        raise UserError(f"the run without a fault ended with {codes}; see {whole}.rank0.log")
    expected, wrong, ended = measured(whole), check_folder(whole), 0
    for trial in range(1, args.trials + 1):
        rank = choose.randrange(args.processes)
        fault = Fault(choose.choice(FAULTS), rank, choose.randint(1, moments[rank]))
        codes, _ = start(args.training, save, args.processes, fault)
        found = check_folder(save)
        if all(code == 1 for code in codes):
            found.append(f"no rank knows why it ended; see {save}.rank0.log")
        if not any(codes):
            ended += 1
            found += [] if measured(save) == expected else ["its losses are not those of the run without a fault"]
            shutil.rmtree(save)
        what = f"{fault.kind} at moment {fault.moment} of rank {rank}"
        print(f"{trial}: {what}: exit {codes}, {found or 'good'}", flush=True)
        wrong += found
    codes, _ = start(args.training, save, args.processes, None)
    found = check_folder(save) + ([] if measured(save) == expected else ["the last run has other losses"])
    found += _left_over()
    wrong += found
    print(f"{args.trials} faults, {ended + 1} runs came to their end, last exit {codes}: {wrong or 'all good'}")
    return int(bool(wrong or any(codes)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code("crash_test.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
