"""Kills at chosen system calls, full disks, shards and workers: always the bytes of an undisturbed conversion."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simpo_megatron.checkpoint import to_hf
from simpo_megatron.checkpoint.formats import torch_dist_writer
from simpo_megatron.checkpoint.transfer import cut, execute
from tests.support import families as tiny
from tests.support.checkpoints import PROGRAMS, argv, same_bits, tensors
from tools import verify_checkpoint

CALLS = ("pwrite", "preadv", "fdatasync", "fsync", "rename", "replace", "truncate", "unlink", "rmdir")
RANK_FILES = {"format": "torch", "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny.make("qwen3_moe_plain", folder / "hf", torch.bfloat16)
    return folder / "hf"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files, chunks, pieces and journal lines, although the model is tiny."""
    monkeypatch.setattr(torch_dist_writer, "FILE_BYTES", 100_000)
    monkeypatch.setattr(torch_dist_writer, "CHUNK_BYTES", 2048)
    monkeypatch.setattr(cut, "LARGEST_PIECE", 1500)
    monkeypatch.setattr(cut, "SMALLEST_PIECE", 100)
    monkeypatch.setattr(execute, "SYNC_BYTES", 30_000)
    monkeypatch.setattr(to_hf.plan_to_hf, "__defaults__", (None, 100_000))


def in_child(action: Callable[[], Any], die_at: int | None = None) -> tuple[int, int]:
    """Runs `action` in a fork that kills itself at its system call number `die_at`; wait status and calls made."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        made = 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*args: Any, **kwargs: Any) -> Any:
                nonlocal made
                made += 1
                if made == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return counting

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        code = 1
        try:
            code = action()
        finally:
            os.write(into, str(made).encode())
            os._exit(code)
    os.close(into)
    with os.fdopen(out) as stream:
        text = stream.read()
    return os.waitpid(pid, 0)[1], int(text or 0)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flags_for(direction: str, source: Path, folder: Path) -> tuple[str, dict[str, Any]]:
    if direction != "to_hf":
        return "to_megatron", {"hf_checkpoint": source, **(RANK_FILES if direction == "rank_files" else {})}
    if not (folder / "megatron").exists():
        assert PROGRAMS["to_megatron"](argv(hf_checkpoint=source, save=folder / "megatron")) == 0
    return "to_hf", {"load": folder / "megatron", "hf_reference": source}


@pytest.mark.parametrize("direction", ["torch_dist", "rank_files", "to_hf"])
def test_killed_anywhere_and_resumed(direction: str, source: Path, tmp_path: Path) -> None:
    program, flags = flags_for(direction, source, tmp_path)
    status, calls = in_child(lambda: PROGRAMS[program](argv(**flags, save=tmp_path / "whole")))
    assert status == 0 and calls > 100
    whole = files(tmp_path / "whole")
    generator = random.Random(5)
    points = sorted({*generator.sample(range(1, calls), 10), *range(calls - 24, calls)})  # and all through publication
    for point in points:
        save = tmp_path / "killed"
        status, _ = in_child(lambda save=save: PROGRAMS[program](argv(**flags, save=save)), point)
        assert status == signal.SIGKILL
        if complete(direction, save):
            assert {name: data for name, data in files(save).items() if ".conversion" not in name} == whole
        assert PROGRAMS[program](argv(**flags, save=save, resume=True)) == 0
        assert files(save) == whole, point
        left = [path.name for path in (*tmp_path.glob(".killed*"), *save.glob(".*"))]
        assert not left
        shutil.rmtree(save)


@pytest.mark.parametrize("direction", ["torch_dist", "to_hf"])
def test_resuming_what_is_complete_changes_nothing(
    direction: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, flags = flags_for(direction, source, tmp_path)
    line = argv(**flags, save=tmp_path / "out")
    assert PROGRAMS[program](line) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*") if "latest" not in path.name}
    capsys.readouterr()
    assert PROGRAMS[program]([*line, "--resume"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for read in (source, *tmp_path.rglob("*.distcp")):  # other sources
        for file in (read,) if read.is_file() else read.glob("*.safetensors"):
            os.utime(file)
    assert PROGRAMS[program]([*line, "--resume"]) == 2
    assert "is of another conversion" in capsys.readouterr().err


def complete(direction: str, save: Path) -> bool:
    """Whether a folder looks like a checkpoint to those who read it."""
    if direction == "to_hf":
        return save.exists() and any(save.iterdir())
    return (save / "latest_checkpointed_iteration.txt").exists()


def test_a_resumed_run_keeps_what_is_finished(source: Path, tmp_path: Path) -> None:
    line = argv(hf_checkpoint=source, save=tmp_path / "out")
    _, calls = in_child(lambda: PROGRAMS["to_megatron"](argv(hf_checkpoint=source, save=tmp_path / "whole")))
    in_child(lambda: PROGRAMS["to_megatron"](line), calls * 3 // 4)
    data = tmp_path / "out" / ".release.conversion" / "data"
    journal = sorted((data.parent / "journal").iterdir())
    assert len(journal) > 2
    done = data / journal[0].stem
    before = done.stat().st_mtime_ns
    status, again = in_child(lambda: PROGRAMS["to_megatron"]([*line, "--resume"]))
    assert status == 0 and again < calls * 2 // 3
    assert (tmp_path / "out" / "release" / done.name).stat().st_mtime_ns == before


def test_a_full_disk_is_one_sentence_and_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, left, pwrite = argv(hf_checkpoint=source, save=tmp_path / "out"), 100, os.pwrite

    def full(*args: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert PROGRAMS["to_megatron"](line) == 2
    error = capsys.readouterr().err
    assert "No space left" in error and "--resume" in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "release").exists()
    assert PROGRAMS["to_megatron"](line) == 2  # not empty
    assert "--resume" in capsys.readouterr().err
    assert PROGRAMS["to_megatron"]([*line, "--resume"]) == 0
    assert verify_checkpoint.main(argv(hf_checkpoint=source, load=tmp_path / "out")) == 0


def test_too_little_space_is_known_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert PROGRAMS["to_megatron"](argv(hf_checkpoint=source, save=tmp_path / "out")) == 2
    assert "only 1000 B are free" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.distcp"))


def test_a_plan_says_the_share_of_a_shard_and_whether_it_fits(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = argv(hf_checkpoint=source, save=tmp_path / "out", plan=True, shard="1/2")
    assert PROGRAMS["to_megatron"](line) == 0
    out = capsys.readouterr().out
    tensors_planned, shown = int(out.splitlines()[-2].split()[0]), len(out.splitlines()) - 2
    assert "of it by share 1/2; " in out and " like it" in out and shown < tensors_planned
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert PROGRAMS["to_megatron"](line) == 2
    out, err = capsys.readouterr()
    assert "1000 B are free" in out and "only 1000 B are free; free space there" in err
    assert not (tmp_path / "out").exists()


def test_workers_and_shards_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name, runs in {
        "whole": [{}],
        "workers": [{"workers": 2, "max_memory": "1MiB"}],
        "shards": [{"shard": f"{index}/3"} for index in (2, 3, 1)],
    }.items():
        for index, flags in enumerate(runs):
            assert PROGRAMS["to_megatron"](argv(hf_checkpoint=source, save=tmp_path / name, **flags)) == 0
            assert (tmp_path / name / "release").exists() == (index == len(runs) - 1)
    assert files(tmp_path / "whole") == files(tmp_path / "workers") == files(tmp_path / "shards")
    flags = {"load": tmp_path / "whole", "hf_reference": source, "save": tmp_path / "back"}
    for index in (1, 2):
        assert PROGRAMS["to_hf"](argv(**flags, shard=f"{index}/2")) == 0
    assert same_bits(tensors(tmp_path / "back"), tensors(source))


def test_resume_notices_another_source(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source, tmp_path / "hf")
    line = argv(hf_checkpoint=tmp_path / "hf", save=tmp_path / "out")
    in_child(lambda: PROGRAMS["to_megatron"](line), 150)
    os.utime(tmp_path / "hf" / "model.safetensors")
    assert PROGRAMS["to_megatron"]([*line, "--resume"]) == 2
    assert "another conversion" in capsys.readouterr().err
    assert PROGRAMS["to_megatron"]([*line, "--overwrite"]) == 0
    assert PROGRAMS["to_megatron"]([*line, "--overwrite"]) == 0
    (tmp_path / "out" / "iter_0000001").mkdir()
    assert PROGRAMS["to_megatron"]([*line, "--overwrite"]) == 2
    assert "did not write" in capsys.readouterr().err
