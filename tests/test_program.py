"""The check of a report before the work."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from simpo_megatron.errors import UserError
from simpo_megatron.program import check_report


def test_the_ranks_of_a_program_check_one_report_at_once(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with ThreadPoolExecutor(8) as ranks:
        list(ranks.map(lambda _: check_report("--json", report, []), range(2000)))
    assert not list(tmp_path.iterdir())


def test_a_report_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("before")
    check_report("--json", report, [])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"] and report.read_text() == "before"
    os.mkfifo(tmp_path / "pipe")
    check_report("--json", tmp_path / "pipe", [])


@pytest.mark.parametrize(
    "name, reason", [("", "Is a directory"), ("missing/r.json", "No such file"), ("r" * 300, "File name too long")]
)
def test_a_report_that_cannot_be_written(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"--json .* cannot be written: {reason}.*; give another file"):
        check_report("--json", tmp_path / name, [])
