"""The families this package knows."""

from __future__ import annotations

from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.family import Family
from simpo_megatron.models.llama import LLAMA
from simpo_megatron.models.mistral import MISTRAL
from simpo_megatron.models.mixtral import MIXTRAL
from simpo_megatron.models.qwen2 import QWEN2
from simpo_megatron.models.qwen3 import QWEN3
from simpo_megatron.models.qwen3_moe import QWEN3_MOE

FAMILIES = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE)


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        UserError: none has its `model_type`.
    """
    for family in FAMILIES:
        if config.get("model_type") in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UserError(f"config.json has model_type {config.get('model_type')!r}; supported are {known}")
