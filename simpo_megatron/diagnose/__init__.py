"""What preference training did to a model: two Hugging Face checkpoints beside each other on a set of pairs.

scoring.py   log-probs of the responses under both models, and the exact KL of their distributions
figures.py   the numbers: rankings, length correlations, KL
lengths.py   how likelihood and reward depend on length; evaluations use it too
page.py      the same as an HTML page with plots
plots.py     the plots, as SVG

`tools/diagnose.py` is the program. README.md says what the numbers mean. No Megatron, no process group.
"""

from __future__ import annotations

from simpo_megatron.diagnose.figures import figures
from simpo_megatron.diagnose.scoring import Scored, score
from simpo_megatron.models.transformers_model import load_model

__all__ = ["Scored", "figures", "load_model", "score"]
