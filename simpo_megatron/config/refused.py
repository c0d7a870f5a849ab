"""Fields of Megatron's configurations that preferences cannot use, and those that this package sets itself.

The pass-through (`megatron.py`) refuses all of them. The plug for Megatron-LM (`megatron_lm.py`) refuses what `BREAKS`
names.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from simpo_megatron.settings import flag

_FSDP = "the head adds to the buffers of Megatron's DDP; use --use-distributed-optimizer"
_BACKWARD = "it splits the backward pass, which the head needs whole; drop it"
_GRAPH = "a CUDA graph has one shape, and packed rows change in length; set it to none"
# What must be off: the field, and why or what to do. Megatron-LM has arguments of the same names.
BREAKS: dict[str, str] = {
    "use_megatron_fsdp": _FSDP,
    "use_torch_fsdp2": _FSDP,
    "defer_embedding_wgrad_compute": "it waits for activations that the head does not keep; drop it",
    "tp_comm_overlap": "its buffers have one size, and packed rows change in length; drop it",
    "fp8": "FP8 needs rows of a multiple of 16 tokens, and packed rows have any length; use --bf16",
    "fp4": "FP4 needs rows of a multiple of 32 tokens, and packed rows have any length; use --bf16",
    "overlap_moe_expert_parallel_comm": _BACKWARD,
    "delay_wgrad_compute": _BACKWARD,
    "cuda_graph_impl": _GRAPH,
    "hybrid_context_parallel": "it cuts rows by a plan of its own; use --context-parallel-size alone",
}
# The flag that sets a field, where it is not the name of the field.
_FLAGS = {
    "fp8": "--fp8-format",
    "virtual_pipeline_model_parallel_size": "--num-layers-per-virtual-pipeline-stage",
    "num_layers_in_first_pipeline_stage": "--decoder-first-pipeline-num-layers",
    "num_layers_in_last_pipeline_stage": "--decoder-last-pipeline-num-layers",
    "apply_rope_fusion": "--rope-fusion",
}
_OWN_FLAGS = (
    *_FLAGS,
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "sequence_parallel"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "cp_comm_type", "variable_seq_lengths"),
    *("recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules"),
    *("deterministic_mode", "transformer_impl", "fp8_recipe"),
    *("gradient_accumulation_fusion", "moe_permute_fusion", "attention_backend", "moe_aux_loss_coeff", "bf16"),
    *("overlap_grad_reduce", "overlap_param_gather", "use_distributed_optimizer"),
    *("use_precision_aware_optimizer", "main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"),
    *("optimizer_cpu_offload", "optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"),
    *("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad"),
)
_SPLIT = ("pipeline_model_parallel_layout", "account_for_*_in_pipeline_split")
# Patterns of names, and why. The first one that fits counts.
_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a CUDA graph has one shape, and packed rows change in length", ("*cuda_graph*",)),
    ("FP4 needs rows of a multiple of 32 tokens, and packed rows have any length", ("*fp4*", "*kitchen*")),
    (
        "weights are loaded, saved and exported in bf16, and attention in FP8 has no packed rows",
        ("fp8_param*", "fp8_*_attention", "*fp8_param_ag", "fp8_quantizer_factory", "*fp8_input_store"),
    ),
    (
        "the head adds to the buffers of Megatron's DDP, which FSDP does not have",
        ("*fsdp*", "data_parallel_sharding_strategy", "outer_dp_sharding_strategy"),
    ),
    (
        "Megatron plans it in the first step for one number and one length of microbatches, and those of packed rows "
        "change; use --recompute-granularity",
        ("fine_grained_activation_offloading", "offload_modules", "min_offloaded_tensor_size"),
    ),
    ("the process groups are built for one instance", ("num_distributed_optimizer_instances",)),
    (
        "the two responses of a pair must not see different noise",
        ("hidden_dropout", "attention_dropout", "moe_input_jitter_eps", "moe_router_force_load_balancing"),
    ),
    (
        "an expert that is full would drop tokens, so a log-prob would depend on the other pairs of its packed row",
        ("moe_expert_capacity_factor", "moe_token_dropping", "moe_token_drop_policy", "moe_pad_expert_input_*"),
    ),
    (
        "only the loss of --moe-aux-loss-coeff is made a mean over the packed rows that hold pairs",
        ("moe_z_loss_coeff", "moe_router_load_balancing_type"),
    ),
    (
        "rows of the expert-parallel ranks differ in length, which alltoall alone serves",
        ("moe_token_dispatcher_type", "moe_enable_deepep", "moe_flex_*"),
    ),
    ("the loss is a mean over pairs", ("calculate_per_token_loss", "cross_entropy_*")),
    ("the head scores one token ahead", ("mtp_*",)),
    ("it follows from --bf16 or --fp32", ("params_dtype", "pipeline_dtype", "enable_autocast", "autocast_dtype")),
    ("a log-prob sum leaves fp16's range, so there is no loss scaling", ("fp16", "*loss_scale*", "hysteresis")),
    ("every weight is loaded", ("*init_method*", "perform_initialization", "use_cpu_initialization", "init_model_*")),
    ("it follows from --transformer-impl", ("moe_grouped_gemm", "moe_use_legacy_grouped_gemm")),
    ("it is not of training", ("*inference*", "flash_decode", "test_mode", "mlp_chunks_for_prefill")),
    (
        "nothing here uses it",
        (
            *("timers", "barrier_with_L1_time", "log_num_zeros_in_grad", "log_max_attention_logit", "moe_per_layer_*"),
            *("async_tensor_model_parallel_allreduce", "moe_extended_tp", "moe_enable_routing_replay", "use_te_rng_*"),
            *("pipeline_model_parallel_comm_backend", "hierarchical_*", "max_seqlen_per_dp_cp_rank"),
            *("masked_softmax_fusion", "attention_softmax_in_fp32", "persist_layer_norm", "memory_efficient_*"),
            *("gradient_reduce_div_fusion", "suggested_communication_*", "preserve_fp32_weights"),
            "use_fused_weighted_squared_relu",
        ),
    ),
    ("it belongs to --tp-comm-overlap, which packed rows cannot use", ("tp_comm_*",)),
    ("it belongs to a split backward pass, which the head cannot use", ("wgrad_deferral_limit", "ep_overlap_*")),
    ("it belongs to a dispatcher of experts that is not used here", ("moe_deepep_*", "moe_hybridep_*")),
    ("Megatron's fused form has no packed rows", ("fused_single_qkv_rope",)),
    ("the package splits the layers itself (--decoder-first-pipeline-num-layers)", (*_SPLIT,)),
    ("layers are not moved to the host as a whole (recompute them: --recompute-granularity)", ("*cpu_offloading*",)),
    ("the loop here takes the step of the whole optimizer at once", ("overlap_param_gather_with_optimizer_step",)),
    ("it needs a build of torch with a ring exchange", ("use_ring_exchange_p2p",)),
    ("the MLP of all models here is gated, by SiLU", ("use_te_activation_func",)),
    ("it is an object, which no text can be", ("*_func", "quant_recipe")),
    (
        "this package has checkpoints, schedule and loss for Adam alone",
        ("optimizer", "sgd_*", "muon_*", "decoupled_*lr"),
    ),
    (
        "it is a property of the model, which the Hugging Face checkpoint gives",
        (
            *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels"),
            *("softmax_*", "apply_residual_connection_*", "layernorm_*", "add_*", "gated_linear_unit", "glu_*"),
            *("activation_func*", "num_moe_experts", "rotary_*", "window_*", "normalization", "qk_*", "mrope_*"),
            *("attention_output_gate", "multi_latent_attention", "no_rope_freq", "experimental_attention_*", "dsa_*"),
            *("linear_*", "mamba_*", "is_hybrid_model", "heter*", "apply_query_key_*", "moe_shared_expert_*"),
            *("moe_layer_freq", "moe_ffn_*", "moe_router_topk*", "moe_router_num_groups", "moe_router_group_topk"),
            *("moe_router_pre_softmax", "moe_router_score_function", "moe_router_*bias*", "moe_latent_size"),
            *("moe_apply_probs_on_input",),
        ),
    ),
)


def _reasons(name: str) -> Iterator[str]:
    if name in _OWN_FLAGS:
        yield f"this package sets it; use {_FLAGS.get(name, flag(name))}"
    if name in BREAKS:
        yield BREAKS[name]
    for why, patterns in _GROUPS:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            yield f"{why}; drop it"


def reason(name: str) -> str | None:
    """Why a field of Megatron's configurations cannot be passed through, and what to do; None if it can.

    >>> reason("bucket_size"), reason("lr")
    (None, 'this package sets it; use --lr')
    """
    return next(_reasons(name), None)
