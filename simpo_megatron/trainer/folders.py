"""The folders that a run writes to: checked, locked, and not mistaken for those of another run."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from simpo_megatron.adapters.peft_config import CONFIG
from simpo_megatron.checkpoint.folder import TRACKER
from simpo_megatron.checkpoint.formats.torch_dist_writer import FORMAT_FILE
from simpo_megatron.checkpoint.source import has_weights, model_folder
from simpo_megatron.config.checkpoint import CheckpointConfig
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.files import check_empty
from simpo_megatron.models.hf_checkpoint import check_tensors, read_hf_checkpoint
from simpo_megatron.parallel.together import raise_on_all_ranks
from simpo_megatron.trainer.lock import locked
from simpo_megatron.trainer.progress import Progress
from simpo_megatron.trainer.resume import find_saved_run

EXPORTED = "training_run.json"  # in an export: the run and the checkpoint that it was made of


def check_writable(flag: str, folder: Path) -> None:
    """Checks that a folder can be written to, by a probe file in it or in its nearest existing parent.

    Args:
        flag: that names the folder, for the error.
        folder: perhaps not there yet; it is not created.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        probe = parent / f".write_probe_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}; choose a folder that can") from error


def check_folders(config: Config) -> None:
    """Checks the folders that a run writes to, before it trains. The dry run calls it too.

    Raises:
        UserError: --save holds another run, a checkpoint or a model; --export-hf holds something else than the export
            of the checkpoint that this run resumes; or the run would write both to one place.
    """
    _check_new_run(config.checkpoint)
    _check_save(config)
    for flag, folder in exports(config).items():
        _check_apart(config, flag, folder)
        _check_export(config, flag, folder)


def exports(config: Config) -> dict[str, Path]:
    """The folders that the run exports to at its end, by their flags."""
    folders = {"--export-hf": config.model.export_hf, "--export-adapter": config.adapter.export_adapter}
    return {flag: folder for flag, folder in folders.items() if folder is not None}


def _check_new_run(settings: CheckpointConfig) -> None:
    """Keeps a new run from writing into the folder of another run.

    Raises:
        UserError: --save holds a run, and this run does not resume it.
    """
    save, load = settings.save, settings.load
    if save is None or not (save / TRACKER).exists():
        return
    if load is None or load.resolve() != save.resolve():
        without = " and without --finetune" if settings.finetune else ""
        raise UserError(
            f"--save {save} holds another run; resume it with --load {save}{without}, or choose a new folder"
        )
    if settings.finetune:
        raise UserError(
            f"--save {save} holds the run that --finetune starts from; choose a new folder for the new run, or drop "
            "--finetune to resume the old one"
        )


def _check_save(config: Config) -> None:
    """Keeps a run from writing into a model or a checkpoint.

    Raises:
        UserError: --save is the folder of one.
    """
    save, model = config.checkpoint.save, config.model.hf_checkpoint
    if save is None:
        return
    if has_weights(save) or (model is not None and save.resolve() == model_folder(model).resolve()):
        raise UserError(f"--save {save} is the folder of a model; choose another folder for the run")
    if (save / FORMAT_FILE).exists():
        raise UserError(f"--save {save} is the folder of a checkpoint; choose another folder for the run")


def _check_apart(config: Config, name: str, export: Path) -> None:
    """Makes sure that nothing else of the run is written into a folder to export to, which must be empty at its end.

    Args:
        config: of the run.
        name: the flag.
        export: its folder.

    Raises:
        UserError: the folder is, or holds, a place that the run writes to; or it is the place of a checkpoint.
    """
    save = config.checkpoint.save
    target, board = export.resolve(), config.log.tensorboard_dir or (save and save / "tensorboard")
    for flag, folder in (("--save", save), ("--tensorboard-dir", board)):
        if folder is not None and target in (folder.resolve(), *folder.resolve().parents):
            raise UserError(
                f"{name} {export} is where the run writes {flag} {folder}; choose a folder for the model alone, "
                f"such as {folder.with_name(folder.name + '_hf')}"
            )
    if save is not None and save.resolve() in target.parents:
        first = target.relative_to(save.resolve()).parts[0]
        if first.startswith("iter_"):
            raise UserError(
                f"{name} {export} is in {first} of --save, the folder of a checkpoint; choose another, such as "
                f"{save / 'hf'}"
            )


def _check_export(config: Config, name: str, folder: Path) -> None:
    """Makes sure that a folder to export to is absent, empty, or the export of the checkpoint that this run resumes.

    Args:
        config: of the run.
        name: the flag.
        folder: its folder.

    Raises:
        UserError: it holds something else.
    """
    saved = find_saved_run(config.checkpoint)
    if saved is None or not is_export_of(folder, saved.progress):
        check_empty(name, folder)


def is_export_of(folder: Path, progress: Progress) -> bool:
    """Whether a folder holds the whole export of the latest checkpoint of a run."""
    try:
        made_of = json.loads((folder / EXPORTED).read_text(encoding="utf-8"))["checkpoint"]
        if not progress.checkpoint or made_of != progress.checkpoint:
            return False
        if not (folder / CONFIG).is_file():  # the last file of an adapter
            check_tensors(read_hf_checkpoint(folder))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return False
    return True


def missing_exports(config: Config, progress: Progress) -> dict[str, Path]:
    """The folders to export to, by their flags, that do not hold the export of this checkpoint yet."""
    return {flag: folder for flag, folder in exports(config).items() if not is_export_of(folder, progress)}


def export_record(config: Config, progress: Progress) -> dict[str, str]:
    """The file of an export by which `is_export_of` knows it, name and text; none without --save."""
    if config.checkpoint.save is None or not progress.checkpoint:
        return {}
    content = {
        "run": str(config.checkpoint.save.absolute()),
        "step": progress.step,
        "objective": config.objective.name,
        "checkpoint": progress.checkpoint,
    }
    return {EXPORTED: json.dumps(content, indent=1) + "\n"}


@contextlib.contextmanager
def hold_folders(config: Config) -> Iterator[None]:
    """Inside the block, no other run writes to --save or a folder to export to. Rank 0 holds the locks.

    Collectives: one gather of errors.

    Raises:
        UserError: another run holds one of them; on every rank.
    """
    with contextlib.ExitStack() as stack:
        with raise_on_all_ranks():
            if dist.get_rank() == 0:
                if (save := config.checkpoint.save) is not None:
                    stack.enter_context(locked("--save", save, save / ".lock"))
                for flag, export in exports(config).items():  # must be empty, so its lock is beside it
                    stack.enter_context(locked(flag, export, export.with_name(f".{export.name}.lock")))
        yield
