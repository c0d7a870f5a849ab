"""The two forms in which the distributed optimizer's state is saved, and what each of them can be loaded into.

* `dp_reshardable`, the default. Every rank writes its own share, as it lies in memory. No rank holds more than its
  share, and nothing is sent. It loads at another data-parallel or context-parallel size, and in no other layout.
* `fully_reshardable` (`--dist-ckpt-optim-fully-reshardable`). Rank 0 of each data-parallel group gathers the state of
  its tensor and pipeline shard over gloo and writes it parameter by parameter. It loads in any layout.

The first form says only where an element lies in a bucket of Megatron's gradient buffers. Buckets of equal size with
other parameters in them would load without an error. So the checkpoint holds a checksum of the content of the buckets
of every rank, and `check_buckets` compares it.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from simpo_megatron.checkpoint.formats.torch_dist_reader import read_torch_dist
from simpo_megatron.checkpoint.formats.torch_dist_writer import CONTENT_METADATA
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.parallel.together import host_group
from simpo_megatron.trainer.resume import DP_RESHARDABLE, OTHER_LAYOUT

BUCKETS = "optimizer_buckets"  # the key of the checksums in common.pt


def content_metadata(config: Config, optimizer: Any) -> dict[str, Any]:
    """Megatron's `content_metadata` for the checkpoints of a run. Collectives: at most one all-reduce.

    Args:
        config: of the run.
        optimizer: Megatron's ChainedOptimizer.
    """
    distributed = config.parallel.use_distributed_optimizer
    if not distributed or config.checkpoint.dist_ckpt_optim_fully_reshardable or has_empty_share(optimizer):
        return {**CONTENT_METADATA, "distrib_optim_fully_reshardable_mem_efficient": True}
    return {**CONTENT_METADATA, "distrib_optim_sharding_type": DP_RESHARDABLE}


def bucket_checksums(optimizer: Any) -> dict[str, int]:
    """The content of the buckets of all ranks. Collectives: one all-gather of a small dict.

    Args:
        optimizer: Megatron's ChainedOptimizer.

    Returns:
        A CRC-32 for each optimizer of the chain and each of its data-parallel groups: names, shapes and positions of
        the parameters in every bucket. Empty without the distributed optimizer.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, _own_checksums(optimizer), group=host_group())
    return {name: value for found in gathered for name, value in found.items()}


def _own_checksums(optimizer: Any) -> dict[str, int]:
    found = {}
    for index, part in enumerate(optimizer.chained_optimizers):
        if not isinstance(part, DistributedOptimizer):
            continue
        names = {
            parameter: f"{chunk}.{name}"
            for chunk, model in enumerate(part.model_chunks)
            for name, parameter in model.named_parameters()
        }
        content = [
            (str(buffer.param_dtype), bucket.bucket_id, names[parameter], tuple(parameter.shape), position)
            for buffer in part.buffers
            for bucket in buffer.buckets
            for parameter, position in bucket.param_to_index.items()
        ]
        found[f"{index}.{part.data_parallel_group_idx}"] = zlib.crc32(repr(content).encode())
    return found


def check_buckets(optimizer: Any, common: dict[str, Any], directory: Path, hf: HFCheckpoint) -> None:
    """Makes sure that a `dp_reshardable` state fits the buckets of this run. Collectives: one all-gather.

    Args:
        optimizer: Megatron's ChainedOptimizer.
        common: the content of common.pt.
        directory: of the checkpoint.
        hf: the Hugging Face checkpoint of this run.

    Raises:
        UserError: it does not fit, because the model is another or for another reason; on every rank.
    """
    if bucket_checksums(optimizer) != common.get(BUCKETS) or has_empty_share(optimizer):
        try:
            read_torch_dist(directory, hf)  # of another model no layout would help
        except UserError as error:
            raise UserError(f"{directory} does not fit this model: {error}") from error
        raise UserError(
            f"{directory}: its optimizer state does not fit the parameters as they lie on the ranks of this run (other "
            f"layers, precision, --overlap-grad-reduce or release of Megatron-Core); {OTHER_LAYOUT}"
        )


def has_empty_share(optimizer: Any) -> bool:
    """Whether a rank holds no element of some bucket, for which Megatron has no `dp_reshardable` form.

    That needs a tiny bucket on very many ranks. Collectives: one all-reduce.
    """
    empty = any(
        not ranges["param_map"]
        for part in optimizer.chained_optimizers
        if isinstance(part, DistributedOptimizer)
        for buffer in part.gbuf_ranges
        for buckets in buffer.values()
        for ranges in buckets
    )
    found = torch.tensor(int(empty))
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=host_group())
    return bool(found.item())
