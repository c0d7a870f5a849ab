"""FP8 in the layers: the fields of TransformerConfig, and what the model and the machine must have.

Transformer Engine multiplies in FP8. A matrix product needs rows and columns in multiples of 16 (of 32 for mxfp8). The
packed rows are padded to that (`MemoryConfig.row_multiple`); Megatron pads the tokens of each expert. Weights,
checkpoints, exports, attention and the head stay in bf16.
"""

from __future__ import annotations

import importlib
from typing import Any

from simpo_megatron.config.memory import MemoryConfig
from simpo_megatron.errors import UserError
from simpo_megatron.models.fusions import on_gpu
from simpo_megatron.settings import require

# Transformer Engine's question to the machine, by recipe (`transformer_engine/pytorch/quantization.py`).
_AVAILABLE = {"mxfp8": "is_mxfp8_available", "blockwise": "is_fp8_block_scaling_available"}


def fp8_fields(
    settings: MemoryConfig, transformer_engine: bool, model: dict[str, Any], layout: dict[str, Any]
) -> dict[str, Any]:
    """The fields of TransformerConfig for --fp8-format; none without it.

    Args:
        settings: of the run.
        transformer_engine: whether the layers are Transformer Engine's.
        model: `Architecture.transformer`.
        layout: from `limits.layout_arguments`.

    Raises:
        UserError: the layers, the model, the recomputation or the machine do not serve FP8.
    """
    if settings.fp8_format is None:
        return {}
    shown = f"--fp8-format {settings.fp8_format}"
    require(
        transformer_engine, f"{shown} needs Transformer Engine's layers, and these are on plain torch; drop the flag"
    )
    for name in layout["recompute_modules"] or ():
        require(
            settings.fp8_recipe != "delayed" or name not in ("layernorm", "moe_act"),
            f"--recompute-modules {name} does not work with --fp8-recipe delayed, whose scales would be taken twice; "
            "use another recipe",
        )
    _check_widths(settings, model, layout)
    require(on_gpu(), f"{shown} needs a GPU that multiplies in FP8 (Ada, Hopper or newer); drop the flag")
    quantization: Any = importlib.import_module("transformer_engine.pytorch.quantization")
    manager = quantization.FP8GlobalStateManager
    available, why = getattr(manager, _AVAILABLE.get(settings.fp8_recipe, "is_fp8_available"))()
    if not available:
        raise UserError(f"{shown} --fp8-recipe {settings.fp8_recipe} does not run on this GPU: {why}; drop the flag")
    return {"fp8": settings.fp8_format, "fp8_recipe": settings.fp8_recipe}


def _check_widths(settings: MemoryConfig, model: dict[str, Any], layout: dict[str, Any]) -> None:
    """Makes sure that the matrices of a tensor-parallel rank have widths that FP8 can multiply."""
    tensor, multiple = layout["tensor_model_parallel_size"], settings.row_multiple
    heads = {"attention heads": "num_attention_heads", "key and value heads": "num_query_groups"}
    widths = {what: model[name] * model["kv_channels"] // tensor for what, name in heads.items()}
    widths["hidden_size"] = model["hidden_size"]
    if model.get("num_moe_experts") is None:
        widths["ffn_hidden_size"] = model["ffn_hidden_size"] // tensor
    else:
        ranks = layout["expert_tensor_parallel_size"] or tensor
        widths["moe_ffn_hidden_size"] = model["moe_ffn_hidden_size"] // ranks
    for what, width in widths.items():
        require(
            width % multiple == 0,
            f"--fp8-format {settings.fp8_format} needs widths in multiples of {multiple}, and that of {what} on a rank "
            f"is {width}; use a smaller --tensor-model-parallel-size, or drop the flag",
        )
