"""The tracker: one rule for trainer and converter, and a change of it that a power failure cannot cut in two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.checkpoint.folder import (
    RELEASE,
    TRACKER,
    checkpoint_folder,
    iteration_folder,
    latest_step,
    write_tracker,
)
from simpo_megatron.checkpoint.formats.torch_dist_writer import FORMAT_FILE
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write


def make_iteration(root: Path, step: int) -> Path:
    folder = iteration_folder(root, step)
    folder.mkdir(parents=True)
    (folder / FORMAT_FILE).write_text("{}")
    return folder


@pytest.mark.parametrize("digits", [1, 7, 17, 18])
def test_trainer_and_converter_find_the_same_step(tmp_path: Path, digits: int) -> None:
    step = int("9" * digits)
    folder = make_iteration(tmp_path, step)
    write_tracker(tmp_path, step)
    assert latest_step(tmp_path) == step
    assert checkpoint_folder(tmp_path) == folder


@pytest.mark.parametrize("text", ["9" * 19, "-1", "1.5", "iter_0000001", ""])
def test_trainer_and_converter_refuse_the_same_trackers(tmp_path: Path, text: str) -> None:
    (tmp_path / TRACKER).write_text(text)
    for read in (latest_step, checkpoint_folder):
        with pytest.raises(UserError, match="neither a step nor 'release'"):
            read(tmp_path)


@pytest.mark.parametrize("iteration", [100, RELEASE])
def test_the_tracker_is_on_the_disk_before_and_after_its_name_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int | str
) -> None:
    """Without the first fsync a power failure may leave an empty tracker, without the second the old one."""
    write_tracker(tmp_path, 99)
    calls: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def record_replace(source: Any, target: Any) -> None:
        assert (tmp_path / TRACKER).read_text() == "99"
        assert Path(source).read_text() == str(iteration)
        calls.append(("replace", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_tracker(tmp_path, iteration)
    (first, written), (second, target), (third, folder) = calls
    assert (first, second, third) == ("fsync", "replace", "fsync")
    assert Path(written).parent == tmp_path and Path(written).name != TRACKER
    assert Path(target) == tmp_path / TRACKER and Path(folder) == tmp_path
    assert (tmp_path / TRACKER).read_text() == str(iteration)
    assert [path.name for path in tmp_path.iterdir()] == [TRACKER]


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="no regular file"):
        atomic_write(pipe, "text")
    assert pipe.is_fifo()
