"""What a comparison may be off by, and what it found: plain data.

The largest errors that pass are the table `TOLERANCE`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


class Tolerance(NamedTuple):
    """The largest relative error that passes.

    Attributes:
        fp32: if the layout runs in fp32.
        bf16: in bf16, if `times` gives less.
        times: in bf16, this many times the error of transformers in bf16; never more than `CAP`.
    """

    fp32: float
    bf16: float
    times: float


TOLERANCE = {
    "sums": Tolerance(fp32=1e-5, bf16=5e-3, times=2.0),  # summed log-probs, rewards, loss
    "gradient": Tolerance(fp32=1e-4, bf16=2e-2, times=2.0),  # of one tensor
    "all gradients": Tolerance(fp32=1e-5, bf16=1e-2, times=1.5),  # as one vector; also for their norm
}
CAP = 0.3  # the largest error that passes in bf16, however far off transformers in bf16 is


@dataclass
class Difference:
    """One compared number or tensor.

    Attributes:
        name: what is compared; of a gradient, the tensor's name in the checkpoint.
        error: relative to the reference.
        allowed: the largest error that passes.
    """

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is small enough. A NaN does not pass."""
        return self.error <= self.allowed


@dataclass
class Report:
    """What a comparison found.

    Attributes:
        values: sums, rewards, loss, all gradients as one vector, gradient norm.
        gradients: one entry for each tensor, the worst first.
        wrong_lengths: indices of pairs that no rank scored, or whose scored tokens are not those of the data.
        uncompared: tensors of the checkpoint for which the layout or the reference has no gradient.
        microbatches: of a data-parallel rank.
        pairs: of each pair its index, the sums of the reference, and the sums and lengths of every rank that scored it.
    """

    values: list[Difference]
    gradients: list[Difference]
    wrong_lengths: list[int]
    uncompared: list[str]
    microbatches: int
    pairs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether everything was compared and passed."""
        return (
            not self.wrong_lengths
            and not self.uncompared
            and all(found.passed for found in (*self.values, *self.gradients))
        )


def allowed_error(kind: str, rounded: float | None) -> float:
    """The largest error that passes.

    Args:
        kind: a row of `TOLERANCE`.
        rounded: the error of transformers in bf16; None if the layout runs in fp32.
    """
    limit = TOLERANCE[kind]
    return limit.fp32 if rounded is None else min(max(limit.bf16, limit.times * rounded), CAP)


def largest_error(found_PM: Tensor, exact_PM: Tensor) -> float:
    """The largest error of any pair, relative to the larger of its exact numbers; NaN if any number is NaN."""
    errors_P = (found_PM - exact_PM).abs().amax(1) / exact_PM.abs().amax(1).clamp_min(1e-30)
    return errors_P.max().item() if len(errors_P) else math.nan


def ratio(error: Tensor, of: Tensor) -> float:
    """A relative error; of nothing it is the error times 1e30."""
    return (error / of.clamp_min(1e-30)).item()
