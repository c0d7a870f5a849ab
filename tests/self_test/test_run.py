"""Rows that fail, crash or are not possible; the registry; versions; and the command line."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import queue
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from simpo_megatron.models.families.registry import FAMILIES
from simpo_megatron.self_test import environment
from simpo_megatron.self_test.guard import Guard, Limits
from simpo_megatron.self_test.report import as_csv_rows, summary
from simpo_megatron.self_test.rows import Bench, Outcome, Row, judge, worst
from simpo_megatron.self_test.run import Found
from simpo_megatron.self_test.speed import count_waits, judge_waits
from tests.support.distributed import WorkerPool
from tools import self_test


def fine(bench: Bench) -> Outcome:
    total = torch.ones(1)
    dist.all_reduce(total)
    return Outcome("proved", f"{total.item():.0f} ranks")


def crash_everywhere(bench: Bench) -> Outcome:
    raise ZeroDivisionError("nothing is divided")


def crash_on_one(bench: Bench) -> Outcome:
    """Rank 1 leaves the others in a collective of a group that waits for longer than the program does."""
    group = dist.new_group(timeout=timedelta(days=1))
    if bench.rank == 1:
        raise MemoryError("rank 1 is full")
    dist.all_reduce(torch.ones(1), group=group)
    return Outcome("proved")


def slow_on_one(bench: Bench) -> Outcome | None:
    return Outcome("slow", "late") if bench.rank == 1 else None


ROWS = [
    Row("crash on all", crash_everywhere, advice="mend it"),
    Row("after it", fine),
    Row("crash on one", crash_on_one),
    Row("after that", fine),
    Row("slow on one", slow_on_one),
    Row("three", fine, processes=3),
    Row("a GPU", fine, gpu=True),
]


def run_them(device: str) -> list[tuple[str, str, str]]:
    """On a rank: name, result and figure of `ROWS`."""
    from simpo_megatron.self_test.run import benches, run_rows

    with benches(device, None) as bench:
        return [(found.name, found.outcome.result, found.outcome.figure) for found in run_rows(ROWS, bench)]


def test_a_crash_is_a_row_and_the_rest_goes_on(pool: WorkerPool) -> None:
    for found in pool.run(2, run_them, "cpu"):
        assert [(name, result) for name, result, _ in found] == [
            ("crash on all", "FAILED"),
            ("after it", "proved"),
            ("crash on one", "FAILED"),
            ("after that", "proved"),
            ("slow on one", "slow"),
            ("three", "not here"),
            ("a GPU", "not here"),
        ]
        figures = {name: figure for name, _, figure in found}
        assert "ZeroDivisionError: nothing is divided (test_run.py:" in figures["crash on all"]
        assert "MemoryError: rank 1 is full" in figures["crash on one"]
        assert figures["after that"] == "2 ranks" and figures["three"] == "needs a multiple of 3 processes"


def stop(bench: Bench) -> Outcome:
    raise SystemExit(143)


def run_until(row: Any) -> list[tuple[str, str, str]]:
    """On a rank: what is found where SIGTERM arrives in a row, or where a rank does not answer after it."""
    from simpo_megatron.self_test.ranks import NoAnswer, Ranks
    from simpo_megatron.self_test.run import Journal, benches, run_rows

    def no_answer(self: Any, mine: Any) -> Any:
        raise NoAnswer("Connection closed by peer")

    journal = Journal()
    with benches("cpu", None) as bench, pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(Ranks, "agree", no_answer)
        run_rows([Row("a", row), Row("b", fine)], bench, journal)
    return [(found.name, found.outcome.result, found.outcome.figure) for found in journal.found]


@pytest.mark.parametrize(
    "row, figure",
    [
        (stop, "stopped before it ended"),
        (fine, "a rank no longer answers: Connection closed by peer"),
        (crash_everywhere, "a rank no longer answers: rank 0: ZeroDivisionError: nothing is divided"),
    ],
)
def test_where_the_program_cannot_go_on_the_row_has_failed(pool: WorkerPool, row: Any, figure: str) -> None:
    ((found,),) = pool.run(1, run_until, row)
    assert found[:2] == ("a", "FAILED") and figure in found[2]


def test_names_of_rows_are_unique_on_every_bench(tmp_path: Path) -> None:
    from simpo_megatron.self_test.registry import all_rows

    both = ("local", "transformer_engine")
    for device, processes in itertools.product(("cpu", "cuda"), (1, 2, 4, 8)):
        names = [row.name for row in all_rows(Bench(device, 0, processes, tmp_path, tmp_path, both))]
        assert len(names) == len(set(names))
        assert {"gradients: TP 2 + SP (Transformer Engine)", "gradients: TP 2 + SP"} <= set(names) or processes == 8
    assert "gradients: CP 2 (Transformer Engine, bf16)" in names  # of 8 GPUs
    assert "gradients: CP 2 (Transformer Engine)" not in names, "Transformer Engine has no ring attention in fp32"


def program(argv: list[str], accepted: dict[str, str] | None = None) -> tuple[int, str, str]:
    """On a rank: exit code, stdout and stderr of the program; `accepted` replaces the versions that are accepted."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if accepted is not None:
            patch.setattr(environment, "bounds", lambda: accepted)
        code = self_test.main(argv)
    return code, out.getvalue(), err.getvalue()


def test_the_whole_program(pool: WorkerPool, tmp_path: Path) -> None:
    report, measured, save = tmp_path / "report.json", tmp_path / "rows.csv", tmp_path / "save"
    save.mkdir()
    argv = ["--device", "cpu", "--json", str(report), "--csv", str(measured), "--save", str(save)]
    (code, out, _), (other, silent, _) = pool.run(2, program, argv)
    assert code == other == 0, out
    assert "gradients: TP 2 + SP" in out and "what to do" in out and not silent
    found = json.loads(report.read_text())
    results = {row["name"]: row["result"] for row in found["rows"]}
    assert found["passed"] and found["processes"] == 2 and found["versions"]["torch"] == torch.__version__
    assert set(results.values()) == {"proved", "not here"}
    assert results["gradients: TP 2 + SP"] == results["gradients: TP 2 + SP (bf16)"] == "proved"
    assert results["gradients: TP 4 + SP"] == results["speed: host waits of a step"] == "not here"
    assert {f"family: {family.name}" for family in FAMILIES} <= results.keys()
    lines = measured.read_text().splitlines()
    assert lines[0].startswith("date,machine,processes,load_before,torch") and any(
        "tokens_per_second" in x for x in lines
    )
    assert not list(save.iterdir()), "what was written under --save is gone"


def test_a_failed_row_is_exit_code_1(pool: WorkerPool) -> None:
    argv = ["--device", "cpu", "--only", "version: transformers"]
    ((code, out, _),) = pool.run(1, program, argv, {"transformers": ">=999"})
    assert code == 1 and "pip install 'transformers>=999'" in out and "FAILED 1" in out


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--jsn", "x"], "--jsn is not a flag; did you mean --json?"),
        (["--save", "/absent/folder"], "--save /absent/folder is not a folder; create it"),
        (["--json", "/absent/report.json"], "--json /absent/report.json cannot be written"),
        (["--only", "gradient: TP"], "--only 'gradient: TP' is in the name of no row"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_a_mistake_on_the_command_line(pool: WorkerPool, argv: list[str], text: str) -> None:
    ((code, _, err),) = pool.run(1, program, argv)
    assert code == 2 and text in err


@pytest.mark.parametrize("crash, reason", [(None, "no end after 0 s"), ("rank 1: MemoryError", "rank 1: MemoryError")])
def test_a_row_without_an_end_ends_the_program(crash: str | None, reason: str) -> None:
    ended: queue.Queue[str] = queue.Queue()
    limits = Limits(row=0.0 if crash is None else 600.0, after_crash=0.0, poll=0.01)
    with Guard(limits, lambda: crash, ended.put):
        assert ended.get(timeout=60) == reason


def test_a_row_that_ends_is_left_alone() -> None:
    ended: queue.Queue[str] = queue.Queue()
    with Guard(Limits(row=600.0, after_crash=600.0, poll=0.01), lambda: "rank 1: MemoryError", ended.put):
        pass
    assert ended.empty()


def test_the_worst_rank_counts() -> None:
    assert worst([None, Outcome("proved"), Outcome("FAILED", "b"), Outcome("slow")]).figure == "b"
    assert judge(float("nan"), 1.0, "it", "").result == "FAILED"
    assert summary([Found("a", Outcome("proved")), Found("b", Outcome("FAILED"))]) == "FAILED 1, proved 1"
    rows = as_csv_rows([Found("a", Outcome("proved", measured={"seconds": 0.25}))])
    assert rows == [{"row": "a", "result": "proved", "measure": "seconds", "value": "0.25"}]


def test_host_waits_are_counted() -> None:
    names = ["cudaStreamSynchronize"] * 12 + ["cudaLaunchKernel", "cudaMemcpyAsync", "cudaDeviceSynchronize"]
    waits = count_waits(names)
    assert waits == {"cudaStreamSynchronize": 12, "cudaDeviceSynchronize": 1}
    assert judge_waits(waits, 2).result == "slow" and judge_waits({}, 2).result == "proved"


def test_versions_are_those_of_setup_py() -> None:
    bounds = environment.bounds()
    assert {"torch", "megatron-core", "transformers", "transformer-engine"} <= bounds.keys()
    bench: Any = None
    assert environment._version("torch", bench).result == "proved"
