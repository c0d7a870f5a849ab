"""The alarms: each mistake raises its own, once, and a healthy run raises none."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from simpo_megatron.trainer import alarms as module
from simpo_megatron.trainer.alarms import Alarms
from tests.support.distributed import WorkerPool
from tests.support.runs import Inputs, flags, run_main

HEALTHY = {"loss": 1.0, "logps/chosen": -1.0, "rewards/ties": 0.0, "grad_norm": 2.0}
STEPS = 200


def run_with(**change: float) -> list[str]:
    """The alarms of a run in which these metrics change by so much over the steps."""
    alarms, found = Alarms(), []
    for step in range(STEPS):
        metrics = {name: value + change.get(name, 0.0) * step / STEPS for name, value in HEALTHY.items()}
        found += alarms.check(metrics)
    return found


@pytest.mark.parametrize(
    "change, words",
    [
        ({"logps/chosen": -1.5}, "the chosen responses have lost 1.05 nats a token (bound 1)"),
        ({"loss": 1.0}, "the loss has risen for 50 steps, from 1.0225 to 1.2225; lower --lr"),
        ({"rewards/ties": 0.3}, "the share of pairs with equal rewards has grown by 0.1"),
    ],
)
def test_a_change_raises_its_alarm_once(change: dict[str, float], words: str) -> None:
    [line] = run_with(**change)
    assert line.startswith(words)


def test_a_jump_of_the_gradient_norm() -> None:
    alarms = Alarms()
    norms = [2.0] * module.NORM_STEPS + [19.0, 21.0, 30.0]
    found = [alarms.check(HEALTHY | {"grad_norm": norm}) for norm in norms]
    assert [bool(lines) for lines in found[-3:]] == [False, True, False]
    assert found[-2] == [
        "the gradient norm 21 is 10 times the median 2 of the last 50 steps; if it stays so, lower --lr, or look at "
        "the data of this step"
    ]
    assert not any(found[:-3])


def test_a_log_prob_that_follows_the_length() -> None:
    """Once, against the first evaluation, and not where few pairs or equal lengths say nothing."""
    alarms = Alarms()
    values = [0.3, 0.5, float("nan"), 0.6, 0.7]
    found = [alarms.check_evaluation({"length_spearman": value}, module.LENGTH_PAIRS) for value in values]
    assert [bool(lines) for lines in found] == [False, False, False, True, False]
    assert "follows its length (rank correlation 0.60, first 0.30, bound +0.25)" in found[3][0]
    few = Alarms()
    assert not any(few.check_evaluation({"length_spearman": value}, module.LENGTH_PAIRS - 1) for value in values)


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_raises_none(seed: int) -> None:
    """A noisy loss that falls, log-probs that fall a little, a noisy norm; also of an objective without pairs."""
    noise, alarms = random.Random(seed), Alarms()
    for step in range(500):
        metrics = {
            "loss": 1 - step / 1000 + noise.gauss(0, 0.1),
            "logps/chosen": -1 - step / 1000 + noise.gauss(0, 0.1),
            "grad_norm": 2 * noise.lognormvariate(0, 0.5),
        }
        if seed % 2:
            metrics["rewards/ties"] = noise.uniform(0, 0.1)
        assert alarms.check(metrics) == []


def _with_small_bounds(argv: list[str]) -> tuple[int, str, str]:
    """On a rank: runs the program with windows of two steps; the chosen log-probs and the lengths are alarms."""
    before = module.WINDOW, module.CHOSEN_FALL, module.LENGTH_GROWTH, module.LENGTH_PAIRS
    module.WINDOW, module.CHOSEN_FALL, module.LENGTH_GROWTH, module.LENGTH_PAIRS = 2, -1e9, -1, 1
    try:
        return run_main(argv)
    finally:
        module.WINDOW, module.CHOSEN_FALL, module.LENGTH_GROWTH, module.LENGTH_PAIRS = before


@pytest.mark.parametrize("stop", [True, False])
def test_an_alarm_is_printed_and_can_stop_the_run(pool: WorkerPool, inputs: Inputs, tmp_path: Path, stop: bool) -> None:
    argv = [*flags(inputs.checkpoint, inputs.data, global_batch_size=4), "--save", str(tmp_path / "run")]
    argv += ["--stop-on-alarm"] if stop else ["--valid-data", str(inputs.data)]
    outcomes = pool.run(2, _with_small_bounds, argv)
    assert [code for code, _, _ in outcomes] == [0, 0]
    assert outcomes[0][1].count("alarm: step 2: the chosen responses have lost") == 1
    assert ("stopped by --stop-on-alarm after step 2 of 4" in outcomes[0][1]) == stop
    assert outcomes[0][1].count("alarm: step 0: the average log-prob of a response follows its length") == (not stop)
