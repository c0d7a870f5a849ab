"""A few faults of `tools/crash_test.py`, which anyone can run for longer; and that it sees what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from simpo_megatron.checkpoint.folder import iteration_folder, write_tracker
from tests.support.distributed import free_environment
from tests.support.runs import Inputs, flags
from tools.crash_test import check_folder, main


def test_a_few_faults(inputs: Inputs) -> None:
    training = flags(inputs.checkpoint, inputs.data, train_iters=4, save_interval=1, keep_last=1, async_save=True)
    del training[training.index("--device") :][:2]
    line = [sys.executable, "-m", "tools.crash_test", "--folder", str(inputs.folder / "crash")]
    line += ["--trials", "4", "--processes", "1", "--", *training]
    done = subprocess.run(line, capture_output=True, text=True, env=free_environment(), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 faults" in done.stdout and "all good" in done.stdout


def test_it_sees_a_folder_that_only_looks_complete(inputs: Inputs) -> None:
    folder = iteration_folder(inputs.folder, 1)
    folder.mkdir()
    assert check_folder(inputs.folder) == [f"{folder} is not complete"]
    write_tracker(inputs.folder, 2)
    assert "iter_0000002 is not a complete checkpoint" in check_folder(inputs.folder)[1]


def test_it_needs_a_new_folder(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--folder", str(inputs.folder), "--", json.dumps({})]) == 2
    assert "give a new folder" in capsys.readouterr().err
