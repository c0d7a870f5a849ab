"""The `torch` format of older setups: one torch.save file a rank, for one layout, one spec and one kind of experts.

    mp_rank_{tensor:02d}[_{pipeline:03d}][_{expert:03d}]/model_optim_rng.pt

torch.save makes every file without the bytes of its tensors (`skeleton_of`). They are filled in place, in all ranks of
a pipeline stage at once, so a Hugging Face tensor is read once and never held whole. Experts are split over the
tensor-parallel ranks too: the format has no room for another expert-tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simpo_megatron.checkpoint.formats.torch_save_file import skeleton_of
from simpo_megatron.checkpoint.parameters import Block, FileSet, MegatronParameter
from simpo_megatron.checkpoint.saved_args import common_state, megatron_args, namespace
from simpo_megatron.checkpoint.transfer.moves import OutFile
from simpo_megatron.errors import UserError
from simpo_megatron.models.dtypes import TORCH
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.part_layout import rank_rows, rank_slice
from simpo_megatron.models.weight_table import EMBEDDING, OUTPUT, POST_NORMS, SEPARATE_NORMS
from simpo_megatron.parallel.stages import VOCAB_DIVISOR, padded_vocab_size, stage_layers, virtual_stages

FILE = "model_optim_rng.pt"
FINAL_NORM = "decoder.final_layernorm"


@dataclass(frozen=True)
class RankLayout:
    """The layout that a `torch` checkpoint is written for; the fields are Megatron-LM's flags of the same names."""

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
class _Slot:
    """A tensor in a rank's file: its shape, and the regions of its parameter (row, rows, column, columns) in order."""

    parameter: MegatronParameter
    shape: tuple[int, ...]
    regions: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class _Rank:
    """The indices of a rank."""

    tensor: int
    stage: int
    expert: int


def lay_out_ranks(hf: HFCheckpoint, parameters: Sequence[MegatronParameter], layout: RankLayout) -> list[FileSet]:
    """Lays out the files of all ranks, a set for each pipeline stage.

    No parameter is in the files of two stages, except a tied embedding.

    Raises:
        UserError: the layout does not divide the model.
    """
    _check(parameters, layout)
    if hf.architecture.has_whole_experts and layout.tensor_model_parallel_size > 1:
        raise UserError(
            f"--tensor-model-parallel-size {layout.tensor_model_parallel_size} would split experts in this format, "
            "which Megatron does not for experts with biases; give 1, or --format torch_dist for any layout"
        )
    files = _RankFiles(hf, parameters, layout)
    sets = []
    for stage in range(layout.pipeline_model_parallel_size):
        outs: list[OutFile] = []
        blocks: dict[str, list[Block]] = {}
        for expert in range(layout.expert_model_parallel_size):
            for tensor in range(layout.tensor_model_parallel_size):
                out, held = files.lay_out(_Rank(tensor, stage, expert))
                outs.append(out)
                for name, own in held.items():
                    blocks.setdefault(name, []).extend(own)
        sets.append(FileSet(f"stage_{stage:03d}", tuple(outs), blocks))
    return sets


def rank_folder(layout: RankLayout, tensor: int, stage: int, expert: int) -> str:
    """The folder of a rank."""
    name = f"mp_rank_{tensor:02d}"
    name += f"_{stage:03d}" if layout.pipeline_model_parallel_size > 1 else ""
    return name + (f"_{expert:03d}" if layout.expert_model_parallel_size > 1 else "")


def _stage_layers(num_layers: int, layout: RankLayout) -> list[list[range]]:
    """The global layers of every pipeline stage, one range a model chunk. Raises UserError where they do not divide."""
    first, last = layout.decoder_first_pipeline_num_layers, layout.decoder_last_pipeline_num_layers
    uneven, size = first is not None or last is not None, layout.num_layers_per_virtual_pipeline_stage
    stages = layout.pipeline_model_parallel_size
    if (uneven and (size or stages < 2)) or (size and stages < 2):
        raise UserError(
            "an uneven first or last stage needs --pipeline-model-parallel-size above 1 and no virtual stages, and "
            "virtual stages need --pipeline-model-parallel-size above 1"
        )
    return stage_layers(num_layers, stages, virtual_stages(num_layers, stages, size), first, last)


def _check(parameters: Sequence[MegatronParameter], layout: RankLayout) -> None:
    """Raises UserError where the layout does not divide the model."""
    tensor, expert = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    experts = max(parameter.entry.experts for parameter in parameters)
    if expert > 1 and (not experts or experts % expert):
        raise UserError(f"--expert-model-parallel-size {expert} does not divide the {experts} experts of the model")
    for parameter in parameters:
        dim, entry = parameter.entry.tp_dim, parameter.entry
        if dim is None or entry.is_vocabulary:
            continue
        counts = [parameter.shape[1]] if dim == 1 else entry.part_layout.divided(entry.rows)
        if any(count % tensor for count in counts):
            raise UserError(
                f"--tensor-model-parallel-size {tensor} does not divide {parameter.name} {list(parameter.shape)}"
            )


def _slot(parameter: MegatronParameter, layout: RankLayout, rank: int) -> _Slot:
    """What a tensor-parallel rank holds of a parameter."""
    ranks, dim, entry = layout.tensor_model_parallel_size, parameter.entry.tp_dim, parameter.entry
    if dim is None:
        return _Slot(parameter, parameter.shape, ((0, parameter.rows, 0, parameter.columns),))
    if entry.is_vocabulary:
        padded = layout.padded_rows(parameter.rows)
        held = rank_slice(parameter.rows, padded, rank, ranks)
        regions = ((held.start, held.stop - held.start, 0, parameter.columns),) if held.stop > held.start else ()
        return _Slot(parameter, (padded // ranks, *parameter.shape[1:]), regions)
    if dim == 1:
        share = parameter.columns // ranks
        return _Slot(parameter, (parameter.rows, share), ((0, parameter.rows, rank * share, share),))
    ranges = rank_rows(entry.part_layout, entry.rows, rank, ranks)
    regions = tuple((row, rows, 0, parameter.columns) for row, rows in ranges)
    return _Slot(parameter, (sum(rows for _, rows in ranges), *parameter.shape[1:]), regions)


class _RankFiles:
    """Lays out the file of one rank after the other."""

    def __init__(self, hf: HFCheckpoint, parameters: Sequence[MegatronParameter], layout: RankLayout) -> None:
        self.architecture, self.layout = hf.architecture, layout
        self.stages = _stage_layers(hf.architecture.num_layers, layout)
        self.outside = {parameter.name: parameter for parameter in parameters if not parameter.entry.per_layer}
        self.by_layer: dict[int, list[MegatronParameter]] = {}
        for parameter in parameters:
            if parameter.entry.per_layer:
                self.by_layer.setdefault(parameter.layer, []).append(parameter)

    def lay_out(self, rank: _Rank) -> tuple[OutFile, dict[str, list[Block]]]:
        """A rank's file, and the blocks in it by the canonical name of their parameter."""
        layout = self.layout
        chunks = [list(self._entries(rank, chunk)) for chunk in range(len(self.stages[rank.stage]))]
        names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]

        def content() -> dict[str, Any]:
            args = megatron_args(self.architecture, layout.make_vocab_size_divisible_by)
            state = common_state(namespace(args, **self._rank_args()))
            for name, entries in zip(names, chunks, strict=True):
                state[name] = {key: _empty(slot, layout) for key, slot in entries}
            return state

        slots = [slot for entries in chunks for _, slot in entries if slot is not None]
        skeleton = skeleton_of(content)
        if len(skeleton.starts) != len(slots):
            raise RuntimeError(f"torch.save left {len(skeleton.starts)} places for {len(slots)} tensors")
        file = f"{rank_folder(layout, rank.tensor, rank.stage, rank.expert)}/{FILE}"
        blocks: dict[str, list[Block]] = {}
        for start, slot in zip(skeleton.starts, slots, strict=True):
            offset = start
            for row, rows, column, columns in slot.regions:
                own = blocks.setdefault(slot.parameter.name, [])
                own.append(Block(file, offset, row, rows, column, columns))
                offset += rows * columns * slot.parameter.item_size
        return OutFile(file, skeleton.size, skeleton.fixed), blocks

    def _entries(self, rank: _Rank, chunk: int) -> Iterator[tuple[str, _Slot | None]]:
        """Key and slot of every entry of a model chunk; None for an `_extra_state`."""
        layout, outside, chunks = self.layout, self.outside, self.stages[rank.stage]
        if rank.stage == 0 and chunk == 0:
            yield EMBEDDING, _slot(outside[EMBEDDING], layout, rank.tensor)
        for local, layer in enumerate(chunks[chunk]):
            yield from self._layer(rank, local, layer)
        if rank.stage == len(self.stages) - 1 and chunk == len(chunks) - 1:
            yield f"{FINAL_NORM}.weight", _slot(outside[f"{FINAL_NORM}.weight"], layout, rank.tensor)
            if layout.transformer_impl != "local":
                yield f"{FINAL_NORM}._extra_state", None
            if OUTPUT in outside or layout.pipeline_model_parallel_size > 1:
                yield OUTPUT, _slot(outside.get(OUTPUT, outside[EMBEDDING]), layout, rank.tensor)

    def _layer(self, rank: _Rank, local: int, layer: int) -> Iterator[tuple[str, _Slot | None]]:
        """The entries of a layer; `local` counts it in its model chunk, `layer` in the model."""
        seen: set[str] = set()
        names = {parameter.entry.megatron for parameter in self.by_layer[layer]}
        for parameter in self.by_layer[layer]:
            share = (parameter.entry.experts or 1) // self.layout.expert_model_parallel_size
            if parameter.entry.experts and parameter.expert // share != rank.expert:
                continue
            expert = parameter.expert % share if parameter.entry.experts else 0
            key = rank_file_name(parameter, local, expert, self.layout, names)
            yield key, _slot(parameter, self.layout, rank.tensor)
            if (extra := _extra_state(key, self.layout)) and extra not in seen:
                seen.add(extra)
                yield extra, None

    def _rank_args(self) -> dict[str, Any]:
        """The arguments that depend on the layout."""
        layout = self.layout
        return {
            "tensor_model_parallel_size": layout.tensor_model_parallel_size,
            "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
            "num_layers_per_virtual_pipeline_stage": layout.num_layers_per_virtual_pipeline_stage,
            "expert_model_parallel_size": layout.expert_model_parallel_size,
            "decoder_first_pipeline_num_layers": layout.decoder_first_pipeline_num_layers,
            "decoder_last_pipeline_num_layers": layout.decoder_last_pipeline_num_layers,
            "transformer_impl": layout.transformer_impl,
            "moe_grouped_gemm": layout.moe_grouped_gemm,
            "padded_vocab_size": layout.padded_rows(self.architecture.vocab_size),
            "ckpt_format": "torch",
        }


def _empty(slot: _Slot | None, layout: RankLayout) -> Any:
    """A tensor without data, or an `_extra_state`: nothing in the local spec, no bytes in Transformer Engine's."""
    if slot is not None:
        return torch.empty(slot.shape, dtype=TORCH[slot.parameter.dtype])
    return None if layout.transformer_impl == "local" else torch.empty(0, dtype=torch.uint8)


def rank_file_name(
    parameter: MegatronParameter, layer: int, expert: int, layout: RankLayout, names: Container[str]
) -> str:
    """The name of a parameter in a rank's file.

    Args:
        parameter: which.
        layer: its layer, counted in its model chunk.
        expert: its expert, counted on its rank.
        layout: spec and kind of experts.
        names: of all entries of the layer.
    """
    name, experts = parameter.entry.megatron, parameter.entry.experts
    modules = POST_NORMS
    if layout.transformer_impl == "local" or name.replace("layer_norm_weight", "weight") not in names:
        modules = {**POST_NORMS, **SEPARATE_NORMS}
    for canonical, separate in modules.items():
        name = name.replace(canonical, separate)
    if layout.moe_grouped_gemm and experts:
        name = name.replace("local_experts.{expert}.", "") + "{expert}"
    return name.format(layer=layer, expert=expert)


def _extra_state(key: str, layout: RankLayout) -> str | None:
    """The key of the `_extra_state` of a parameter's module; None where the module has none."""
    module, _, leaf = key.rpartition(".")
    linear = ".linear_" in key and leaf.startswith("weight")
    norm = layout.transformer_impl != "local" and module.endswith(("layernorm", "_bda.norm"))
    return f"{module}._extra_state" if linear or norm else None
