"""The layers that a family builds unless it brings its own: Transformer Engine's, or Megatron's on plain torch.

Megatron's local layers lack two things that this package needs: a norm that works under sequence parallelism, which is
here, and attention over packed sequences, which is in `attention.py`. Everything else in them is Megatron's. What a
model computes beyond that (`additions.Additions`) is added to the layers of both kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from simpo_megatron import compat
from simpo_megatron.compat import have_transformer_engine
from simpo_megatron.errors import UserError
from simpo_megatron.models.additions import Additions
from simpo_megatron.models.attention import PackedAttention
from simpo_megatron.models.latent_attention import use_latent_attention
from simpo_megatron.models.norms import KeyNorm, QueryNorm
from simpo_megatron.models.rotary import WindowRopeAttention
from simpo_megatron.models.weight_table import POST_NORMS


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the arguments with which Megatron builds a norm; any other argument is an error.

    With `layernorm_zero_centered_gamma` the weight is added to 1, and the product is computed in fp32 and rounded once.

    Under sequence parallelism every tensor-parallel rank sees other tokens. Megatron therefore sums the gradients of
    parameters with the attribute `sequence_parallel` over the ranks (`distributed/finalize_model_grads.py`).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        """The normalised x, in its shape and dtype."""
        if not self.zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class PostNormAdd(torch.nn.Module):
    """Normalises the output of attention or feed-forward, then adds it to the residual.

    It stands where Megatron's layer adds to the residual (`self_attn_bda`, `mlp_bda`). The row-parallel layer before it
    has summed its output over the tensor-parallel ranks there; the norm of a part of the sum would be wrong.
    """

    def __init__(self, config: TransformerConfig, norm: Any) -> None:
        super().__init__()
        self.norm = build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """What Megatron calls with the output and its bias, the residual, and the probability of dropout (0)."""
        del training, fused
        return self._add

    def _add(self, output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        assert not dropout
        output, bias = output_and_bias
        # Megatron turns gradients on here even where nothing else has one: in evaluations, and where a forward pass is
        # computed again later. The norm's weight would then keep the activations of every layer.
        with torch.set_grad_enabled(output.requires_grad):
            return residual + self.norm(output if bias is None else output + bias)


class ExpertOutput(RowParallelLinear):
    """The second linear layer of an expert with a bias.

    Megatron's expert adds the bias to the output in place (`mlp.py`). Autograd forbids it for what a collective of one
    rank returns, so that it gets a copy.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's."""
        output, bias = super().forward(*args, **kwargs)
        return output.clone(), bias


@cache
def with_bias(linear: type) -> type:
    """A linear layer of Megatron or of Transformer Engine that has a bias whatever its config says."""

    class WithBias(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": True})

    return WithBias


def use_transformer_engine(transformer_impl: str) -> bool:
    """Whether the layers are Transformer Engine's.

    Args:
        transformer_impl: "auto" (where it is installed), "local" or "transformer_engine".

    Raises:
        UserError: Transformer Engine is asked for and not installed.
    """
    if transformer_impl == "transformer_engine" and not have_transformer_engine():
        raise UserError(
            "--transformer-impl transformer_engine, but Transformer Engine is not installed; use auto or local"
        )
    return transformer_impl != "local" and have_transformer_engine()


def layer_spec(
    additions: Additions, config: TransformerConfig, transformer_impl: str = "auto", vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The `transformer_layer_spec` of a GPTModel.

    Args:
        additions: of the model.
        config: of the model; `parallel_state` is initialised.
        transformer_impl: "auto" (Transformer Engine where it is installed), "local" or "transformer_engine".
        vp_stage: the virtual pipeline stage of this rank that the model is for; None where there is one.

    Raises:
        UserError: Transformer Engine is asked for and not installed, or cannot compute the model.
    """
    transformer_engine = use_transformer_engine(transformer_impl)
    if config.num_moe_experts is not None and not transformer_engine:
        compat.moe_without_transformer_engine()
    if config.multi_latent_attention and not transformer_engine:
        compat.latent_attention_without_transformer_engine()
    if "layernorm" in (config.recompute_modules or ()) and not transformer_engine:
        compat.norms_recomputed_without_transformer_engine()
    norm = _te_norm() if transformer_engine else RMSNorm
    specs = {}
    for experts in set(_expert_layers(config)):
        specs[experts] = (_te_layer if transformer_engine else _local_layer)(config, experts)
        if not additions.pre_norms:
            (_without_te_norms if transformer_engine else _without_norms)(specs[experts].submodules)
        _add(additions, config, specs[experts].submodules, norm)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    # With a layer spec alone Megatron would build its own final norm, which refuses sequence parallelism.
    return TransformerBlockSubmodules(
        layer_specs=[specs[_expert_layers(config)[layer]] for layer in layers],
        layer_norm=norm,  # type: ignore[arg-type]
    )


def _expert_layers(config: TransformerConfig) -> list[bool]:
    """Whether each layer of the model has experts."""
    if isinstance(config.moe_layer_freq, list):
        return list(map(bool, config.moe_layer_freq))
    return [config.num_moe_experts is not None] * config.num_layers


def _te_layer(config: TransformerConfig, experts: bool) -> ModuleSpec:
    """A layer of Transformer Engine, with or without experts."""
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
    )


def _local_layer(config: TransformerConfig, experts: bool) -> ModuleSpec:
    """A layer of Megatron on plain torch, with or without experts."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if experts else None,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
        multi_latent_attention=config.multi_latent_attention,
    )
    layer: Any = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    # Checkpoints have Transformer Engine's names, which both kinds of layers read. There too the norms before experts
    # and before latent attention are modules of their own.
    layer.sharded_state_dict_keys_map = {
        **({} if config.multi_latent_attention else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}),
        **({} if experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
    }
    if experts and config.add_bias_linear:
        layer.mlp.submodules.experts.submodules.linear_fc2 = ExpertOutput
    if config.multi_latent_attention:
        use_latent_attention(layer.self_attention)
        return spec
    attention: Any = layer.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def _without_norms(layer: Any) -> None:
    """Removes the norms before attention and feed-forward from the submodules of a layer on plain torch."""
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp


def _without_te_norms(layer: Any) -> None:
    """Removes them from Transformer Engine's dense layer, which computes them in the linear layers behind them."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    layer.self_attention.submodules.linear_qkv = layer.mlp.submodules.linear_fc1 = TEColumnParallelLinear


def _te_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _add(additions: Additions, config: TransformerConfig, layer: Any, norm: Any) -> None:
    """Adds to the submodules of a layer what the model has beyond Megatron's.

    Args:
        additions: of the model.
        config: of the model.
        layer: the submodules, which are changed.
        norm: the class of the layer's norms.
    """
    attention = layer.self_attention.submodules
    if additions.qk_norm_over_heads:
        attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm
    if additions.attention_output_bias:
        attention.linear_proj = with_bias(attention.linear_proj)
    if additions.mlp_bias:
        mlp = layer.mlp.submodules
        mlp.linear_fc1, mlp.linear_fc2 = with_bias(mlp.linear_fc1), with_bias(mlp.linear_fc2)
    if additions.post_norms:
        add = ModuleSpec(module=PostNormAdd, params={"config": config, "norm": norm})
        layer.self_attn_bda = layer.mlp_bda = add
        keys = {ours.removesuffix("weight"): key.removesuffix("weight") for key, ours in POST_NORMS.items()}
        layer.sharded_state_dict_keys_map = {**layer.sharded_state_dict_keys_map, **keys}
    if additions.window_rope_theta is not None:
        layer.self_attention.module = WindowRopeAttention
    if additions.attention_softcap is not None:
        attention.core_attention = ModuleSpec(PackedAttention, {"softcap": additions.attention_softcap})
