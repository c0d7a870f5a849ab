"""Every program on a full disk and on a read-only one: one sentence, exit code 2, and nothing is left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from examples import quickstart_data, quickstart_report
from simpo_megatron.program import exit_code, write_report
from tests.support.checkpoints import argv, to_megatron
from tests.support.disks import fill, make_read_only, small_disk
from tests.support.tiny import make_checkpoint, make_rows, write_rows
from tools import build_pairs, hf_to_megatron, inspect_data, megatron_to_hf, plan_layout, preprocess_preferences

Program = Callable[[Path], int]  # takes the folder to write into, returns the exit code
MODEL = Path(__file__).parents[2] / "examples" / "llama3_8b" / "model.json"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Program]:
    folder = tmp_path_factory.mktemp("inputs")
    model = make_checkpoint(folder / "model")
    converted = to_megatron(model, folder / "converted")
    pairs = write_rows(folder / "pairs.jsonl", make_rows(800))
    responses = [{"content": text, "score": score} for score, text in enumerate(("a" * 900, "b" * 900))]
    scored = write_rows(folder / "scored.jsonl", [{"prompt": f"p{row}", "responses": responses} for row in range(300)])
    names = ("loss", "rewards/margins", "rewards/accuracies")
    metrics = write_rows(folder / "metrics.jsonl", [{"step": 1} | {k + n: 1 for n in names for k in ("", "eval/")}])

    def prepare(disk: Path, workers: int = 1) -> int:
        flags = argv(input=pairs, hf_checkpoint=model, output_prefix=disk / "set", workers=workers, seq_length=400)
        return preprocess_preferences.main(flags)

    def quickstart(disk: Path) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["quickstart_data", "--output", str(disk)])
            return quickstart_data.main()

    return {
        "prepare": prepare,
        "prepare with workers": lambda disk: prepare(disk, 2),
        "build_pairs": lambda disk: build_pairs.main(argv(input=scored, output=disk / "out.jsonl")),
        "doctor": lambda disk: inspect_data.main(
            argv(data=pairs, hf_checkpoint=model, seq_length=2000, report=disk / "report.html")
        ),
        "plan": lambda disk: plan_layout.main(argv(model=MODEL, gpus=8, json=disk / "plan.json")),
        "report": lambda disk: exit_code("p", lambda: write_report("--json", disk / "report.json", "x" * 300_000)),
        "to_megatron": lambda disk: hf_to_megatron.main(argv(hf_checkpoint=model, save=disk / "out")),
        "to_hf": lambda disk: megatron_to_hf.main(argv(load=converted, save=disk / "out", hf_reference=model)),
        "quickstart": quickstart,
        "plot": lambda disk: exit_code("p", lambda: quickstart_report.plot(metrics, disk / "curves.png")),
    }


NAMES = (
    "prepare",
    "prepare with workers",
    "build_pairs",
    "doctor",
    "plan",
    "report",
    "to_megatron",
    "to_hf",
    "quickstart",
    "plot",
)
KEEPS = ("quickstart",)  # a folder that the quick start may replace


@pytest.mark.parametrize("leave", [0, 8 << 10, 100 << 10])
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(
    programs: dict[str, Program], name: str, leave: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("plan", "doctor", "plot") and leave > 10_000:
        pytest.skip("the report is smaller")
    with small_disk(tmp_path / "disk", "300k") as disk:
        fill(disk, leave)
        for _ in range(2):
            assert programs[name](disk) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert "No space left on device; free space there" in line or "are free; free space there" in line, line
            if name in KEEPS:
                break
            assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("name", NAMES)
def test_a_read_only_disk(
    programs: dict[str, Program], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "300k") as disk:
        make_read_only(disk)
        assert programs[name](disk) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "Read-only file system" in line and "free space" not in line and "--resume" not in line, line
        assert not list(disk.iterdir())


@pytest.mark.parametrize("margin", [2 << 10, 6 << 10, 12 << 10, 24 << 10])
@pytest.mark.parametrize("name", ["to_megatron", "to_hf"])
def test_a_disk_that_the_weights_just_fit(
    programs: dict[str, Program], name: str, margin: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written after the weights fails too, or all is complete; a second run with room goes on."""
    with small_disk(tmp_path / "whole", "4m") as disk:
        assert programs[name](disk) == 0
        size = sum(path.stat().st_blocks * 512 for path in disk.rglob("*") if path.is_file())
    capsys.readouterr()
    with small_disk(tmp_path / "disk", "4m") as disk:
        fill(disk, size - margin)
        code = programs[name](disk)
        err = capsys.readouterr().err
        assert (code, err.count("\n")) in ((2, 1), (0, 0)), err
        assert code == 0 or "free space there" in err
