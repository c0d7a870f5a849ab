"""The TransformerConfig of a Hugging Face checkpoint and the GPTModels of this rank, with weights still to be loaded.

hf = read_hf_checkpoint(path)
config = transformer_config(hf, bf16=True, tensor_model_parallel_size=8, sequence_parallel=True)
models = build_model(hf, config)          # one a virtual pipeline stage; parallel_state is initialised
load_hf_weights(models, hf)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from simpo_megatron.batch.shared_prompts import PairRotary
from simpo_megatron.compat import have_fused_weight_gradient
from simpo_megatron.errors import UserError
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.placement import place_parameters
from simpo_megatron.models.rope import Rope
from simpo_megatron.models.spec import use_transformer_engine
from simpo_megatron.parallel.limits import check_layout
from simpo_megatron.parallel.stages import VOCAB_DIVISOR, padded_vocab_size


def transformer_config(
    hf: HFCheckpoint,
    *,
    bf16: bool,
    transformer_impl: str = "auto",
    gradient_accumulation_fusion: bool | None = None,
    **parallel: Any,
) -> TransformerConfig:
    """Megatron's config of a model and its layout.

    Args:
        hf: the checkpoint.
        bf16: parameters and activations in bfloat16, else float32.
        transformer_impl: "auto" (Transformer Engine where it is installed), "local" or "transformer_engine".
        gradient_accumulation_fusion: weight gradients straight into fp32; None where Apex's extension is installed.
        **parallel: fields of TransformerConfig: parallel sizes, recomputation, communication; they win.

    Raises:
        UserError: the layout does not divide the model, Megatron refuses it, or what is asked for is not installed.
    """
    model = hf.architecture.transformer
    check_layout(model, parallel)
    grouped = use_transformer_engine(transformer_impl)
    if grouped and "window_size" in model and parallel.get("context_parallel_size", 1) > 1:
        raise UserError(
            "Transformer Engine's context parallelism knows no sliding window; use --transformer-impl local, or "
            "--context-parallel-size 1"
        )
    dtype = torch.bfloat16 if bf16 else torch.float32
    on_gpu = torch.empty(0, device=torch.cuda.current_device()).is_cuda
    fusable = on_gpu and have_fused_weight_gradient()
    if gradient_accumulation_fusion and not fusable:
        raise UserError(
            "--gradient-accumulation-fusion needs a GPU and Apex's extension fused_weight_gradient_mlp_cuda; drop the flag"
        )
    fields: dict[str, Any] = {
        "bf16": bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,  # every weight is loaded
        "bias_activation_fusion": on_gpu,  # these two are compiled, which pays on a GPU alone
        "bias_dropout_fusion": on_gpu,
        "masked_softmax_fusion": False,  # of an attention that is not used here
        "persist_layer_norm": False,
        "moe_token_dispatcher_type": "alltoall",  # Megatron asks for it with variable_seq_lengths, experts or not
        "moe_router_dtype": "fp32",  # which experts are chosen turns on small differences
        "moe_grouped_gemm": "num_moe_experts" in model and grouped,
        "cuda_graph_scope": [],  # the default is deprecated, and says so
        "gradient_accumulation_fusion": fusable
        if gradient_accumulation_fusion is None
        else gradient_accumulation_fusion,
    }
    if parallel.get("virtual_pipeline_model_parallel_size"):
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    try:
        return TransformerConfig(**{**fields, **model, **parallel})
    except (ValueError, AssertionError) as error:
        raise UserError(f"Megatron refuses this layout for {hf.path}: {error}") from error


def build_model(
    hf: HFCheckpoint,
    config: TransformerConfig,
    *,
    transformer_impl: str = "auto",
    make_vocab_size_divisible_by: int = VOCAB_DIVISOR,
) -> list[GPTModel]:
    """Builds what this rank holds of the model, on its device, with uninitialised weights in `config.params_dtype`.

    Collectives: where embedding and output are tied and on different stages, one all-reduce over the embedding group.

    Args:
        hf: the checkpoint.
        config: from `transformer_config`; `parallel_state` is initialised for the same sizes.
        transformer_impl: "auto" (Transformer Engine where it is installed), "local" or "transformer_engine".
        make_vocab_size_divisible_by: the vocabulary is padded to a multiple of this times the tensor-parallel size.

    Returns:
        One model for every virtual pipeline stage of this rank; one where there are none.

    Raises:
        UserError: Transformer Engine is asked for and not installed.
    """
    virtual = config.virtual_pipeline_model_parallel_size
    models = []
    for vp_stage in range(virtual) if virtual else (None,):
        model = GPTModel(
            config,
            hf.architecture.family.layer_spec(config, transformer_impl, vp_stage),
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
        # Megatron knows one of the scalings, with three of its four values fixed: set the frequencies themselves.
        rotary: Any = model.rotary_pos_emb
        rotary.__class__ = PairRotary  # the same buffers; it can read positions from the row
        model.rotary_pos_emb.inv_freq = inverse_frequencies(hf.architecture.rope, config.kv_channels or 0)
        _mark_parameters(model, hf.architecture)
        models.append(model)
    return models


def inverse_frequencies(rope: Rope, dim: int) -> Tensor:
    """The rotary frequencies in radians a token, [dim / 2] float32 on this rank's device.

    Computed on the CPU in float32, as transformers does (`modeling_rope_utils.py`): at long contexts another rounding of
    the frequencies turns the angles measurably.
    """
    frequency = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        turns = rope.original_max_position_embeddings / wavelength
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        between = (1 - keep) * frequency / rope.factor + keep * frequency
        scaled = torch.where(turns < rope.low_freq_factor, frequency / rope.factor, between)
        frequency = torch.where(turns > rope.high_freq_factor, frequency, scaled)
    return frequency.to(torch.cuda.current_device())


def _mark_parameters(model: GPTModel, architecture: Architecture) -> None:
    """Says how parameters are split and shared, where Megatron did not (`tensor_parallel/layers.py`).

    Its layers say which are split over the tensor-parallel ranks while they initialise, which is turned off; unsaid, the
    gradient norm would leave out the split parameters of every rank but the first. And they take experts for dense weights
    where expert_model_parallel_size is 1: with another expert-tensor than tensor size, gradients of different shards would
    then be averaged.
    """
    for place in place_parameters(model, architecture.weights, tied=architecture.tied):
        parameter: Any = place.parameter
        if place.weight.tp_dim is not None and not hasattr(parameter, "tensor_model_parallel"):
            weight = place.weight
            set_tensor_model_parallel_attributes(parameter, True, weight.tp_dim, weight.part_layout.stride)
        if place.weight.experts:
            parameter.allreduce = False
