"""What the model is trained for: one file an objective. Pure torch; no Megatron, no process group.

simpo.py   SimPO: the formula, its flags, its rewards. Read this file first
sft.py     SFT: the negative log-likelihood of the chosen responses
base.py    what an objective is: from the scores of pairs to their losses, rewards and metrics

A new objective is a file here, with its flags as fields, and a line in `OBJECTIVES`. README.md explains how.
"""

from __future__ import annotations

from simpo_megatron.objectives.base import Measured, Metric, Objective, PairScores
from simpo_megatron.objectives.sft import SFT
from simpo_megatron.objectives.simpo import SimPO

__all__ = ["OBJECTIVES", "SFT", "Measured", "Metric", "Objective", "PairScores", "SimPO"]

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        SimPO,  # the default
        SFT,
    )
}
