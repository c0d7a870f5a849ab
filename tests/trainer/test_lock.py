"""One run at a time writes to a folder: locks are refused, released, and taken over from processes that are gone."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.errors import UserError
from simpo_megatron.trainer.lock import locked
from tests.support.distributed import WorkerPool
from tests.support.runs import Inputs, flags, read_rows, run_main

HOLD = """
import sys
from pathlib import Path
from simpo_megatron.program import exit_code
from simpo_megatron.trainer.lock import locked
file = Path(sys.argv[1])
def hold():
    with locked("--save", file.parent, file):
        print("held", flush=True)
        sys.stdin.read()
sys.exit(exit_code("hold", hold))
"""


@contextmanager
def holder(file: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock; it is killed at the end of the block."""
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def take(file: Path) -> dict[str, Any]:
    """Holds the lock for a moment; what the file said then."""
    with locked("--save", file.parent, file):
        return json.loads(file.read_text())


def leave_behind(file: Path, **changes: Any) -> None:
    """Writes the lock of another process: one of this host that is gone, unless the changes say otherwise."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    file.unlink(missing_ok=True)
    content = take(file) | {"pid": gone.pid, "token": "another"} | changes
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def test_a_lock_is_there_inside_the_block_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "run" / ".lock"
    with pytest.raises(ZeroDivisionError), locked("--save", file.parent, file):
        assert file.exists()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir()), "the folders that the lock made are gone too"
    with locked("--save", file.parent, file):
        (file.parent / "metrics.jsonl").touch()
    assert [path.name for path in file.parent.iterdir()] == ["metrics.jsonl"]


def test_a_process_that_runs_is_named(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with holder(file) as process:
        before = file.read_text()
        with pytest.raises(UserError) as raised:
            take(file)
        assert file.read_text() == before
    started = json.loads(before)["started"]
    for words in (f"process {process.pid} on {os.uname().nodename}", f"started {started}", f"delete {file}"):
        assert words in str(raised.value)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with holder(file) as process:
        process.kill()
        process.wait()
    assert file.exists() and take(file)["pid"] == os.getpid()


def test_sigterm_releases_the_lock(tmp_path: Path) -> None:
    """Slurm ends a job with SIGTERM at its time limit, and the next job of a chain may run on another host."""
    file = tmp_path / ".lock"
    with holder(file) as process:
        process.terminate()
        assert process.wait() == 143
    assert not file.exists()


def test_a_process_of_this_host_that_is_gone(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    leave_behind(file)
    assert take(file)["pid"] == os.getpid()
    leave_behind(file, pid=1, process_created=1.0)  # the number now belongs to a younger process
    assert take(file)["pid"] == os.getpid()
    assert not file.exists()


@pytest.mark.parametrize("text", [None, "", "[]", "not JSON"])
def test_nobody_knows_whether_it_is_gone(tmp_path: Path, text: str | None) -> None:
    """A process of another host, or a lock that cannot be understood."""
    file = tmp_path / ".lock"
    leave_behind(file, host="elsewhere", slurm_job="7")
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"delete {file} if that process is gone"):
        take(file)
    assert file.exists()


def test_a_requeued_slurm_job_takes_its_own_lock_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / ".lock"
    leave_behind(file, host="elsewhere", slurm_job="7")
    for job, restarts in (("8", "1"), ("7", "0")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(UserError, match=r"on elsewhere \(Slurm job 7\)"):
            take(file)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert take(file)["slurm_job"] == "7"


def test_a_full_disk_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"its lock .* cannot be written: No space left on device; free space there"):
        take(tmp_path / ".lock")
    assert not list(tmp_path.iterdir())


def test_a_lock_that_changed_hands_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with locked("--save", tmp_path, file):
        file.write_text('{"token": "of another run, after the user deleted the lock"}')
    assert file.exists()


@pytest.mark.parametrize("flag", ["--save", "--export-hf"])
def test_a_run_is_refused_before_its_first_step(pool: WorkerPool, inputs: Inputs, flag: str) -> None:
    save, export = inputs.folder / "run", inputs.folder / "out"
    file = save / ".lock" if flag == "--save" else inputs.folder / ".out.lock"
    argv = flags(inputs.checkpoint, inputs.data, train_iters=1, save=save, load=save, export_hf=export)
    leave_behind(file, host="elsewhere")
    before = sorted(inputs.folder.rglob("*"))
    for code, stdout, stderr in pool.run(2, run_main, argv):
        assert (code, stdout) == (2, "")
        [line] = stderr.splitlines()
        assert line.startswith(f"simpo_megatron.train: {flag} ") and "on elsewhere" in line
    assert sorted(inputs.folder.rglob("*")) == before
    leave_behind(file)
    assert [code for code, _, _ in pool.run(2, run_main, argv)] == [0, 0]
    assert len(read_rows(save)) == 1 and not list(inputs.folder.rglob("*lock"))
