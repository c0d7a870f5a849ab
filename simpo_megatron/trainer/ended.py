"""A run that is started again after its last step: what is left to do of it, and what may differ then."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from simpo_megatron.config.run import Config
from simpo_megatron.parallel.together import host_group, raise_on_all_ranks
from simpo_megatron.settings import require
from simpo_megatron.trainer.folders import is_export_of
from simpo_megatron.trainer.progress import Progress
from simpo_megatron.trainer.resume import SavedRun, changes, changes_of_training


def is_anything_left(config: Config, saved: SavedRun) -> bool:
    """Whether the export, or without one the evaluation, of an ended run is missing; rank 0 looks.

    Collectives: one gather of errors and one broadcast, over the host's group.

    Args:
        config: of the command that starts the run again.
        saved: the run, which has taken all its steps.

    Raises:
        UserError: the command has settings that would change nothing any more. They are those of the training, or all
            that are compared on resume where nothing is left to do.
    """
    left: list[bool] = [False]
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            left = [_look(config, saved)]
    dist.broadcast_object_list(left, src=0, group=host_group())
    return left[0]


def _look(config: Config, saved: SavedRun) -> bool:
    differing = changes(config, saved)
    if (export := config.model.export_hf) is not None:
        left = not is_export_of(export, saved.progress)
    else:
        left = config.data.valid_data is not None and (
            "valid_data" in differing or not _is_evaluated(config.checkpoint.save, saved.progress)
        )
    lost = changes_of_training(config, saved) if left else differing
    other = "another --save" if export is None else "another --save and --export-hf"
    require(
        not lost,
        f"the run of {config.checkpoint.load} has ended, and this command differs from it "
        f"({'; '.join(lost.values())}): nothing would be trained; choose {other}, or give the settings of that run",
    )
    return left


def describe_end(config: Config) -> str:
    """The line of a run that has ended and of which nothing is left to do."""
    export = config.model.export_hf
    exported = "" if export is None else f", and {export} is its export"
    return f"nothing is left to do: the run of {config.checkpoint.load} has ended{exported}"


def _is_evaluated(save: Path | None, progress: Progress) -> bool:
    """Whether metrics.jsonl has the evaluation of the last step."""
    if save is None or not (save / "metrics.jsonl").is_file():
        return False
    for line in (save / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a killed process
            continue
        if row.get("step") == progress.step and any(name.startswith("eval/") for name in row):
            return True
    return False
