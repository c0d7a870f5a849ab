"""Which checkpoints of a run stay, and how a folder is removed so that it never looks complete when it is not.

A folder gets a name that begins with `.deleted-` before its files go. A checkpoint that is being written has a name
that begins with `.unfinished-`. A run that was killed leaves such folders behind; the next save removes them.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from simpo_megatron.checkpoint.folder import iteration_folder
from simpo_megatron.checkpoint.formats.torch_dist_writer import FORMAT_FILE
from simpo_megatron.config.checkpoint import CheckpointConfig

UNFINISHED, DELETED = ".unfinished-", ".deleted-"


def complete_steps(root: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, in order."""
    names = (path.parent.name for path in root.glob(f"iter_*/{FORMAT_FILE}"))
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"iter_\d{7,18}", name))


def steps_to_keep(steps: Collection[int], settings: CheckpointConfig, best: int | None) -> set[int]:
    """The checkpoints that stay.

    Args:
        steps: of the complete checkpoints, up to the one that the tracker names.
        settings: with --keep-last and --save-retain-interval; where neither is set, all stay.
        best: the step of the best checkpoint by --keep-best; None where there is none.

    >>> sorted(steps_to_keep(range(1, 8), CheckpointConfig(save=Path("run"), keep_last=2), best=3))
    [3, 6, 7]
    """
    if settings.keep_last is None and settings.save_retain_interval is None:
        return set(steps)
    kept = set(sorted(steps)[-(settings.keep_last or 1) :])
    if settings.save_retain_interval is not None:
        kept |= {step for step in steps if step % settings.save_retain_interval == 0}
    return kept if best is None else kept | {best}


def best_step(root: Path, metric: str, steps: Collection[int]) -> int | None:
    """The step among these that has the best value of a metric in metrics.jsonl, and the earliest of equal ones.

    Less is better for a metric that is named after a loss; more is better for all others.

    Args:
        root: the folder of --save.
        metric: its name in metrics.jsonl.
        steps: that count.
    """
    sign = -1 if metric.endswith("loss") else 1
    values: dict[int, float] = {}
    with contextlib.suppress(FileNotFoundError), (root / "metrics.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):  # the last line of a killed process
                row = json.loads(line)
                value = row.get(metric)
                if row.get("step") in steps and isinstance(value, int | float) and not math.isnan(value):
                    values[row["step"]] = sign * value
    return max(sorted(values), key=lambda step: values[step], default=None)


def delete_old(root: Path, newest: int, settings: CheckpointConfig) -> None:
    """Deletes the checkpoints that need not stay. Later ones than the newest are not touched.

    Args:
        root: the folder of --save.
        newest: the step that the tracker names; its checkpoint is complete and stays.
        settings: which ones stay.

    Raises:
        OSError: a folder cannot be deleted.
    """
    steps = [step for step in complete_steps(root) if step <= newest]
    best = None if settings.keep_best is None else best_step(root, settings.keep_best, steps)
    for step in sorted(set(steps) - steps_to_keep(steps, settings, best) - {newest}):
        delete(iteration_folder(root, step))


def delete(folder: Path) -> None:
    """Deletes a checkpoint: the name first, then the files.

    Raises:
        OSError: it cannot be deleted.
    """
    shutil.rmtree(folder.rename(folder.with_name(f"{DELETED}{folder.name}")))


def remove_leftovers(root: Path) -> None:
    """Removes what a killed run was writing or deleting; what cannot be removed stays."""
    for prefix in (UNFINISHED, DELETED):
        for folder in root.glob(f"{prefix}*"):
            shutil.rmtree(folder, ignore_errors=True)
