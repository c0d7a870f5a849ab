"""The families this package knows."""

from __future__ import annotations

from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.families.llama import LLAMA
from simpo_megatron.models.families.mistral import MISTRAL
from simpo_megatron.models.families.mixtral import MIXTRAL
from simpo_megatron.models.families.qwen2 import QWEN2
from simpo_megatron.models.families.qwen3 import QWEN3
from simpo_megatron.models.families.qwen3_moe import QWEN3_MOE
from simpo_megatron.models.family import Family

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
