"""The families of this package, and how one is found. A new family is one line in `FAMILIES`.

A config.json names its family. Megatron-LM's arguments do not (those that this package writes do, as `hf_model_type`):
the families are asked in the order of `FAMILIES`, and the first that recognises the arguments is taken. A family whose
model has other additions (`additions.Additions`) than the arguments say does not recognise them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.models.additions import Additions
from simpo_megatron.models.architecture import Family
from simpo_megatron.models.families.deepseek_v2 import DEEPSEEK_V2
from simpo_megatron.models.families.deepseek_v3 import DEEPSEEK_V3
from simpo_megatron.models.families.gemma2 import GEMMA2
from simpo_megatron.models.families.gemma3 import GEMMA3
from simpo_megatron.models.families.glm import GLM, GLM4
from simpo_megatron.models.families.glm4_moe import GLM4_MOE
from simpo_megatron.models.families.gpt_oss import GPT_OSS
from simpo_megatron.models.families.llama import LLAMA
from simpo_megatron.models.families.mistral import MINISTRAL, MISTRAL
from simpo_megatron.models.families.mixtral import MIXTRAL
from simpo_megatron.models.families.olmo2 import OLMO2
from simpo_megatron.models.families.olmo3 import OLMO3
from simpo_megatron.models.families.phi3 import PHI3
from simpo_megatron.models.families.qwen2 import QWEN2
from simpo_megatron.models.families.qwen3 import QWEN3
from simpo_megatron.models.families.qwen3_moe import QWEN3_MOE

FAMILIES = (
    *(GPT_OSS, GLM, GLM4, PHI3, DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE),
    *(LLAMA, MISTRAL, MINISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, OLMO2, OLMO3),
)


def config_of_args(args: Mapping[str, Any], vocab_size: int) -> dict[str, Any] | None:
    """The config.json of the model that Megatron-LM's arguments describe.

    Args:
        args: the arguments by name.
        vocab_size: without Megatron's padding.

    Returns:
        The content of a config.json; None where no family recognises the arguments.

    Raises:
        UserError: an argument is missing.
    """
    additions = {field.name: args[field.name] for field in fields(Additions) if field.name in args}
    for family in FAMILIES:
        config = family.config_from_megatron_args(args)
        if config is not None and family.additions({**family.defaults, **config}).as_dict() == additions:
            return {**config, "vocab_size": vocab_size}
    return None


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        UserError: no family has its `model_type`.
    """
    for family in FAMILIES:
        if config.get("model_type") in family.model_types:
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    text = "; its text model alone may run: save it by itself" if "text_config" in config else ""
    raise UserError(f"config.json has model_type {config.get('model_type')!r}; supported are {known}{text}")
