"""The TransformerConfig of a Hugging Face checkpoint, and the GPTModels of this rank. `load.py` then fills the weights.

hf = read_hf_checkpoint(path)
config = transformer_config(hf, bf16=True, tensor_model_parallel_size=8, sequence_parallel=True)
models = build_model(hf, config)          # one for every model chunk; parallel_state is initialised
load_hf_weights(models, hf)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from simpo_megatron import compat
from simpo_megatron.errors import UserError, one_line
from simpo_megatron.head.kernels import soft_cap
from simpo_megatron.models import layer_limits
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.fusions import Kernels, kernel_fields, on_gpu, plain_output_layer
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.latent_attention import set_latent_rotary
from simpo_megatron.models.placement import count_once, place_parameters
from simpo_megatron.models.rope import inverse_frequencies
from simpo_megatron.models.rotary import set_rotary
from simpo_megatron.models.routing import rank_groups
from simpo_megatron.models.spec import use_transformer_engine
from simpo_megatron.models.weight_table import WeightEntry
from simpo_megatron.parallel.limits import check_layout
from simpo_megatron.parallel.stages import VOCAB_DIVISOR, padded_vocab_size

_AUTO = Kernels()


def transformer_config(
    hf: HFCheckpoint,
    *,
    bf16: bool,
    transformer_impl: str = "auto",
    kernels: Kernels = _AUTO,
    **parallel: Any,
) -> TransformerConfig:
    """Megatron's config of a model and its parallel layout.

    Args:
        hf: the checkpoint.
        bf16: parameters and activations in bfloat16, else in float32.
        transformer_impl: "auto" (Transformer Engine where it is installed), "local" or "transformer_engine".
        kernels: the fused kernels and the attention to run with.
        **parallel: fields of TransformerConfig for parallel sizes, recomputation and communication. They win over the
            values set here.

    Raises:
        UserError: the layout does not divide the model, Megatron refuses it, or what is asked for is not installed.
    """
    model = hf.architecture.transformer
    check_layout(model, parallel)
    if model["num_query_groups"] < parallel.get("tensor_model_parallel_size", 1):
        compat.check_cut_query_groups()
    transformer_engine, experts = use_transformer_engine(transformer_impl), hf.architecture.num_experts is not None
    if parallel.get("context_parallel_size", 1) > 1:
        layer_limits.check_context_attention(transformer_engine, parallel.get("cp_comm_type"), "window_size" in model)
    layer_limits.check_additions(transformer_engine, hf.architecture.additions)
    layer_limits.check_heads(hf.architecture, parallel.get("tensor_model_parallel_size", 1))
    layer_limits.check_recomputed(transformer_engine, experts, parallel.get("recompute_modules") or ())
    dtype = torch.bfloat16 if bf16 else torch.float32
    fields: dict[str, Any] = {
        "bf16": bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": _activation(hf.architecture.additions.activation),
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,  # every weight is loaded
        # These two are compiled, which is slower on a CPU. Of the gated activations, Megatron fuses SwiGLU.
        "bias_activation_fusion": on_gpu() and hf.architecture.additions.activation == "silu",
        "bias_dropout_fusion": on_gpu() and not hf.architecture.has_whole_experts,  # these add biases of their own
        "masked_softmax_fusion": False,  # belongs to an attention that is not used here
        "persist_layer_norm": False,
        "moe_token_dispatcher_type": "alltoall",  # the rows of the expert-parallel ranks differ in length
        "moe_router_dtype": "fp32",  # small differences decide which experts are chosen
        "moe_grouped_gemm": experts and transformer_engine,
        "cuda_graph_scope": [],  # the default is deprecated, and Megatron warns about it
        **kernel_fields(kernels, transformer_engine, experts, _turns_halves(hf.architecture)),
    }
    if hf.architecture.additions.qk_norm_over_heads and hasattr(TransformerConfig, "qk_l2_norm"):
        # From 0.18 on Megatron refuses norms of queries and keys unless its config has some. With `qk_layernorm` it
        # would sum their gradients over the tensor-parallel ranks. This one changes nothing where a spec names norms.
        fields["qk_l2_norm"] = True
    # As Megatron-LM does it (`arguments.py`): the interleaved schedule sends while it computes, the other cannot.
    overlap = parallel.get("overlap_p2p_comm", bool(parallel.get("virtual_pipeline_model_parallel_size")))
    fields |= {"overlap_p2p_comm": overlap, "batch_p2p_comm": not overlap}
    # What was sent to the next stage is not read again. But gloo reads it after an overlapped send has returned.
    fields["deallocate_pipeline_outputs"] = on_gpu() or not overlap
    try:
        if model.get("multi_latent_attention"):
            # Megatron's own YaRN is not used: the frequencies are replaced (`_set_rotary`).
            return MLATransformerConfig(**{**fields, **model, "rope_type": "rope", **parallel})
        return TransformerConfig(**{**fields, **model, **parallel})
    except (ValueError, AssertionError) as error:
        raise UserError(f"Megatron refuses this layout for {hf.path}: {one_line(error)}") from error


def _turns_halves(architecture: Architecture) -> bool:
    """Whether the rotary embedding turns the halves of a head, and no more."""
    _, factor = inverse_frequencies(architecture.rope, architecture.rotary_head_dim)
    model = architecture.transformer
    return factor == 1.0 and not model.get("rotary_interleaved") and not model.get("multi_latent_attention")


@cache
def _activation(name: str) -> Any:
    """The function of torch for a name of transformers; one object a name, because Megatron compares it with `is`."""
    if name == "silu":
        return torch.nn.functional.silu
    from transformers.activations import ACT2FN

    return ACT2FN[name].forward  # Megatron would take a module for a part of the model with a state


def build_model(
    hf: HFCheckpoint,
    config: TransformerConfig,
    *,
    transformer_impl: str = "auto",
    make_vocab_size_divisible_by: int = VOCAB_DIVISOR,
) -> list[GPTModel]:
    """Builds this rank's part of the model on its device, with uninitialised weights in `config.params_dtype`.

    Collectives: one all-reduce over the embedding group where a tied embedding and output layer are on different
    stages.

    Args:
        hf: the checkpoint.
        config: from `transformer_config`; `parallel_state` is initialised for the same sizes.
        transformer_impl: "auto" (Transformer Engine where it is installed), "local" or "transformer_engine".
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times the tensor-parallel size.

    Returns:
        One model for every virtual pipeline stage of this rank; one model where the schedule is not interleaved.

    Raises:
        UserError: Transformer Engine is asked for and not installed.
    """
    virtual, additions = config.virtual_pipeline_model_parallel_size, hf.architecture.additions
    models = []
    for vp_stage in range(virtual) if virtual else (None,):
        model = GPTModel(
            config,
            hf.architecture.family.layer_spec(additions, config, transformer_impl, vp_stage),
            vocab_size=padded_vocab_size(
                hf.architecture.vocab_size, config.tensor_model_parallel_size, make_vocab_size_divisible_by
            ),
            max_sequence_length=hf.architecture.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_output=True,
            share_embeddings_and_output_weights=hf.architecture.tied,
            position_embedding_type="rope",
            rotary_base=hf.architecture.rope.theta,  # type: ignore[arg-type]
            vp_stage=vp_stage,
        )
        _set_rotary(model, hf.architecture)
        if additions.group_best is not None:
            rank_groups(model, additions.group_best)
        if additions.embedding_scale is not None and model.pre_process:
            model.embedding.register_forward_hook(partial(_scale_embedding, additions.embedding_scale))
        if additions.logit_softcap is not None and model.post_process:
            output_layer: Any = model.output_layer
            output_layer.softcap = additions.logit_softcap  # `LogProbHead` reads it, and caps by itself
            output_layer.register_forward_hook(_cap_logits)
        _set_dtype(model, config.params_dtype)
        mark_parameters(model, hf.architecture.weights, tied=hf.architecture.tied)
        plain_output_layer(model)
        models.append(model)
    return models


def _set_rotary(model: Any, architecture: Architecture) -> None:
    """Gives the attention of a model the rotary frequencies of its architecture."""
    if not architecture.transformer.get("multi_latent_attention"):
        set_rotary(model, architecture.rope, architecture.additions.window_rope_theta)
        return
    frequencies, factor = inverse_frequencies(architecture.rope, architecture.rotary_head_dim)
    for layer in model.decoder.layers:
        set_latent_rotary(layer.self_attention, frequencies, factor)


def _set_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Gives every parameter its dtype: Transformer Engine makes sinks in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _scale_embedding(scale: float, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """A forward hook: the embeddings times `scale`, which transformers rounds to the dtype of the weight."""
    del module, inputs
    return output * torch.tensor(scale, dtype=output.dtype, device=output.device)


def _cap_logits(layer: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    """A forward hook of the output layer: the capped logits, in their dtype, as transformers computes them."""
    del inputs
    return soft_cap(output[0], layer.softcap), output[1]


def mark_parameters(model: torch.nn.Module, table: Sequence[WeightEntry], *, tied: bool) -> None:
    """Sets the attributes that tell Megatron how a parameter is split and shared, where Megatron has not set them.

    Megatron's layers mark the parameters that are split over the tensor-parallel ranks while they initialise them,
    which is turned off here (`tensor_parallel/layers.py`). Without the marks the gradient norm would count only the
    first rank's share of a split parameter.

    Megatron also takes experts for dense weights where expert_model_parallel_size is 1. Where the
    expert-tensor-parallel size differs from the tensor-parallel size, it would then average gradients of different
    shards. And Transformer Engine marks every linear layer as split, also those that are whole on every rank, which the
    gradient norm would then count several times.

    Args:
        model: a GPTModel of this rank.
        table: the weight table, with an entry for every parameter.
        tied: whether the output layer is the embedding.
    """
    for place in place_parameters(model, table, tied=tied):
        parameter: Any = place.parameter
        entry = place.entry
        if entry.tp_dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, entry.tp_dim, entry.part_layout.stride)
        if entry.tp_dim is None and getattr(parameter, "tensor_model_parallel", False):
            parameter.tensor_model_parallel = False
        if entry.experts:
            parameter.allreduce = False
            # Megatron marks the bias of a row-parallel layer. Its expert-data-parallel ranks have summed its gradient.
            parameter.sequence_parallel = False
            if entry.tp_dim is None:
                count_once(parameter, place.group)
