"""Hugging Face -> Megatron: plans a conversion. `publish.run` runs it."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

from simpo_megatron.checkpoint.folder import RELEASE, TRACKER, write_tracker
from simpo_megatron.checkpoint.formats.rank_files_reader import read_rank_files
from simpo_megatron.checkpoint.formats.rank_files_writer import RankLayout, lay_out_ranks
from simpo_megatron.checkpoint.formats.torch_dist_reader import read_torch_dist
from simpo_megatron.checkpoint.formats.torch_dist_writer import lay_out_files, write_metadata
from simpo_megatron.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from simpo_megatron.checkpoint.parameters import Block, MegatronParameter, model_parameters
from simpo_megatron.checkpoint.saved_args import common_state, megatron_args, namespace, yaml_text
from simpo_megatron.checkpoint.transfer.cut import piece_bytes, plan_into_blocks
from simpo_megatron.checkpoint.transfer.moves import Unit
from simpo_megatron.checkpoint.transfer.publish import Conversion, Options, PlanLine, file_stamps, fingerprint
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.parallel.stages import VOCAB_DIVISOR


def plan_to_megatron(hf: HFCheckpoint, layout: RankLayout | None, save: Path, options: Options) -> Conversion:
    """Plans every byte of `save`/release.

    Args:
        hf: the source, checked (`source.read_source`).
        layout: of the `torch` format; None for torch_dist.
        save: the folder with the tracker.
        options: its memory and workers give the size of the pieces.

    Raises:
        UserError: a dtype that does not convert, or a layout that does not divide the model.
    """
    parameters = list(model_parameters(hf, {name: tensor.dtype for name, tensor in hf.tensors.items()}))
    file_sets = lay_out_files(parameters) if layout is None else lay_out_ranks(hf, parameters, layout)
    size = piece_bytes(options.max_memory, options.workers)
    units, lines = [], []
    for files in file_sets:
        held = [(parameter, files.blocks[parameter.name]) for parameter in parameters if parameter.name in files.blocks]
        moves = tuple(plan_into_blocks(parameter, blocks, hf.tensors, size) for parameter, blocks in held)
        units.append(Unit(files.name, files.files, moves))
        lines += [_line(parameter, blocks) for parameter, blocks in held]
    facts = None if layout is None else asdict(layout)

    def identity() -> str:
        sources = sorted({tensor.file for tensor in hf.tensors.values()})
        return fingerprint("to megatron", 1, hf.config, file_stamps(sources), facts)

    def finish(folder: Path, hashes: dict[str, str], plan: str) -> None:
        args = megatron_args(hf.architecture, VOCAB_DIVISOR if layout is None else layout.make_vocab_size_divisible_by)
        if layout is None:
            common = common_state(namespace(args))
            write_metadata(folder, parameters, file_sets, common)
        atomic_write(folder / "megatron_args.yaml", yaml_text(hf.architecture, args))
        # A self-check: the plan has the same places, but what is published has been read once. If the reader does not
        # understand the folder, or misses a part of a parameter in it, the conversion fails here.
        saved = read_torch_dist(folder, hf) if layout is None else read_rank_files(folder, hf)
        write_manifest(folder, hf, hashes, plan, saved, facts)

    return Conversion(
        units=tuple(units),
        lines=tuple(lines),
        root=save,
        final=save / RELEASE,
        record=MANIFEST,
        identity=identity,
        finish=finish,
        publish=partial(write_tracker, save, RELEASE),
        replaceable=partial(_replaceable, save),
    )


def _line(parameter: MegatronParameter, blocks: list[Block]) -> PlanLine:
    files = sorted({block.file for block in blocks})
    where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    target = f"{parameter.name} {list(parameter.shape)} in {where}"
    return PlanLine(", ".join(dict.fromkeys(parameter.hf)), target, parameter.size, parameter.dtype)


def _replaceable(save: Path) -> bool:
    """Whether a folder holds a converted checkpoint with exactly the files of its manifest, and nothing else."""
    names = {path.name for path in save.iterdir()}
    if not names <= {TRACKER, RELEASE, f".{RELEASE}.conversion", f".{RELEASE}.old"}:
        return False
    if RELEASE not in names:
        return True
    release = save / RELEASE
    try:
        manifest = read_manifest(release)
    except UserError:
        return False
    files = [path for path in release.rglob("*") if not path.is_dir() and path != release / MANIFEST]
    found = {path.relative_to(release).as_posix(): path.lstat().st_size for path in files}
    return manifest is not None and found == {name: facts["size"] for name, facts in manifest["files"].items()}
