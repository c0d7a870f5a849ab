"""Multi-latent attention (DeepSeek-V2, arXiv 2405.04434) over packed rows, on plain torch.

Queries, keys and values are projected from narrow latents; a part of every query and key has a rotary embedding, and
that part of the key is the same for all heads. The computation is Megatron's `MLASelfAttention`. Of its local layers
three parts are replaced:

* the projections to the latents, which Megatron's local spec divides over the tensor-parallel ranks. Every rank then
  computes the gradient of the shared part of the key from its own heads, and nothing sums them. Here they are whole on
  every rank, as in Transformer Engine's spec;
* the norms of the latents, which are in the projections behind them, as in Transformer Engine's spec, so that a
  checkpoint of one loads into the other;
* the attention, `PackedAttention`, whose values may have another width than queries and keys.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from simpo_megatron.models.attention import PackedAttention
from simpo_megatron.models.rotary import replace_frequencies
from simpo_megatron.models.shared_prompts import PairRotary


class LatentAttention(MLASelfAttention):
    """Megatron's attention with projections to the latents that are whole on every tensor-parallel rank.

    Under sequence parallelism every rank projects its own tokens, and Megatron sums the gradients of the weights.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.q_lora_rank)
        self.linear_kv_down_proj = WholeLinear(config, config.kv_lora_rank + config.qk_pos_emb_head_dim)


class WholeLinear(torch.nn.Linear):
    """A projection of the hidden states that is not divided; returns the output and no bias, as Megatron's layers."""

    def __init__(self, config: TransformerConfig, out_features: int) -> None:
        device = torch.cuda.current_device()
        super().__init__(config.hidden_size, out_features, bias=False, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input: Tensor) -> Any:
        """[..., hidden size] -> [..., out_features], and None."""
        return super().forward(input), None

    def get_extra_state(self) -> None:
        """None, under the key that Megatron's plain linear layers have in a checkpoint."""

    def set_extra_state(self, state: Any) -> None:
        """Ignored: Transformer Engine's layers keep FP8 scales there."""


class NormedColumnParallelLinear(ColumnParallelLinear):
    """Megatron's column-parallel layer behind an RMSNorm, with the parameter names of Transformer Engine's layer."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        device = torch.cuda.current_device()
        weight = torch.nn.Parameter(torch.empty(input_size, device=device, dtype=config.params_dtype))
        weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm_weight, self.eps = weight, config.layernorm_epsilon

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The projection of the normalised input."""
        normed = F.rms_norm(input_, self.layer_norm_weight.shape, self.layer_norm_weight, self.eps)
        return super().forward(normed, *args, **kwargs)


class LatentPackedAttention(PackedAttention):
    """`PackedAttention` with the arguments that Megatron's multi-latent attention adds: the widths, which it sees."""

    def __init__(
        self, config: TransformerConfig, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any
    ) -> None:
        del k_channels, v_channels
        super().__init__(config, **kwargs)


class ScaledRotary(PairRotary):
    """What Megatron's multi-latent attention calls where its `rope_type` is "yarn": it returns the factor too.

    Attributes:
        attention_factor: what cosine and sine are multiplied by.
    """

    attention_factor: float

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:  # type: ignore[override]
        """The angles, as `PairRotary` makes them, and the attention factor."""
        return super().forward(*args, **kwargs), self.attention_factor


def use_latent_attention(attention: Any) -> None:
    """Replaces the parts of Megatron's local spec of this attention, a ModuleSpec, which is changed."""
    attention.module, parts = LatentAttention, attention.submodules
    parts.linear_q_up_proj = parts.linear_kv_up_proj = NormedColumnParallelLinear
    parts.q_layernorm = parts.kv_layernorm = IdentityOp
    parts.core_attention = LatentPackedAttention


def set_latent_rotary(attention: Any, frequencies: Tensor, factor: float) -> None:
    """Gives an attention of a built layer, of either spec, the frequencies and the attention factor of the model.

    Args:
        attention: a `MLASelfAttention`, which was built with the `rope_type` "rope".
        frequencies: [rotated dimensions / 2] float32.
        factor: what cosine and sine are multiplied by.
    """
    rotary = attention.rotary_pos_emb
    replace_frequencies(rotary, frequencies)
    if factor != 1.0:
        rotary.__class__, rotary.attention_factor = ScaledRotary, factor
        attention.config = copy(attention.config)
        attention.config.rope_type = "yarn"  # with it the attention asks for the factor
