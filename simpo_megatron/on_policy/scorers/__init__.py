"""What scores responses, by its name in `--scorer-kind`. A new one is a file, its settings and a line in `SCORERS`.

base.py            the interface
settings.py        the settings of each
reward_model.py    a sequence-classification model
function.py        a Python function
judge.py           a model behind a server that compares two responses
"""

from __future__ import annotations

from simpo_megatron.on_policy.registry import Entry
from simpo_megatron.on_policy.scorers.settings import FunctionSettings, JudgeSettings, RewardModelSettings

SCORERS = {
    "reward_model": Entry(RewardModelSettings, f"{__name__}.reward_model", "RewardModel"),
    "function": Entry(FunctionSettings, f"{__name__}.function", "FunctionScorer"),
    "judge": Entry(JudgeSettings, f"{__name__}.judge", "JudgeScorer"),
}
# The setting of each that is needed; it chooses the scorer.
CHOSEN_BY = {"reward_model": "reward_model", "scorer": "function", "judge_url": "judge"}
