"""Values that cannot work are refused with the flag's name."""

import pytest

from simpo_megatron.data.options import DataOptions
from simpo_megatron.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_prompt_length": 0}, "--max-prompt-length is 0; it must be at least 1."),
        (
            {"max_length": 512, "max_prompt_length": 512},
            "--max-prompt-length (512) must be less than --max-length (512): a prompt that long leaves no token for "
            "the response. Lower the first or raise the second.",
        ),
        ({"prompt_truncation": "left"}, "--prompt-truncation is 'left'; it must be one of keep_end, keep_start."),
        ({"assistant_header": ""}, "--assistant-header is ''; it must be one of prompt, response."),
        ({"tie_policy": "keep"}, "--tie-policy is 'keep'; it must be one of drop, zero-margin."),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError) as caught:
        DataOptions(**options)
    assert str(caught.value) == message
