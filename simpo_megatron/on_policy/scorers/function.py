"""Scores by a Python function of the user: a verifier of answers, a rule, or any other model.

    def score(prompt, responses, **columns):
        return [1.0 if columns["answer"] in response else 0.0 for response in responses]

`prompt` is a list of messages, `responses` a list of texts, and `columns` the other columns of the row.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from simpo_megatron.data.schema import is_number, shown
from simpo_megatron.errors import UserError
from simpo_megatron.on_policy.scorers.base import Answered
from simpo_megatron.on_policy.scorers.settings import FunctionSettings
from simpo_megatron.program import Terminated
from simpo_megatron.settings import required


class FunctionScorer:
    """See `base.Scorer`."""

    block = 64

    def __init__(self, settings: FunctionSettings) -> None:
        self._name = required(settings.scorer, "--scorer is missing; give module:function")
        self._function = find_function(self._name)

    @classmethod
    def check(cls, settings: FunctionSettings) -> None:
        """See `base.Scorer`."""
        cls(settings)

    def about(self) -> dict[str, Any]:
        """See `base.Scorer`."""
        return {"scorer": self._name}

    def score(self, rows: Sequence[Answered]) -> list[list[float]]:
        """See `base.Scorer`."""
        return [self._one(row) for row in rows]

    def _one(self, row: Answered) -> list[float]:
        try:
            scores = list(self._function(row.prompt, row.responses, **row.columns))
        except Terminated:
            raise
        except (Exception, SystemExit) as error:  # of the user's function
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{row.where}: --scorer {self._name} raised {reason}; correct the function") from error
        if len(scores) != len(row.responses):
            raise UserError(
                f"{row.where}: --scorer {self._name} returned {len(scores)} scores for {len(row.responses)} responses"
            )
        for score in scores:
            if not _is_finite(score):
                raise UserError(
                    f"{row.where}: --scorer {self._name} returned {shown(score)}, which is no finite number"
                )
        return [float(score) for score in scores]


def _is_finite(score: Any) -> bool:
    """Whether it is a number, a boolean or a tensor of one number, and finite. A text is none: "12" is two of them."""
    try:
        return not isinstance(score, str) and is_number(float(score))
    except (TypeError, ValueError, OverflowError):
        return False


def find_function(name: str) -> Callable[..., Any]:
    """Imports "module:function". The current folder is searched first.

    Raises:
        UserError: it is not there.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise UserError(f"--scorer {name} is not module:function, such as rewards:score")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Terminated:
        raise
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"--scorer {name} cannot be imported ({reason}); run from the folder of {module}.py") from error
    if not callable(found):
        raise UserError(f"--scorer {name} is {type(found).__name__}, not a function")
    return found
