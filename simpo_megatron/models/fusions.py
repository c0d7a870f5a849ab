"""Which fused kernels and which attention a model runs with: what is asked for, what is installed, what Megatron takes.

Fused kernels need a GPU and the package that they come from. `None` for one of them means: where it is there.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch

from simpo_megatron.compat import have_fused_weight_gradient
from simpo_megatron.errors import UserError
from simpo_megatron.settings import flag

# `LanguageModule._set_attention_backend` asserts these values of Transformer Engine's switches, or that they are unset.
_SWITCHES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_BACKENDS = {"auto": "111", "flash": "100", "fused": "010", "unfused": "001", "local": "000"}
_PERMUTE = (
    "fused_permute",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_unpermute",
)


@dataclass(frozen=True)
class Kernels:
    """What a user asks for.

    Attributes:
        gradient_accumulation_fusion: add weight gradients directly to the fp32 gradient.
        rope_fusion: Transformer Engine's rotary embedding. Megatron's own reads the lengths of the sequences on the
            host, twice in every layer.
        moe_permute_fusion: Transformer Engine's kernel that sorts tokens by expert.
        attention_backend: Megatron's name: auto, flash, fused, unfused or local.
    """

    gradient_accumulation_fusion: bool | None = None
    rope_fusion: bool | None = None
    moe_permute_fusion: bool | None = None
    attention_backend: str = "auto"


def on_gpu() -> bool:
    """Whether the device of this process is a GPU."""
    return torch.empty(0, device=torch.cuda.current_device()).is_cuda


def kernel_fields(kernels: Kernels, transformer_engine: bool, experts: bool, plain_rope: bool = True) -> dict[str, Any]:
    """The fields of TransformerConfig for fused kernels and attention.

    Args:
        kernels: what is asked for.
        transformer_engine: whether the layers are Transformer Engine's.
        experts: whether the model has experts.
        plain_rope: whether the rotary embedding only turns the halves of a head. The kernel for packed rows does not
            know interleaved dimensions, nor a factor of cosine and sine, and Megatron does not say so.

    Raises:
        UserError: what is asked for is not there, or the environment contradicts it.
    """
    from megatron.core.transformer.enums import AttnBackend

    fused = on_gpu() and transformer_engine
    core = "megatron.core."
    has_rope = fused and _has(f"{core}models.common.embeddings.rope_utils", "fused_apply_rotary_pos_emb_thd")
    has_permute = fused and experts and _has(f"{core}transformer.moe.moe_utils", *_PERMUTE)
    has_sum = on_gpu() and (transformer_engine or have_fused_weight_gradient())
    engine = "a GPU and Transformer Engine's layers"
    of_rope = engine if plain_rope else "a model without interleaved rotary embedding or attention factor"
    fields = {
        "gradient_accumulation_fusion": _choose(
            "gradient_accumulation_fusion",
            kernels.gradient_accumulation_fusion,
            has_sum,
            f"{engine}, or Apex's extension fused_weight_gradient_mlp_cuda",
        ),
        "apply_rope_fusion": _choose("rope_fusion", kernels.rope_fusion, has_rope and plain_rope, of_rope),
        "moe_permute_fusion": _choose(
            "moe_permute_fusion", kernels.moe_permute_fusion, has_permute, f"{engine}, and a model with experts"
        ),
        "attention_backend": AttnBackend[kernels.attention_backend],
    }
    _check_backend(kernels.attention_backend, transformer_engine)
    if fields["gradient_accumulation_fusion"] and not have_fused_weight_gradient():
        _accept_fusion_without_apex()
    return fields


def _has(module: str, *names: str) -> bool:
    """Whether Megatron found these functions of Transformer Engine; it sets those that it did not find to None."""
    loaded = importlib.import_module(module)
    return all(getattr(loaded, name, None) is not None for name in names)


def _choose(name: str, asked: bool | None, available: bool, needs: str) -> bool:
    if asked and not available:
        raise UserError(f"{flag(name)} needs {needs}; drop the flag")
    return available if asked is None else asked


def _check_backend(backend: str, transformer_engine: bool) -> None:
    """Refuses an attention that the layers do not have, and switches in the environment that contradict it."""
    if transformer_engine and backend == "local":
        raise UserError("--attention-backend local needs --transformer-impl local; give both, or another backend")
    if not transformer_engine and backend in ("flash", "fused"):
        raise UserError(
            f"--attention-backend {backend} needs Transformer Engine's layers, and these are on plain torch; drop the "
            "flag"
        )
    for name, wanted in zip(_SWITCHES, _BACKENDS[backend], strict=True):
        value = os.environ.get(name, wanted)
        if value != wanted:
            raise UserError(
                f"{name} is {value} in the environment, and --attention-backend {backend} needs {wanted}; unset "
                f"{', '.join(_SWITCHES)}, and choose with --attention-backend"
            )


def _accept_fusion_without_apex() -> None:
    """Lets Megatron build an output layer with gradient_accumulation_fusion where Apex is absent.

    Transformer Engine's layers add weight gradients with kernels of their own. Megatron's output layer alone would need
    Apex's. Its constructor raises without (`tensor_parallel/layers.py`), also as the base of `LogProbHead`, which does
    not use Apex's kernel. `plain_output_layer` turns the fusion off in an output layer that stays Megatron's.
    """
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers._grad_accum_fusion_available = True


def plain_output_layer(model: torch.nn.Module) -> None:
    """Turns the fusion off in a model's output layer where Apex is absent: `--head plain` runs Megatron's own layer."""
    layer: Any = getattr(model, "output_layer", None)
    if layer is not None and not have_fused_weight_gradient():
        layer.gradient_accumulation_fusion = False
