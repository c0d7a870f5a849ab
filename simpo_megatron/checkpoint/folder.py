"""Megatron-LM's checkpoint folder: its tracker, the folder of an iteration, and the arguments that are saved in it.

ROOT/latest_checkpointed_iteration.txt      the tracker: "100", or "release" for weights without a run; written last
ROOT/iter_0000100/                          one iteration
ROOT/release/                               weights without a run, as tools/hf_to_megatron.py writes them
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.formats.rank_files_reader import any_rank_file
from simpo_megatron.checkpoint.formats.torch_dist_reader import args_of, read_common
from simpo_megatron.checkpoint.formats.torch_dist_writer import FORMAT_FILE
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # Megatron starts such a checkpoint at step 0 and asks for no optimizer state
_DIGITS = 18  # a step with more is not a step


def iteration_folder(root: Path, step: int) -> Path:
    """Megatron-LM's name for the checkpoint of a step."""
    return root / f"iter_{step:07d}"


def write_tracker(root: Path, iteration: int | str) -> None:
    """Points the tracker at a step, or at `RELEASE`; its folder must be complete."""
    atomic_write(root / TRACKER, str(iteration))


def read_tracker(root: Path) -> int | str | None:
    """What the tracker names: a step, or `RELEASE`; None where there is no tracker.

    Raises:
        UserError: it holds something else.
    """
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == RELEASE:
        return RELEASE
    if not text.isdecimal() or len(text) > _DIGITS:
        raise UserError(f"{tracker} holds {text[:40]!r}, neither a step nor {RELEASE!r}; write one of them into it")
    return int(text)


def latest_step(root: Path) -> int | None:
    """The step the tracker names; None without a tracker, or where it names weights without a run.

    Raises:
        UserError: the tracker holds no step, or the checkpoint of the step is not complete.
    """
    step = read_tracker(root)
    if not isinstance(step, int):
        return None
    folder = iteration_folder(root, step)
    if not (folder / FORMAT_FILE).is_file():
        raise UserError(
            f"{folder} is not a complete checkpoint (no {FORMAT_FILE}); write another step into {root / TRACKER}"
        )
    return step


def release_folder(root: Path) -> Path | None:
    """The folder of weights without a run, where the tracker names one: a converted checkpoint.

    Raises:
        UserError: it is not complete, or not in the torch_dist format.
    """
    if read_tracker(root) != RELEASE:
        return None
    if not (root / RELEASE / FORMAT_FILE).is_file():
        raise UserError(
            f"{root / RELEASE} is not a complete torch_dist checkpoint (no {FORMAT_FILE}); convert it again"
        )
    return root / RELEASE


def checkpoint_folder(load: Path) -> Path:
    """The folder of one iteration, in either format: `load` itself, or what its tracker names.

    Raises:
        UserError: there is none, or it is not complete.
    """
    if not load.is_dir():
        raise UserError(
            f"--load {load} is not a folder; give what some --save wrote to, or the folder of one iteration"
        )
    named = read_tracker(load)
    folder = load if named is None else load / RELEASE if isinstance(named, str) else iteration_folder(load, named)
    if not (folder / FORMAT_FILE).is_file() and not any(folder.glob("mp_rank_*")):
        raise UserError(f"{folder} is not a complete checkpoint: it has neither {FORMAT_FILE} nor mp_rank folders")
    return folder


def read_args(folder: Path) -> dict[str, Any]:
    """The plain values among the arguments that a checkpoint was saved with, by name; empty where it has none."""
    if (folder / "common.pt").exists():
        return args_of(read_common(folder).get("args"))
    file = any_rank_file(folder)
    return args_of(file.content.get("args")) if file is not None and isinstance(file.content, dict) else {}
