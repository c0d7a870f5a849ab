"""A lock file for a folder that one run at a time may write to.

    with locked("--save", save, save / ".lock"):
        ...                                          # raises UserError if another run holds it

The file is JSON: host, pid and start time of the process that holds it. It is created with O_EXCL, so two processes
cannot both create it, on network file systems too. It is removed on exit, and also when SIGTERM ends the program
(`program.exit_code`). After SIGKILL it stays, and the next run takes it over if it can know that the holder is gone: on
the same host, or in the same Slurm job after a requeue.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import psutil

from simpo_megatron.disk import cannot_write
from simpo_megatron.errors import UserError

_CLOCK = 10.0  # seconds; the start time of a process, as the system computes it, shifts when the clock is set


@contextlib.contextmanager
def locked(name: str, folder: Path, file: Path) -> Iterator[None]:
    """Holds the lock of a folder inside the block.

    Args:
        name: the flag that names the folder, for the error.
        folder: to lock, for the error.
        file: the lock file. Its folder is created if it is not there, and removed at the end if it is empty then.

    Raises:
        UserError: another run holds the lock, or the file cannot be written.
    """
    absent = [path for path in file.absolute().parents if not path.exists()]
    mine = _me()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        holder = _acquire(file, mine)
    except OSError as error:
        raise cannot_write(f"{name} {folder}: its lock {file}", error, "choose another folder") from error
    if holder is not None:
        raise UserError(
            f"{name} {folder} is in use by {_describe(holder)}; wait until it ends or choose another folder, or delete "
            f"{file} if that process is gone"
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if _read(file).get("token") == mine["token"]:
                file.unlink()
        with contextlib.suppress(OSError):  # not empty
            for path in absent:
                path.rmdir()


def _me() -> dict[str, Any]:
    """What a lock file says about this process."""
    started = psutil.Process().create_time()
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_created": started,
        "started": datetime.fromtimestamp(started).astimezone().isoformat(timespec="seconds"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "token": uuid.uuid4().hex,
    }


def _acquire(file: Path, mine: dict[str, Any]) -> dict[str, Any] | None:
    """Takes the lock; returns what the file says about the process that holds it, None where this one now does."""
    while True:
        with contextlib.suppress(FileExistsError):
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as stream:
                    _write(stream, mine)
            except OSError:  # a full disk: an empty lock would name no process
                file.unlink()
                raise
            return None
        # Two runs of this host may find the lock of a dead process at once: they look at it one after the other.
        with contextlib.suppress(FileNotFoundError), file.open("r+", encoding="utf-8") as stream:
            with contextlib.suppress(OSError):  # a file system without flock
                fcntl.flock(stream, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                continue  # released, and created again
            holder = _read(file)
            if not _is_gone(holder):
                return holder
            stream.truncate(0)
            _write(stream, mine)
            return None


def _write(stream: TextIO, content: dict[str, Any]) -> None:
    stream.write(json.dumps(content, indent=1) + "\n")
    stream.flush()
    os.fsync(stream.fileno())


def _read(file: Path) -> dict[str, Any]:
    """The content of a lock file; empty where it cannot be understood."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether it is certain that the process which holds a lock is gone."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and holder.get("slurm_job") == job:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        if holder.get("slurm_restarts", 0) < restarts:
            return True  # Slurm has requeued this job, after all processes of the earlier start had ended
    if holder.get("host") != socket.gethostname():
        return False
    pid, created = holder.get("pid"), holder.get("process_created")
    if not isinstance(pid, int) or not isinstance(created, float):
        return False
    try:
        process = psutil.Process(pid)
        other = abs(process.create_time() - created) > _CLOCK
        return pid == os.getpid() or other or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another run, which its lock does not name"
    job = f" (Slurm job {holder['slurm_job']})" if holder.get("slurm_job") else ""
    return f"another run: process {holder.get('pid')} on {holder.get('host')}{job}, started {holder.get('started')}"
