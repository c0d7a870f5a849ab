"""The peak of the memory that torch's CPU tensors take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_allocated(function: Callable[[], Any]) -> int:
    """The most bytes of CPU tensors alive at once while `function` ran, beyond those alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    held = peak = 0
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
