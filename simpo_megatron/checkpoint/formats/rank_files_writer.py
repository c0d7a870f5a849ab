"""The `torch` format of older setups: one torch.save file a rank, for one layout, one spec and one kind of experts.

    mp_rank_{tensor:02d}[_{pipeline:03d}][_{expert:03d}]/model_optim_rng.pt

Every file is laid out by torch.save without data (`zips.lay_out`) and filled in place, all ranks of a pipeline stage at once,
so a Hugging Face tensor is read once and never held whole. Experts are split over the tensor-parallel ranks too: the
format has no room for another expert-tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simpo_megatron.checkpoint.formats.dtypes import TORCH
from simpo_megatron.checkpoint.formats.torch_save_file import lay_out
from simpo_megatron.checkpoint.megatron_args import common_state, megatron_args, namespace
from simpo_megatron.checkpoint.parameters import Block, MegatronParameter
from simpo_megatron.checkpoint.transfer.moves import OutFile
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.part_layout import rank_rows
from simpo_megatron.models.weight_table import EMBEDDING, OUTPUT
from simpo_megatron.parallel.stages import VOCAB_DIVISOR, padded_vocab_size, stage_layers, virtual_stages

FILE = "model_optim_rng.pt"


@dataclass(frozen=True)
class Layout:
    """The layout of a `torch` checkpoint; the fields are Megatron-LM's flags of the same names."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    expert_model_parallel_size: int = 1
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    transformer_impl: str = "transformer_engine"
    moe_grouped_gemm: bool = False
    make_vocab_size_divisible_by: int = VOCAB_DIVISOR

    def padded_rows(self, rows: int) -> int:
        """Rows of the embedding with Megatron's padding."""
        return padded_vocab_size(rows, self.tensor_model_parallel_size, self.make_vocab_size_divisible_by)


@dataclass(frozen=True)
class RankFile:
    """A file in the making: its pipeline stage, and the blocks of the parameters in it by canonical name."""

    stage: int
    out: OutFile
    blocks: dict[str, list[Block]]


@dataclass(frozen=True)
class _Slot:
    """A tensor of a rank: its shape there, and the regions of the parameter it is made of."""

    item: MegatronParameter
    shape: tuple[int, ...]
    regions: tuple[tuple[int, int, int, int], ...]  # row, rows, column, columns


def rank_folder(layout: Layout, tensor: int, stage: int, expert: int) -> str:
    """The folder of a rank."""
    name = f"mp_rank_{tensor:02d}"
    name += f"_{stage:03d}" if layout.pipeline_model_parallel_size > 1 else ""
    return name + (f"_{expert:03d}" if layout.expert_model_parallel_size > 1 else "")


def _stage_layers(num_layers: int, layout: Layout) -> list[list[range]]:
    """The global layers of every pipeline stage, one range a virtual stage. Raises UserError where they do not divide."""
    first, last = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    uneven, size = first is not None or last is not None, layout.num_layers_per_virtual_pipeline_stage
    stages = layout.pipeline_model_parallel_size
    if (uneven and (size or stages < 2)) or (size and stages < 2):
        raise UserError(
            "an uneven first or last stage needs --pipeline-model-parallel-size above 1 and no virtual stages, and virtual "
            "stages need --pipeline-model-parallel-size above 1"
        )
    return stage_layers(num_layers, stages, virtual_stages(num_layers, stages, size), first, last)


def lay_out_ranks(hf: HFCheckpoint, items: Sequence[MegatronParameter], layout: Layout) -> list[RankFile]:
    """Lays out the files of all ranks.

    Raises:
        UserError: the layout does not divide the model.
    """
    _check(hf, items, layout)
    by_layer: dict[int | None, list[MegatronParameter]] = {}
    for item in items:
        by_layer.setdefault(item.layer if item.weight.per_layer else None, []).append(item)
    chunks = _stage_layers(hf.architecture.num_layers, layout)
    return [
        _rank_file(hf, by_layer, chunks, layout, tensor, stage, expert)
        for stage in range(layout.pipeline_model_parallel_size)
        for expert in range(layout.expert_model_parallel_size)
        for tensor in range(layout.tensor_model_parallel_size)
    ]


def stages(ranks: Sequence[RankFile]) -> dict[str, list[RankFile]]:
    """The files by pipeline stage, whose tensors no other stage reads but a tied embedding."""
    found: dict[str, list[RankFile]] = {}
    for rank in ranks:
        found.setdefault(f"stage_{rank.stage:03d}", []).append(rank)
    return found


def _check(hf: HFCheckpoint, items: Sequence[MegatronParameter], layout: Layout) -> None:
    tensor, expert = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    experts = max(item.weight.experts for item in items)
    if expert > 1 and (not experts or experts % expert):
        raise UserError(f"--expert-model-parallel-size {expert} does not divide the {experts} experts of the model")
    for item in items:
        dim = item.weight.tp_dim
        if dim is None or item.weight.is_vocabulary:
            continue
        rows = [item.shape[1]] if dim == 1 else item.weight.part_layout.divided(item.weight.rows)
        if any(count % tensor for count in rows):
            raise UserError(f"--tensor-model-parallel-size {tensor} does not divide {item.name} {list(item.shape)}")


def _slot(item: MegatronParameter, layout: Layout, rank: int) -> _Slot:
    ranks, dim = layout.tensor_model_parallel_size, item.weight.tp_dim
    if dim is None:
        return _Slot(item, item.shape, ((0, item.rows, 0, item.columns),))
    if item.weight.is_vocabulary:
        share = layout.padded_rows(item.rows) // ranks
        start = min(rank * share, item.rows)
        stop = min(start + share, item.rows) if start == rank * share else start
        regions = ((start, stop - start, 0, item.columns),) if stop > start else ()
        return _Slot(item, (share, *item.shape[1:]), regions)
    if dim == 1:
        share = item.columns // ranks
        return _Slot(item, (item.rows, share), ((0, item.rows, rank * share, share),))
    held = rank_rows(item.weight.part_layout, item.weight.rows, rank, ranks)
    regions = tuple((row, rows, 0, item.columns) for row, rows in held)
    return _Slot(item, (sum(rows for _, rows in held), *item.shape[1:]), regions)


def _rank_file(
    hf: HFCheckpoint,
    by_layer: dict[int | None, list[MegatronParameter]],
    chunks: list[list[range]],
    layout: Layout,
    tensor: int,
    stage: int,
    expert: int,
) -> RankFile:
    slots: list[_Slot] = []
    models: list[list[tuple[str, _Slot | None]]] = []
    for index, layers in enumerate(chunks[stage]):
        first = stage == 0 and index == 0
        last = stage == len(chunks) - 1 and index == len(chunks[stage]) - 1
        entries = list(_entries(hf, by_layer, layers, layout, (first, last), tensor, expert))
        slots += [slot for _, slot in entries if slot is not None]
        models.append(entries)
    names = ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]

    def content() -> dict[str, Any]:
        args = megatron_args(hf.architecture, layout.make_vocab_size_divisible_by)
        state = common_state(namespace(args, **_rank_args(hf, layout)))
        for name, entries in zip(names, models, strict=True):
            state[name] = {key: _empty(slot, layout) for key, slot in entries}
        return state

    laid = lay_out(content)
    if len(laid.holes) != len(slots):
        raise RuntimeError(f"torch.save left {len(laid.holes)} places for {len(slots)} tensors")
    file = f"{rank_folder(layout, tensor, stage, expert)}/{FILE}"
    blocks: dict[str, list[Block]] = {}
    for hole, slot in zip(laid.holes, slots, strict=True):
        for row, rows, column, columns in slot.regions:
            blocks.setdefault(slot.item.name, []).append(Block(file, hole, row, rows, column, columns))
            hole += rows * columns * slot.item.item_size
    return RankFile(stage, OutFile(file, laid.size, laid.fixed), blocks)


def _empty(slot: _Slot | None, layout: Layout) -> Any:
    """A tensor without data, or an `_extra_state`: nothing in the local spec, no bytes in Transformer Engine's."""
    if slot is not None:
        return torch.empty(slot.shape, dtype=TORCH[slot.item.dtype])
    return None if layout.transformer_impl == "local" else torch.empty(0, dtype=torch.uint8)


def _entries(
    hf: HFCheckpoint,
    by_layer: dict[int | None, list[MegatronParameter]],
    layers: range,
    layout: Layout,
    ends: tuple[bool, bool],
    tensor: int,
    expert: int,
) -> Iterator[tuple[str, _Slot | None]]:
    """Key and slot of every entry of a model chunk; None for an `_extra_state`."""
    outside = {item.name: item for item in by_layer[None]}
    experts = any(item.weight.experts for item in by_layer[0])
    first, last = ends
    if first:
        yield EMBEDDING, _slot(outside[EMBEDDING], layout, tensor)
    for local, layer in enumerate(layers):
        seen: set[str] = set()
        for item in by_layer[layer]:
            share = (item.weight.experts or 1) // layout.expert_model_parallel_size
            if item.weight.experts and item.expert // share != expert:
                continue
            key = rank_file_name(item, local, item.expert % share if item.weight.experts else 0, layout, experts)
            yield key, _slot(item, layout, tensor)
            if (extra := _extra_state(key, layout)) and extra not in seen:
                seen.add(extra)
                yield extra, None
    if last:
        yield "decoder.final_layernorm.weight", _slot(outside["decoder.final_layernorm.weight"], layout, tensor)
        if layout.transformer_impl != "local":
            yield "decoder.final_layernorm._extra_state", None
        if OUTPUT in outside or layout.pipeline_model_parallel_size > 1:
            yield OUTPUT, _slot(outside.get(OUTPUT, outside[EMBEDDING]), layout, tensor)


def rank_file_name(item: MegatronParameter, layer: int, expert: int, layout: Layout, experts: bool) -> str:
    """The name of a parameter in a rank's model, for that rank's layer and expert.

    With `experts` the model has them, and its norm before them is a module of its own in either spec.
    """
    name = item.weight.megatron
    local = layout.transformer_impl == "local"
    if local:
        name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    if local or experts:
        name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    if layout.moe_grouped_gemm:
        name = (
            name.replace("local_experts.{expert}.", "").replace("weight", "weight{expert}")
            if item.weight.experts
            else name
        )
    return name.format(layer=layer, expert=expert)


def _extra_state(key: str, layout: Layout) -> str | None:
    module, _, leaf = key.rpartition(".")
    linear = ".linear_" in key and leaf.startswith("weight")
    norm = layout.transformer_impl != "local" and module.endswith("layernorm")
    return f"{module}._extra_state" if linear or norm else None


def _rank_args(hf: HFCheckpoint, layout: Layout) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "num_layers_per_virtual_pipeline_stage": layout.num_layers_per_virtual_pipeline_stage,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "decoder_first_pipeline_num_layers": layout.decoder_first_pipeline_num_layers,
        "decoder_last_pipeline_num_layers": layout.decoder_last_pipeline_num_layers,
        "transformer_impl": layout.transformer_impl,
        "moe_grouped_gemm": layout.moe_grouped_gemm,
        "padded_vocab_size": layout.padded_rows(hf.architecture.vocab_size),
        "ckpt_format": "torch",
    }
