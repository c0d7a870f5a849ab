"""Signs that a run goes wrong, each said once, in one line that says what to do. `--stop-on-alarm` stops the run.

    alarms = Alarms()
    for line in alarms.check(metrics):        # after each step; the same on all ranks, as the metrics are
        ...
    for line in alarms.check_evaluation(metrics, pairs):
        ...

The bounds are the constants below. They hold for this start of a run: a run that is resumed begins to watch anew.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator
from itertools import pairwise

WINDOW = 10  # steps whose mean is compared, so that one odd batch is no alarm
# The mean log-prob of a chosen token may fall by so many nats: its probability is then 1/e of what it was. That
# preference losses can lower the chosen log-probs: arXiv 2402.13228 and 2410.08847. The bound is of this package.
CHOSEN_FALL = 1.0
# So many windows in which the mean loss rises each time, and the whole rise as a share of the first. Of this package:
# by chance alone five means are in rising order once in 120, and noise does not reach the share.
RISING_WINDOWS, LOSS_RISE = 5, 0.1
# Share of pairs whose responses have the same reward, above that of the first window. Of this package: such pairs teach
# nothing about the order, and a model that gives all responses one reward has collapsed.
TIES_GROWTH = 0.1
# A gradient norm that is so many times the median of the last steps. Megatron-Core calls a loss spiky by the same
# factor (`rerun_state_machine.py`); the median of 50 steps is of this package.
NORM_JUMP, NORM_STEPS = 10.0, 50
# Growth of `eval/length_spearman` since the first evaluation, and the held-out pairs below which it is noise. In the
# SimPO paper (figures 2 and 4) it is 0.33 before, 0.34 after SimPO, 0.59 after DPO and 0.82 without the division by the
# length. The bound is the way from SimPO to DPO. The pairs are of this package: 200 responses have an error of 0.07.
LENGTH_GROWTH, LENGTH_PAIRS = 0.25, 100


class Alarms:
    """Watches the metrics of the training steps and of the evaluations."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}  # mean of the first window
        self._window: dict[str, list[float]] = {}
        self._losses: deque[float] = deque(maxlen=RISING_WINDOWS)
        self._norms: deque[float] = deque(maxlen=NORM_STEPS)
        self._rung: set[str] = set()
        self._first_length: float | None = None

    def check(self, metrics: dict[str, float]) -> list[str]:
        """The alarms that this step raises for the first time.

        Args:
            metrics: of the step, by their full names; those that the objective does not have are not watched.
        """
        return self._new({**dict(self._norm(metrics)), **dict(self._windows(metrics))})

    def check_evaluation(self, metrics: dict[str, float], pairs: int) -> list[str]:
        """The alarms that an evaluation raises for the first time.

        Args:
            metrics: of the held-out pairs.
            pairs: how many they are.
        """
        now = metrics.get("length_spearman")
        if now is None or math.isnan(now) or pairs < LENGTH_PAIRS:
            return []
        if self._first_length is None:
            self._first_length = now
        if now - self._first_length <= LENGTH_GROWTH:
            return []
        text = (
            f"the average log-prob of a response follows its length (rank correlation {now:.2f}, first "
            f"{self._first_length:.2f}, bound +{LENGTH_GROWTH:g}): the accuracy may be a matter of length; lower --lr, "
            "or look at the lengths of the pairs with tools/inspect_data.py"
        )
        return self._new({"length": text})

    def _new(self, found: dict[str, str]) -> list[str]:
        new = {name: text for name, text in found.items() if name not in self._rung}
        self._rung |= new.keys()
        return list(new.values())

    def _norm(self, metrics: dict[str, float]) -> Iterator[tuple[str, str]]:
        norm = metrics["grad_norm"]
        if len(self._norms) == NORM_STEPS and norm > NORM_JUMP * (usual := statistics.median(self._norms)):
            yield (
                "grad_norm",
                f"the gradient norm {norm:.3g} is {norm / usual:.0f} times the median {usual:.3g} of the last "
                f"{NORM_STEPS} steps; if it stays so, lower --lr, or look at the data of this step",
            )
        self._norms.append(norm)

    def _windows(self, metrics: dict[str, float]) -> Iterator[tuple[str, str]]:
        """The alarms of means; only the last step of a window raises any."""
        for name in ("loss", "logps/chosen", "rewards/ties"):
            if name in metrics:
                self._window.setdefault(name, []).append(metrics[name])
        if len(self._window.get("loss", ())) < WINDOW:
            return
        means = {name: statistics.fmean(values) for name, values in self._window.items()}
        self._window = {}
        self._first = self._first or means
        growth = {name: mean - self._first[name] for name, mean in means.items()}
        self._losses.append(means["loss"])
        first, last = self._losses[0], self._losses[-1]
        rises = all(before < after for before, after in pairwise(self._losses))
        if len(self._losses) == RISING_WINDOWS and rises and last - first > LOSS_RISE * abs(first):
            yield (
                "loss",
                f"the loss has risen for {RISING_WINDOWS * WINDOW} steps, from {first:.4f} to {last:.4f}; lower --lr, "
                "or give a longer --lr-warmup-fraction",
            )
        if (fall := -growth.get("logps/chosen", 0.0)) > CHOSEN_FALL:
            yield (
                "logps/chosen",
                f"the chosen responses have lost {fall:.2f} nats a token (bound {CHOSEN_FALL:g}): the model unlearns "
                "them too; lower --lr, or add --simpo-sft-weight",
            )
        if (grown := growth.get("rewards/ties", 0.0)) > TIES_GROWTH:
            yield (
                "rewards/ties",
                f"the share of pairs with equal rewards has grown by {grown:.2f} (bound {TIES_GROWTH:g}); look for "
                "equal or cut responses with tools/inspect_data.py, and for a --lr that is too high",
            )
