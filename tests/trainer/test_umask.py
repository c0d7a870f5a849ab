"""What programs write has the modes that the umask gives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import WorkerPool
from tests.support.runs import Inputs, flags, train


def under_umask(mask: int, function: Callable[..., Any], argv: list[str]) -> Any:
    """On a rank: calls the function under a umask."""
    before = os.umask(mask)
    try:
        return function(argv)
    finally:
        os.umask(before)


def wrong_modes(folder: Path, mask: int) -> dict[str, str]:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    assert found
    modes = {name: (path.stat().st_mode & 0o777, 0o777 if path.is_dir() else 0o666) for name, path in found.items()}
    return {name: oct(mode) for name, (mode, whole) in modes.items() if mode != whole & ~mask}


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_a_run(pool: WorkerPool, inputs: Inputs, mask: int) -> None:
    argv = flags(inputs.checkpoint, inputs.data, train_iters=1, tensor_model_parallel_size=2, valid_data=inputs.data)
    argv += ["--save", str(inputs.folder / "run"), "--export-hf", str(inputs.folder / "out")]
    assert pool.run(2, under_umask, mask, train, argv) == [None, None]
    names = {path.name for path in inputs.folder.rglob("*")}
    assert {"model.safetensors", "config.json", "metrics.jsonl", "common.pt", ".metadata", "__0_0.distcp"} <= names
    assert not wrong_modes(inputs.folder, mask)


def test_the_tools(inputs: Inputs) -> None:
    from tools import build_pairs, hf_to_megatron, inspect_data, megatron_to_hf, preprocess_preferences

    def call(main: Callable[[list[str]], int | None], *words: object) -> None:
        assert not under_umask(0o027, main, [str(word) for word in words])

    model, folder = inputs.checkpoint, inputs.folder
    scored = inputs.folder / "scored.jsonl"
    responses = [{"content": text, "score": score} for score, text in enumerate("ab")]
    scored.write_text(json.dumps({"prompt": "p", "responses": responses}) + "\n")
    scored.chmod(0o640)
    call(hf_to_megatron.main, "--hf-checkpoint", model, "--save", folder / "megatron")
    call(megatron_to_hf.main, "--load", folder / "megatron", "--hf-reference", model, "--save", folder / "back")
    data = ("--input", inputs.data, "--hf-checkpoint", model, "--max-length", 256)
    call(preprocess_preferences.main, *data, "--output-prefix", folder / "set")
    call(build_pairs.main, "--input", scored, "--output", folder / "pairs.jsonl")
    call(inspect_data.main, "--data", inputs.data, "--hf-checkpoint", model, "--report", folder / "report.html")
    assert not wrong_modes(folder, 0o027)
