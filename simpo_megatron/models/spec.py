"""Megatron's transformer layers on plain torch, for machines without Transformer Engine.

Megatron's local layers lack two things this package needs: a norm that works under sequence parallelism, and attention
over packed sequences. Both are here; everything else is Megatron's.

Shapes: T tokens of a pack, n of one segment, S positions and B sequences where nothing is packed, H query heads and G
key heads of this rank, D head width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from simpo_megatron.compat import have_transformer_engine
from simpo_megatron.errors import UserError


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as Megatron builds and trains it.

    Under sequence parallelism every tensor-parallel rank sees other tokens, so Megatron sums the gradients of parameters
    that carry `sequence_parallel` over the ranks (`distributed/finalize_model_grads.py`).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(torch.nn.Module):
    """Causal attention within each segment of a pack; the signature of Megatron's DotProductAttention.

    One call of torch's scaled dot-product attention a segment: the cost grows with the segments, not with the pack.
    The attention mask is ignored, as Transformer Engine ignores it for causal attention. No collectives.

    Raises (when built):
        UserError: context parallelism or attention dropout, which this attention does not have.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise UserError(
                f"--context-parallel-size {config.context_parallel_size} needs Transformer Engine, which is not used "
                "here; install it, or set 1"
            )
        if config.attention_dropout:
            raise UserError(f"attention_dropout {config.attention_dropout} needs Transformer Engine; set it to 0")
        self.scale = softmax_scale
        self.window = config.window_size[0] + 1 if config.window_size else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            query: [T, H, D] packed, [S, B, H, D] otherwise, any float dtype; key and value with G heads.
            packed_seq_params: where the segments start; padded offsets win, as they do for the rotary embedding.

        Returns:
            [T, H * D] packed, [S, B, H * D] otherwise, in the dtype of query.
        """
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            out_BHSD = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out_BHSD.permute(2, 0, 1, 3).flatten(2)
        offsets = _host_offsets(packed_seq_params)
        if offsets[-1] != query.shape[0]:
            raise ValueError(f"cu_seqlens end at {offsets[-1]}, but the pack has {query.shape[0]} tokens")
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, H, T, D]
        outs = [
            self._attend(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop]).transpose(1, 2)
            for start, stop in pairwise(offsets)
            if stop > start
        ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return out.squeeze(0).flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of one segment, [B, H, n, D] with G key heads -> [B, H, n, D]."""
        n, window = q.shape[2], self.window
        gqa = q.shape[1] != k.shape[1]
        if window is None or n <= window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=gqa)
        # Blocks of `window` queries see at most 2 * window keys: no [n, n] mask, and time linear in n.
        blocks = []
        for start in range(0, n, window):
            stop, first = min(start + window, n), max(0, start - window + 1)
            distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
            mask = (distance >= 0) & (distance < window)
            blocks.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:stop],
                    k[:, :, first:stop],
                    v[:, :, first:stop],
                    attn_mask=mask,
                    scale=self.scale,
                    enable_gqa=gqa,
                )
            )
        return torch.cat(blocks, dim=2)


_offsets = WeakTensorKeyDictionary()


def _host_offsets(packed: PackedSeqParams) -> list[int]:
    """The segment offsets on the host, copied once for all layers of a microbatch: on a GPU each copy is a wait."""
    cu_seqlens = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    version, offsets = _offsets.get(cu_seqlens) or (None, [])
    if version != cu_seqlens._version:
        offsets = cu_seqlens.tolist()
        _offsets[cu_seqlens] = (cu_seqlens._version, offsets)
    return offsets


def use_transformer_engine(transformer_impl: str) -> bool:
    """What "auto", "local" or "transformer_engine" means on this machine.

    Raises:
        UserError: Transformer Engine is asked for and not installed.
    """
    if transformer_impl == "transformer_engine" and not have_transformer_engine():
        raise UserError(
            "--transformer-impl transformer_engine, but Transformer Engine is not installed; use auto or local"
        )
    return transformer_impl != "local" and have_transformer_engine()


def layer_spec(
    config: TransformerConfig, transformer_impl: str = "auto", vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The `transformer_layer_spec` of a GPTModel.

    Args:
        config: of the model; `parallel_state` is initialised.
        transformer_impl: "auto" (Transformer Engine where it is installed), "local" or "transformer_engine".
        vp_stage: the virtual pipeline stage of this rank the model is for.

    Raises:
        UserError: Transformer Engine is asked for and not installed.
    """
    if use_transformer_engine(transformer_impl):
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention: Any = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    # A bare layer spec would get Megatron's own final norm, which refuses sequence parallelism.
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config, vp_stage=vp_stage),
        layer_norm=RMSNorm,  # type: ignore[arg-type]
    )
