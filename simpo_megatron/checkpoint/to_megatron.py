"""Hugging Face -> Megatron: the plan of a conversion, and running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from simpo_megatron.checkpoint.folder import RELEASE, TRACKER, write_tracker
from simpo_megatron.checkpoint.formats.rank_files_reader import read_rank_files
from simpo_megatron.checkpoint.formats.rank_files_writer import Layout, RankFile, lay_out_ranks, stages
from simpo_megatron.checkpoint.formats.torch_dist_reader import read_torch_dist
from simpo_megatron.checkpoint.formats.torch_dist_writer import DistFile, lay_out_files, write_metadata
from simpo_megatron.checkpoint.manifest import write_manifest
from simpo_megatron.checkpoint.megatron_args import common_state, megatron_args, namespace, yaml_text
from simpo_megatron.checkpoint.parameters import Block, MegatronParameter, model_parameters
from simpo_megatron.checkpoint.transfer.cut import slab_bytes, write_step
from simpo_megatron.checkpoint.transfer.moves import Step, Unit
from simpo_megatron.checkpoint.transfer.publish import Options, Target, file_stamps, fingerprint, run
from simpo_megatron.files import atomic_write
from simpo_megatron.models.hf_checkpoint import HFCheckpoint


@dataclass(frozen=True)
class Conversion:
    """A plan: the units of work and what they lay out.

    Attributes:
        hf: the source.
        units: see work.py.
        items: all parameters with their blocks, for the report of a plan.
        files: of the torch_dist format, else empty.
        layout: of the torch format, else None.
    """

    hf: HFCheckpoint
    units: tuple[Unit, ...]
    items: tuple[tuple[MegatronParameter, tuple[Block, ...]], ...]
    files: tuple[DistFile, ...]
    layout: Layout | None


def plan_conversion(hf: HFCheckpoint, layout: Layout | None, options: Options) -> Conversion:
    """Plans every byte.

    Args:
        hf: the source, checked (`source.read_source`).
        layout: of the torch format; None for torch_dist.
        options: the size of the slabs follows from its memory and workers.

    Raises:
        UserError: a dtype that does not convert, or a layout that does not divide the model.
    """
    items = list(model_parameters(hf, {name: tensor.dtype for name, tensor in hf.tensors.items()}))
    size = slab_bytes(options.max_memory, options.workers)

    def step(item: MegatronParameter, blocks: Sequence[Block]) -> Step:
        return write_step(item, blocks, hf.tensors, size)

    if layout is None:
        files = lay_out_files(items, hf.architecture.num_layers)
        units = [
            Unit(file.name, (file.out(),), tuple(step(item, blocks) for item, blocks in file.items)) for file in files
        ]
        placed = [(item, tuple(blocks)) for file in files for item, blocks in file.items]
        return Conversion(hf, tuple(units), tuple(placed), tuple(files), None)
    ranks = lay_out_ranks(hf, items, layout)
    units, placed = [], []
    for name, members in stages(ranks).items():
        blocks = _by_item(members)
        placed += [(item, tuple(blocks[item.name])) for item in items if item.name in blocks]
        steps = tuple(step(item, blocks[item.name]) for item in items if item.name in blocks)
        units.append(Unit(name, tuple(rank.out for rank in members), steps))
    return Conversion(hf, tuple(units), tuple(placed), (), layout)


def _by_item(ranks: Sequence[RankFile]) -> dict[str, list[Block]]:
    blocks: dict[str, list[Block]] = {}
    for rank in ranks:
        for name, own in rank.blocks.items():
            blocks.setdefault(name, []).extend(own)
    return blocks


def convert_to_megatron(conversion: Conversion, save: Path, options: Options) -> bool:
    """Runs a plan into `save`/release; returns whether it is published (see `run.run`).

    Raises:
        UserError: as `run.run`.
    """
    hf, layout = conversion.hf, conversion.layout
    sources = sorted({tensor.file for tensor in hf.tensors.values()})
    plan = fingerprint("to megatron", 1, hf.config, file_stamps(sources), asdict(layout) if layout else None)

    def finish(folder: Path, hashes: dict[str, str]) -> None:
        args = megatron_args(hf.architecture)
        if layout is None:
            write_metadata(folder, conversion.files, hf.architecture.num_layers, common_state(namespace(args)))
        atomic_write(folder / "megatron_args.yaml", yaml_text(hf.architecture, args))
        saved = read_torch_dist(folder, hf) if layout is None else read_rank_files(folder, hf)
        facts = {} if layout is None else {"layout": asdict(layout)}
        write_manifest(folder, hf, hashes, "torch" if layout else "torch_dist", plan, saved, **facts)

    target = Target(save, save / RELEASE, lambda: write_tracker(save, RELEASE), lambda: _replaceable(save))
    return run(conversion.units, target, options, plan, finish, f"to {save / RELEASE}")


def _replaceable(save: Path) -> bool:
    names = {path.name for path in save.iterdir()}
    return names <= {TRACKER, RELEASE, f".{RELEASE}.conversion", f".{RELEASE}.old"} and (
        RELEASE not in names or (save / RELEASE / "conversion.json").exists()
    )
