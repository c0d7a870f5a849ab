"""What is trained for: one file an objective. Pure torch; no Megatron, no process group.

base.py    the protocol: `PairScores` -> one loss a pair, rewards, metrics, description, warnings
simpo.py   SimPO, the file to read first
sft.py     the negative log-likelihood of the chosen responses

A new objective is a file here, with its flags as fields, and a line in `OBJECTIVES`.
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
