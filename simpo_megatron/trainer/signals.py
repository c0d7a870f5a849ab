"""Stopping a run before its end: at a signal, after some minutes, or at a step. All ranks agree after a step.

    with watch(config) as stopping:             # a signal is noted; it does not interrupt the step
        ...
        reason = stopping.reason(step)          # after each step, on every rank: None, or why the run stops now

The flags are those of `config/stop.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from simpo_megatron.config.run import Config
from simpo_megatron.config.stop import StopConfig
from simpo_megatron.parallel.together import host_group

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Seconds in which more signals count as the first one: Slurm signals torchrun and its processes, and then torchrun
# signals its processes too.
ECHO = 10.0


class Stopping:
    """Whether a run stops before its end.

    Args:
        config: the settings.
        handles_signals: whether signals can arrive here; the same on all ranks.

    Attributes:
        received: the number of the first signal; 0 before it.
    """

    def __init__(self, config: StopConfig, handles_signals: bool) -> None:
        self.config, self.handles_signals = config, handles_signals
        self.received = 0
        self._started = time.monotonic()
        self._received_at = 0.0

    def note(self, number: int, frame: object = None) -> None:
        """Notes a signal; Python calls it.

        Args:
            number: of the signal.
            frame: not used.

        Raises:
            SystemExit: it is a second signal, and it is not an echo of the first one.
        """
        if not self.received:
            self.received, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at > ECHO:
            raise SystemExit(128 + number)

    @contextlib.contextmanager
    def shielding_children(self) -> Iterator[None]:
        """Processes that start inside the block do not get the signals that this process notes.

        Megatron's checkpoint writer starts some, and one of them stays. A signal to all processes of a job, as Slurm
        sends it, would end it, and no checkpoint could be saved any more. A child inherits the signals that this thread
        blocks. This process still gets them, through its other threads or at the end of the block.
        """
        if not self.handles_signals:
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def reason(self, step: int, alarmed: bool = False) -> str | None:
        """Why the run stops after this step; None if it goes on. The same on all ranks.

        Collectives: one all-reduce of three numbers over the host's group, if signals, minutes or alarms can stop the
        run.

        Args:
            step: that has just been taken.
            alarmed: whether an alarm has been raised.
        """
        minutes, interval = self.config.exit_duration_in_mins, self.config.exit_interval
        if self.handles_signals or minutes is not None or self.config.stop_on_alarm:
            passed = (time.monotonic() - self._started) / 60
            found = torch.tensor([self.received, passed, alarmed], dtype=torch.float64)
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=host_group())
            number, passed, alarm = found.tolist()
            if number:
                return signal.Signals(int(number)).name
            if minutes is not None and passed >= minutes:
                return f"--exit-duration-in-mins {minutes:g}"
            if alarm and self.config.stop_on_alarm:
                return "--stop-on-alarm"
        if interval is not None and step % interval == 0:
            return f"--exit-interval {interval}"
        return None


@contextlib.contextmanager
def watch(config: Config) -> Iterator[Stopping]:
    """Inside the block, SIGTERM and SIGUSR1 are noted instead of obeyed, if the settings ask for it.

    Args:
        config: of the run.
    """
    asked = config.stop.exit_signal_handler
    handled = (asked or (asked is None and "SLURM_JOB_ID" in os.environ)) and config.checkpoint.save is not None
    stopping = Stopping(config.stop, handled)
    if not handled or threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.signal(number, stopping.note) for number in SIGNALS}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
