"""The settings that stop a run before its end. `trainer/signals.py` acts on them."""

from __future__ import annotations

from dataclasses import dataclass

from simpo_megatron.settings import Group, setting


@dataclass(frozen=True)
class StopConfig(Group):
    """Stopping early."""

    exit_signal_handler: bool | None = setting(
        None,
        "at SIGTERM or SIGUSR1 finish the step, save and end with exit code 0; a second signal ends the run at once "
        "(default: on in a Slurm job with --save)",
    )
    exit_duration_in_mins: float | None = setting(
        None, "minutes after which the run finishes its step, saves and ends; leave time for a step and a checkpoint"
    )
    exit_interval: int | None = setting(None, "after each multiple of this number of steps, save and end")
    stop_on_alarm: bool = setting(
        False, "save and end at the first alarm: falling log-probs of the chosen responses, a rising loss, and others"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("exit_duration_in_mins", "exit_interval")

    @property
    def given(self) -> str | None:
        """The first of these settings that is on; None if none is."""
        return next((name for name, value in vars(self).items() if value), None)
