"""What the model is trained for: one file an objective. Pure torch; no Megatron, no process group.

simpo.py      SimPO: the formula, its flags, its rewards. Read this file first
sft.py        SFT: the negative log-likelihood of the chosen responses
cpo.py        CPO: summed log-probs and an NLL term
orpo.py       ORPO: the log-odds ratio of the average probabilities
slic.py       SLiC-HF: a hinge on summed log-probs and an NLL term
rrhf.py       RRHF: a ranking loss on average log-probs and an NLL term
dpo.py        DPO, LN-DPO and R-DPO: against a reference model
ipo.py        IPO: against a reference model
kto.py        KTO: each response against a baseline, and against a reference model
base.py       what an objective is: from the scores of pairs to their losses and rewards
measured.py   what an objective sees of pairs, and the metrics that it can report

A new objective is a file here, with its flags as fields, and a line in `OBJECTIVES`. README.md explains how.
"""

from __future__ import annotations

from simpo_megatron.objectives.base import Objective
from simpo_megatron.objectives.cpo import CPO
from simpo_megatron.objectives.dpo import DPO, LNDPO, RDPO
from simpo_megatron.objectives.ipo import IPO
from simpo_megatron.objectives.kto import KTO
from simpo_megatron.objectives.measured import Measured, Metric, PairScores
from simpo_megatron.objectives.orpo import ORPO
from simpo_megatron.objectives.rrhf import RRHF
from simpo_megatron.objectives.sft import SFT
from simpo_megatron.objectives.simpo import SimPO
from simpo_megatron.objectives.slic import SLiC

__all__ = ["OBJECTIVES", "SFT", "Measured", "Metric", "Objective", "PairScores", "SimPO"]

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        SimPO,  # the default
        SFT,
        DPO,
        LNDPO,
        IPO,
        CPO,
        ORPO,
        RDPO,
        SLiC,
        RRHF,
        KTO,
    )
}
