"""Layouts that a model cannot have, each refused with the nearest values that it can have.

Megatron would refuse some of them with an assertion, and would train others with wrong numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from simpo_megatron.errors import UserError
from simpo_megatron.parallel.context import round_up, sequence_multiple
from simpo_megatron.parallel.stages import divisors, join_or, stage_layers, virtual_stages
from simpo_megatron.settings import flag

if TYPE_CHECKING:
    from simpo_megatron.parallel.config import ParallelConfig


def layout_arguments(parallel: ParallelConfig, num_layers: int) -> dict[str, Any]:
    """A parallel layout as arguments of Megatron's TransformerConfig.

    Args:
        parallel: the layout.
        num_layers: of the model.

    Raises:
        UserError: virtual stages, or the blocks of recomputation, do not divide the layers.
    """
    stages = parallel.pipeline_model_parallel_size
    virtual = virtual_stages(num_layers, stages, parallel.num_layers_per_virtual_pipeline_stage)
    layers = num_layers // (stages * virtual)
    if parallel.recompute_method == "uniform" and layers % (parallel.recompute_num_layers or 1):
        raise UserError(
            f"--recompute-num-layers {parallel.recompute_num_layers} does not divide the {layers} layers of a virtual "
            f"stage; use {join_or(divisors(layers))}, or --recompute-method block"
        )
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "num_layers_in_first_pipeline_stage": parallel.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": parallel.decoder_last_pipeline_num_layers,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "recompute_granularity": parallel.recompute_granularity,
        "recompute_method": parallel.recompute_method,
        "recompute_num_layers": parallel.recompute_num_layers,
        "recompute_modules": None if parallel.recompute_modules is None else list(parallel.recompute_modules),
        "cp_comm_type": parallel.cp_comm_type,
    }


def check_layout(model: dict[str, Any], parallel: dict[str, Any]) -> None:
    """Checks a layout against a model.

    Args:
        model: the arguments of TransformerConfig that describe the architecture (`Architecture.transformer`).
        parallel: the arguments that describe the layout; one that is absent has Megatron's default.

    Raises:
        UserError: the layout does not divide the model, or Megatron would train it wrongly.
    """
    _check_tensor_parallel(model, parallel)
    _check_context_parallel(model, parallel)
    if model.get("num_moe_experts") is None:
        _check_no_experts(parallel)
    else:
        _check_experts(model, parallel)
    _check_interleaving(parallel)
    _check_recomputed(model, parallel)
    if parallel.get("pipeline_model_parallel_layout") is None:  # else Megatron checks it
        stages = stage_layers(
            model["num_layers"],
            parallel.get("pipeline_model_parallel_size", 1),
            parallel.get("virtual_pipeline_model_parallel_size") or 1,
            parallel.get("num_layers_in_first_pipeline_stage"),
            parallel.get("num_layers_in_last_pipeline_stage"),
        )
        _check_experts_of_stages(model.get("moe_layer_freq"), stages)


def _check_tensor_parallel(model: dict[str, Any], parallel: dict[str, Any]) -> None:
    tp = parallel.get("tensor_model_parallel_size", 1)
    keys = ["num_attention_heads"]
    if _has_dense_layers(model):  # experts have a size of their own: `_check_experts`
        keys.append("ffn_hidden_size")
    sizes, groups = {key: model[key] for key in keys}, model["num_query_groups"]
    legal = [size for size in divisors(math.gcd(*sizes.values())) if _divides_groups(model, size)]
    for key, size in sizes.items():
        if size % tp:
            raise UserError(f"--tensor-model-parallel-size {tp} does not divide {key} {size}; use {join_or(legal)}")
    if tp not in legal:
        raise UserError(
            f"--tensor-model-parallel-size {tp} neither divides num_query_groups {groups} nor cuts each query group "
            f"into equal parts; use {join_or(legal)}"
        )
    if parallel.get("sequence_parallel") and tp == 1:
        raise UserError("--sequence-parallel needs --tensor-model-parallel-size above 1; drop it, or split the tensors")


def _divides_groups(model: dict[str, Any], tp: int) -> bool:
    """Whether the ranks hold whole query groups, or each an equal part of one, its rows of q, k and v counted together.

    The ranks that share a group gather its projection (`transformer/attention.py`).
    """
    groups = model["num_query_groups"]
    rows = (model["num_attention_heads"] + 2 * groups) * model["kv_channels"]
    return groups % tp == 0 or (tp % groups == 0 and rows % tp == 0)


def _has_dense_layers(model: dict[str, Any]) -> bool:
    return model.get("num_moe_experts") is None or 0 in model.get("moe_layer_freq", ())


def _check_context_parallel(model: dict[str, Any], parallel: dict[str, Any]) -> None:
    """Refuses an all-to-all that cannot divide the heads: Transformer Engine would assert in the first step."""
    context, tensor = parallel.get("context_parallel_size", 1), parallel.get("tensor_model_parallel_size", 1)
    groups = model["num_query_groups"]
    if context > 1 and parallel.get("cp_comm_type") == "a2a" and groups % (context * tensor):
        raise UserError(
            f"--cp-comm-type a2a deals the heads to the context-parallel ranks: --context-parallel-size {context} x "
            f"--tensor-model-parallel-size {tensor} does not divide num_query_groups {groups}; use p2p or all_gather"
        )


def _check_no_experts(parallel: dict[str, Any]) -> None:
    """Refuses what needs experts, for a dense model."""
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if (size := parallel.get(name) or 1) > 1:
            raise UserError(f"{flag(name)} {size} needs a model with experts; this one is dense, drop the flag")
    if coefficient := parallel.get("moe_aux_loss_coeff", 0):
        raise UserError(f"--moe-aux-loss-coeff {coefficient:g} needs a model with experts; this one is dense, drop it")


def _check_experts(model: dict[str, Any], parallel: dict[str, Any]) -> None:
    experts, ffn = model["num_moe_experts"], model["moe_ffn_hidden_size"]
    size, tensor = parallel.get("expert_model_parallel_size", 1), parallel.get("tensor_model_parallel_size", 1)
    given = parallel.get("expert_tensor_parallel_size")
    ranks = given or tensor  # that an expert is split over
    if experts % size:
        raise UserError(
            f"--expert-model-parallel-size {size} does not divide the {experts} experts of a layer; use "
            f"{join_or(divisors(experts))}"
        )
    if model.get("add_bias_linear") and ranks > 1:  # asserted by `TransformerConfig.__post_init__`
        raise UserError(
            f"--expert-tensor-parallel-size {given or f'is {tensor}, the tensor-parallel size'}: the experts of this "
            "model have biases, which Megatron does not split; give --expert-tensor-parallel-size 1"
        )
    if ffn % ranks:
        name = "--expert-tensor-parallel-size" if given else "--tensor-model-parallel-size, which splits experts too,"
        raise UserError(
            f"{name} {ranks} does not divide moe_ffn_hidden_size {ffn}; give --expert-tensor-parallel-size "
            f"{join_or(n for n in divisors(ffn) if n <= max(tensor, ranks))}"
        )
    if tensor > 1 and not parallel.get("sequence_parallel"):
        raise UserError(
            f"--tensor-model-parallel-size {tensor} of a model with experts needs --sequence-parallel: without it "
            "Megatron does not train experts; add it"
        )


def _check_experts_of_stages(pattern: list[int] | None, stages: list[list[range]]) -> None:
    """Refuses a stage with dense layers alone where others have experts.

    Megatron's optimizer of the experts is empty there. Rank 0 writes for all how many steps it has taken, and an empty
    one does not know; with torch's Adam it asserts (`distrib_optimizer.py`, `state_dict`).
    """
    if not pattern or not any(pattern):
        return
    for stage, chunks in enumerate(stages):
        if not any(pattern[layer] for layers in chunks for layer in layers):
            layers = ", ".join(str(layer) for chunk in chunks for layer in chunk)
            raise UserError(
                f"pipeline stage {stage} would hold the layers {layers}, which have no experts: Megatron cannot save "
                "the optimizer of the experts then; use a smaller --pipeline-model-parallel-size, or give that stage "
                "more layers (--decoder-first-pipeline-num-layers)"
            )


def _check_interleaving(parallel: dict[str, Any]) -> None:
    """Refuses virtual stages where Megatron cannot run them."""
    if not parallel.get("virtual_pipeline_model_parallel_size"):
        return
    stages = parallel.get("pipeline_model_parallel_size", 1)
    overlapped = parallel.get("overlap_p2p_comm", True) and not parallel.get("batch_p2p_comm", False)
    if stages == 1:
        raise UserError("virtual pipeline stages need --pipeline-model-parallel-size above 1; drop them, or add stages")
    if stages == 2 and not overlapped:
        raise UserError(
            "virtual pipeline stages on 2 pipeline ranks need overlap_p2p_comm and no batch_p2p_comm: Megatron would "
            "swap the tensors of the two directions; leave both unset"
        )


def _check_recomputed(model: dict[str, Any], parallel: dict[str, Any]) -> None:
    """Refuses modules of --recompute-modules that the model does not have: Megatron would raise, or ignore them."""
    experts, dense = "a model with experts, and this one is dense", "a dense model, and all layers here have experts"
    shared, latent = model.get("moe_shared_expert_intermediate_size"), model.get("multi_latent_attention")
    lacking = {
        **({} if latent else {"mla_up_proj": "multi-latent attention, which this model does not have"}),
        **({} if shared else {"shared_experts": "shared experts, which this model does not have"}),
        **({"moe": experts, "moe_act": experts} if model.get("num_moe_experts") is None else {}),
        **({} if _has_dense_layers(model) else {"mlp": dense}),
    }
    for name in parallel.get("recompute_modules") or ():
        if name in lacking:
            raise UserError(f"--recompute-modules {name} needs {lacking[name]}; drop it")


def check_shared_prompts(responses: int, context_parallel_size: int, transformer_engine: bool) -> None:
    """Checks that the two responses of a pair can share their prompt.

    Args:
        responses: scored responses of a pair.
        context_parallel_size: ranks that share every sequence.
        transformer_engine: whether the layers are Transformer Engine's.

    Raises:
        UserError: they cannot; the error names what to drop.
    """
    for conflict, why in (
        (responses == 1, "the objective scores the chosen response alone, so there is nothing to share; drop it"),
        (
            context_parallel_size > 1,
            f"there is no attention for it under --context-parallel-size {context_parallel_size}; drop one of them",
        ),
        (
            transformer_engine,
            "Transformer Engine's attention cannot let two responses see one prompt; use --transformer-impl local, or "
            "drop --share-prompts",
        ),
    ):
        if conflict:
            raise UserError(f"--share-prompts: {why}")


def check_rows(seq_length: int, parallel: ParallelConfig, row_multiple: int = 1) -> None:
    """Checks that context and sequence parallelism can cut packed rows of this length, and that FP8 can multiply them.

    Args:
        seq_length: tokens of a packed row.
        parallel: the layout.
        row_multiple: the number that divides the tokens which a rank multiplies (`MemoryConfig.row_multiple`).

    Raises:
        UserError: they cannot; the error names the nearest lengths that they can.
    """
    # Under context parallelism half of a row must hold a sequence of any length, padded to `sequence_multiple`.
    context, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    multiple, why = 2 * sequence_multiple(context), f"4 x --context-parallel-size {context}"
    if context == 1:
        multiple, why = 1, ""
    if parallel.sequence_parallel and not parallel.variable_seq_lengths:
        multiple = math.lcm(multiple, context * tensor)
        why += f"{' and ' if why else ''}--tensor-model-parallel-size {tensor}, which cuts rows of fixed length"
    if row_multiple > 1:
        ranks = context * (tensor if parallel.sequence_parallel else 1)
        multiple = math.lcm(multiple, row_multiple * ranks)
        why += f"{' and ' if why else ''}FP8 multiplies {row_multiple} tokens at a time"
        why += f" on each of {ranks} ranks" if ranks > 1 else ""
    below, above = seq_length // multiple * multiple, round_up(seq_length, multiple)
    near = " or ".join(str(n) for n in (below, above) if n)
    if seq_length % multiple:
        raise UserError(f"--seq-length {seq_length} must be a multiple of {multiple} ({why}); use {near}")


def _cuts(experts: bool, parallel: dict[str, Any]) -> list[dict[str, int]]:
    """The sizes whose product divides the processes: those of the dense layers, and those of the experts."""
    tensor, pipeline = parallel["tensor_model_parallel_size"], parallel["pipeline_model_parallel_size"]
    cuts = [
        {
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "context_parallel_size": parallel["context_parallel_size"],
        }
    ]
    if experts:
        cuts.append(
            {
                "expert_tensor_parallel_size": parallel["expert_tensor_parallel_size"] or tensor,
                "pipeline_model_parallel_size": pipeline,
                "expert_model_parallel_size": parallel["expert_model_parallel_size"],
            }
        )
    return cuts


def processes_needed(experts: bool, parallel: dict[str, Any]) -> int:
    """The number that divides the number of processes of a run.

    Args:
        experts: whether the model has experts.
        parallel: from `layout_arguments`.
    """
    return math.lcm(*(math.prod(cut.values()) for cut in _cuts(experts, parallel)))


def check_processes(world_size: int, experts: bool, parallel: dict[str, Any]) -> None:
    """Checks that a number of processes can be divided as a layout asks.

    Args:
        world_size: the number of processes.
        experts: whether the model has experts.
        parallel: from `layout_arguments`.

    Raises:
        UserError: it cannot; the error names the number that it must be a multiple of.
    """
    for cut in _cuts(experts, parallel):
        if world_size % math.prod(cut.values()):
            named = " x ".join(f"{flag(name)} {size}" for name, size in cut.items())
            raise UserError(
                f"{world_size} processes cannot be cut into {named}; start a multiple of "
                f"{processes_needed(experts, parallel)} (torchrun --nproc-per-node)"
            )
