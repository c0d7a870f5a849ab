"""How likelihood and reward depend on length: the statistics, and the metrics of a whole evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from simpo_megatron.diagnose.lengths import Bin, by_length_difference, spearman
from simpo_megatron.objectives import OBJECTIVES, SFT, SimPO
from simpo_megatron.trainer.scoring import whole_set_metrics
from tests.support.pairs import make_pairs


def test_spearman_shares_the_ranks_of_ties() -> None:
    assert spearman(np.array([1.0, 2, 3, 10]), np.array([5, 6, 7, 8])) == pytest.approx(1)
    assert spearman(np.array([0.5, -1.5, 1, 4]), np.array([-1, 1, 0, 7])) == pytest.approx(0.4)
    ranks = np.corrcoef([0.5, 0.5, 2, 3], [3, 1, 1, 1])[0, 1]
    assert spearman(np.array([7.0, 7, 8, 9]), np.array([9, 2, 2, 2])) == pytest.approx(ranks)
    assert math.isnan(spearman(np.array([1.0, 2]), np.array([3, 3])))


def test_bins_have_as_many_pairs_and_keep_equal_differences_together() -> None:
    differences = np.array([5, -3, 0, 9, 2, 2, -8, 1, 30, 4])
    found = by_length_difference(differences * 10.0, differences)
    assert [(one.shortest, one.longest, one.pairs, one.margin) for one in found] == [
        (-8, -3, 2, -55.0),
        (0, 1, 2, 5.0),
        (2, 2, 2, 20.0),
        (4, 5, 2, 45.0),
        (9, 30, 2, 195.0),
    ]
    same = by_length_difference(np.array([1.0, 2, 3]), np.array([7, 7, 7]))
    assert same == [Bin(1, 7, 7, 3, 2.0)]


LENGTHS = [(4, 3, 5), (2, 4, 2), (6, 9, 1), (1, 2, 3)]
SUMS = np.array([[-6.0, -5.0], [-8.0, -8.0], [-9.0, -4.0], [-4.0, -3.0]], np.float32)
KNOWN = [[-7.0, -5.0], [-8.0, -6.0], [-12.0, -4.0], [-4.0, -4.0]]


def test_metrics_of_an_evaluation() -> None:
    pairs = make_pairs(LENGTHS)
    order = np.array([2, 0, 1, 3])  # not that of the data
    found = whole_set_metrics(SimPO(simpo_beta=2.0), pairs, order, SUMS[order])
    # differences of the lengths 8, -2, 2, -1; averages -1, -4; -2, -1; -2, -4; -2, -1
    margins = {name: value for name, value in found.items() if name.startswith("margin")}
    wanted = {"1": -2.0, "2": -2.0, "3": 4.0, "4": 6.0}
    assert margins == pytest.approx({f"margin_by_length_difference/{name}": value for name, value in wanted.items()})
    assert "kl_on_given_text" not in found, "there is no reference model"
    known = pairs.with_reference_sums(np.array(KNOWN, np.float32))
    for objective in (SimPO(), OBJECTIVES["dpo"]()):
        assert whole_set_metrics(objective, known, order, SUMS[order])["kl_on_given_text"] == 3 / 8
    dpo = whole_set_metrics(OBJECTIVES["dpo"](), known, order, SUMS[order])
    assert dpo["margin_by_length_difference/4"] == pytest.approx(0.1 * 3)
    sft = whole_set_metrics(SFT(), known, order, SUMS[order, :1])
    assert sft.keys() == {"length_spearman", "kl_on_given_text"} and sft["kl_on_given_text"] == 1
