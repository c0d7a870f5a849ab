"""A look into steps: traces, GPU memory, and when Python collects garbage. The flags are those of `config/profile.py`.

    with Profiling(config) as profiling:
        for step in ...:
            profiling.before(step)
            ...
            profiling.after(step)

A trace opens in chrome://tracing or ui.perfetto.dev. Under nsys the profiled steps are the capture range of
`nsys profile --capture-range=cudaProfilerApi`; torch's profiler could not run beside it.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from simpo_megatron.config.run import Config
from simpo_megatron.settings import require

_NSYS = "NSYS_PROFILING_SESSION_ID"  # nsys sets it in what it profiles
_ENTRIES = 100_000  # allocations that a memory snapshot holds at most, as in Megatron-LM (`training.py`)


def profile_folder(config: Config) -> Path | None:
    """Where traces and snapshots go; None without --save and --profile-dir."""
    save = config.checkpoint.save
    return config.profile.profile_dir or (save / "profile" if save is not None else None)


def check_profiling(config: Config) -> None:
    """Checks the settings against the device and the processes.

    Raises:
        UserError: there is no GPU for --record-memory-history, or no such rank.
    """
    require(
        not config.profile.record_memory_history or torch.cuda.is_initialized(),
        "--record-memory-history records the memory of a GPU, and this run is on a CPU; drop it",
    )
    highest = dist.get_world_size() - 1
    for rank in config.profile.ranks:
        require(rank <= highest, f"--profile-ranks {rank}: the ranks of this run are 0 to {highest}")


def check_window(config: Config, steps: int, taken: int) -> list[str]:
    """Makes sure that a run reaches the steps to profile.

    Args:
        config: of the run.
        steps: of the whole run.
        taken: steps that it has taken, where it is resumed.

    Returns:
        A sentence if all of them are among the steps that were taken.

    Raises:
        UserError: the whole run is shorter.
    """
    profile = config.profile
    first, last = profile.window[0], profile.window[-1]
    if not profile.profile:
        return []
    require(
        first <= steps,
        f"--profile-step-start {first} is after the last step of the run, {steps}; give a step that it reaches, and "
        "--profile-step-end after that",
    )
    return (
        [] if last > taken else [f"--profile writes no trace: the run goes on after step {taken}, and {last} is past"]
    )


class Profiling:
    """Profiles the steps and ranks that the settings name.

    Args:
        config: of the run, which `check_profiling` has accepted.
    """

    def __init__(self, config: Config) -> None:
        self.config = config.profile
        rank, folder = dist.get_rank(), profile_folder(config)
        self._folder = folder if folder is not None and rank in self.config.ranks else None
        self._rank = rank
        self._trace: Any = None
        self._capturing = False

    def __enter__(self) -> Profiling:
        """Starts what lasts for the whole run."""
        if self.config.manual_gc:
            gc.disable()
            gc.collect()
        if self.config.record_memory_history and self._folder is not None:
            torch.cuda.memory._record_memory_history(max_entries=_ENTRIES)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it, and writes what there is, also after an error."""
        self._stop()
        if self.config.manual_gc:
            gc.enable()
        if self.config.record_memory_history and self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory_rank_{self._rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    def before(self, step: int) -> None:
        """Starts a trace if this step is the first to profile of this start of the run.

        Args:
            step: that begins now, counted from 1.
        """
        running = self._capturing or self._trace is not None
        if not self.config.profile or self._folder is None or step not in self.config.window or running:
            return
        if _NSYS in os.environ and torch.cuda.is_initialized():
            torch.cuda.profiler.start()
            self._capturing = True
        else:
            self._trace = torch.profiler.profile(record_shapes=True)
            self._trace.start()

    def after(self, step: int) -> None:
        """Ends a trace after its last step, and collects garbage if it is time.

        Args:
            step: that has ended, counted from 1.
        """
        if step + 1 >= self.config.profile_step_end:
            self._stop()
        if self.config.manual_gc and step % self.config.manual_gc_interval == 0:
            gc.collect()

    def _stop(self) -> None:
        if self._capturing:
            torch.cuda.profiler.stop()
            self._capturing = False
        if self._trace is not None and self._folder is not None:
            trace, self._trace = self._trace, None
            trace.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.export_chrome_trace(str(self._folder / f"trace_rank_{self._rank}.json"))
