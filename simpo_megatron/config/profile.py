"""The settings for a look into steps. `trainer/profiling.py` acts on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from simpo_megatron.settings import Group, require, setting


@dataclass(frozen=True)
class ProfileConfig(Group):
    """Profiling."""

    profile: bool = setting(
        False,
        "write a trace of some steps by torch's profiler; under nsys mark them (--capture-range=cudaProfilerApi)",
    )
    profile_step_start: int = setting(10, "first step to profile")
    profile_step_end: int = setting(12, "step after the last one to profile")
    profile_ranks: tuple[str, ...] | None = setting(None, "ranks to profile (default: 0)", "RANK")
    profile_dir: Path | None = setting(None, "folder for traces and memory snapshots (default: SAVE/profile)")
    record_memory_history: bool = setting(
        False,
        "record what allocates GPU memory, for pytorch.org/memory_viz: a snapshot of each profiled rank, written at "
        "the end of the run, also when memory runs out",
    )
    manual_gc: bool = setting(
        False, "collect Python's garbage at the same steps on all ranks, not whenever a rank happens to"
    )
    manual_gc_interval: int = setting(100, "steps between two collections of --manual-gc")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "profile_ranks", tuple(self.profile_ranks or ()) or None)
        self.positive("profile_step_start", "manual_gc_interval")
        require(
            self.profile_step_end > self.profile_step_start,
            f"--profile-step-end {self.profile_step_end} is the step after the last one to profile; it must exceed "
            f"--profile-step-start {self.profile_step_start}",
        )
        for rank in self.profile_ranks or ():
            require(rank.isdecimal(), f"--profile-ranks {rank} is not a rank; give numbers from 0")

    @property
    def window(self) -> range:
        """The steps to profile."""
        return range(self.profile_step_start, self.profile_step_end)

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks to profile."""
        return frozenset(map(int, self.profile_ranks or ("0",)))
