"""Values that cannot work are refused with the flag's name."""

from __future__ import annotations

from typing import Any

import pytest

from simpo_megatron.data.options import DataOptions
from simpo_megatron.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_prompt_length": 0}, "--max-prompt-length 0 must be greater than 0"),
        (
            {"max_length": 512, "max_prompt_length": 512},
            "--max-prompt-length 512 must be less than --max-length 512: a prompt that long leaves no token for the "
            "response; lower the first or raise the second",
        ),
        ({"prompt_truncation": "left"}, "--prompt-truncation left is not known; use keep_end or keep_start"),
        ({"assistant_header": ""}, "--assistant-header  is not known; use prompt or response"),
        ({"tie_policy": "keep"}, "--tie-policy keep is not known; use drop or zero-margin"),
        ({"max_length_ratio": 0.5}, "--max-length-ratio 0.5 must be at least 1"),
        ({"min_score_gap": -1.0}, "--min-score-gap -1.0 must not be negative"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        DataOptions(**options)
    assert str(caught.value) == message
