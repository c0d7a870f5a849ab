"""The parallel layout that the user asks for. It is checked here without the model, and in `limits.py` with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpo_megatron.settings import Group, require, setting


@dataclass(frozen=True)
class ParallelConfig(Group):
    """Parallel layout."""

    tensor_model_parallel_size: int = setting(1, "ranks that share every layer")
    pipeline_model_parallel_size: int = setting(1, "stages the layers are cut into")
    num_layers_per_virtual_pipeline_stage: int | None = setting(None, "interleaved schedule: layers of one model chunk")
    decoder_first_pipeline_num_layers: int | None = setting(None, "layers of the first stage, where stages are uneven")
    decoder_last_pipeline_num_layers: int | None = setting(None, "layers of the last stage, where stages are uneven")
    sequence_parallel: bool = setting(False, "shard activations between tensor-parallel regions")
    context_parallel_size: int = setting(1, "ranks that share every sequence")
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] | None = setting(
        None,
        "with context parallelism and Transformer Engine: keys and values go around a ring (p2p, the default) or are "
        "gathered (all_gather), or ranks exchange heads (a2a); a sliding window needs one of the last two",
    )
    expert_model_parallel_size: int = setting(1, "ranks that share the experts of a layer")
    expert_tensor_parallel_size: int | None = setting(
        None, "ranks that share every expert; default --tensor-model-parallel-size"
    )
    use_distributed_optimizer: bool = setting(True, "shard optimizer state over the data-parallel ranks")
    overlap_grad_reduce: bool = setting(False, "reduce gradients while the backward pass runs")
    overlap_param_gather: bool = setting(False, "gather parameters while the forward pass runs")
    recompute_granularity: Literal["selective", "full"] | None = setting(
        None, "recompute activations: those of --recompute-modules, or whole layers"
    )
    recompute_modules: (
        tuple[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "mla_up_proj", "shared_experts"], ...] | None
    ) = setting(None, "with selective recompute: parts of a layer (default: core_attn, the attention)")
    recompute_method: Literal["uniform", "block"] | None = setting(None, "with full recompute: which layers")
    recompute_num_layers: int | None = setting(None, "with full recompute: layers a recomputed block holds")
    variable_seq_lengths: bool = setting(
        True,
        "end every row after its last pair, or with pipeline parallelism at the longest row of the step; off: pad each "
        "to --seq-length, so that shapes never change",
    )
    distributed_timeout_minutes: int = setting(10, "give up on a collective after this long")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive(
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
            "num_layers_per_virtual_pipeline_stage",
            "recompute_num_layers",
            "distributed_timeout_minutes",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "--sequence-parallel needs --tensor-model-parallel-size of at least 2; drop it (where the file of --config "
            "sets it, give --no-sequence-parallel)",
        )
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce",
        )
        full = self.recompute_granularity == "full"
        require(
            all((given is not None) == full for given in (self.recompute_method, self.recompute_num_layers)),
            "--recompute-granularity full goes with --recompute-method and --recompute-num-layers; give all three, or "
            "leave out the last two",
        )
        require(
            self.recompute_modules is None or self.recompute_granularity == "selective",
            "--recompute-modules needs --recompute-granularity selective; add it",
        )
        uneven = self.decoder_first_pipeline_num_layers or self.decoder_last_pipeline_num_layers
        require(
            not uneven or self.pipeline_model_parallel_size > 1,
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers need "
            "--pipeline-model-parallel-size of at least 2",
        )
        require(
            self.num_layers_per_virtual_pipeline_stage is None or self.pipeline_model_parallel_size > 1,
            "--num-layers-per-virtual-pipeline-stage needs --pipeline-model-parallel-size of at least 2",
        )


def describe_layout(parallel: ParallelConfig, data_parallel_size: int) -> str:
    """A layout in words.

    >>> describe_layout(ParallelConfig(tensor_model_parallel_size=2), 4)
    'tensor 2 x context 1 x pipeline 1 x data 4'
    """
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "context": parallel.context_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "data": data_parallel_size,
    }
    words = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if parallel.expert_model_parallel_size > 1:
        words += f", experts over {parallel.expert_model_parallel_size}"
    if parallel.expert_tensor_parallel_size is not None:
        words += f", each over {parallel.expert_tensor_parallel_size}"
    return words
