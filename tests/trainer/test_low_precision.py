"""FP8 where there is no hardware for it: what is refused, and the length of packed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simpo_megatron.config.arguments import parse
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import read_hf_config
from simpo_megatron.parallel.limits import layout_arguments
from simpo_megatron.trainer import low_precision
from simpo_megatron.trainer.low_precision import fp8_fields
from tests.support.distributed import WorkerPool
from tests.support.runs import flags
from tests.support.steps import CASES, build_engine, command_line
from tests.support.tiny import make_checkpoint

MODEL = Path(__file__).parents[2] / "examples" / "llama3_8b" / "model.json"
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def fields(transformer_engine: bool, **settings: Any) -> dict[str, Any]:
    config = parse(flags(MODEL, Path("d.jsonl"), **{"fp32": False, "fp8_format": "hybrid", **settings}))
    architecture = read_hf_config(MODEL).architecture
    layout = layout_arguments(config.parallel, architecture.num_layers)
    return fp8_fields(config.memory, transformer_engine, architecture.transformer, layout)


@pytest.mark.parametrize(
    "transformer_engine, settings, words",
    [
        (False, {}, "--fp8-format hybrid needs Transformer Engine's layers"),
        (True, {}, "--fp8-format hybrid needs a GPU that multiplies in FP8"),
        (True, {"fp32": True}, "--fp8-format hybrid needs --bf16"),
        (True, {"seq_length": 520}, "--seq-length 520 must be a multiple of 16 (FP8 multiplies 16 tokens at a time)"),
        (
            True,
            {"seq_length": 544, "fp8_recipe": "mxfp8", "context_parallel_size": 2, **SP},
            "--seq-length 544 must be a multiple of 128",
        ),
        (
            True,
            {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
            "--recompute-modules layernorm does not work with --fp8-recipe delayed",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, transformer_engine: bool, settings: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(low_precision, "on_gpu", lambda: False)
    with pytest.raises(UserError) as raised:
        fields(transformer_engine, **settings)
    assert words in str(raised.value)


def test_widths_that_fp8_cannot_multiply(tmp_path: Path) -> None:
    """8 key and value heads of width 5 on 2 ranks: 20."""
    architecture = read_hf_config(MODEL).architecture
    config = parse(flags(MODEL, Path("d.jsonl"), fp32=False, fp8_format="e4m3", **SP))
    layout = layout_arguments(config.parallel, architecture.num_layers)
    model = {**architecture.transformer, "kv_channels": 5}
    with pytest.raises(UserError, match="multiples of 16, and that of key and value heads on a rank is 20"):
        fp8_fields(config.memory, True, model, layout)


def rows(checkpoint: Path, argv: list[str]) -> list[int]:
    """On a rank: tokens of the packed rows of this rank and of an empty one, with --fp8-format but layers in bf16."""
    from simpo_megatron.trainer import setup

    real, setup.fp8_fields = setup.fp8_fields, lambda *args: {}
    try:
        engine, _ = build_engine(argv)
    finally:
        setup.fp8_fields = real
    case = CASES["sigmoid"]
    batch = engine.packer.pack(case.pairs, np.array(case.indices), num_microbatches=4)
    assert torch.isfinite(torch.tensor(engine.evaluate(batch)["loss"]))
    return [microbatch.tokens.shape[1] for microbatch in engine.packer.microbatches(batch)]


def test_packed_rows_have_the_length_that_fp8_needs(pool: WorkerPool, tmp_path: Path) -> None:
    """16 tokens of each tensor-parallel rank; 32 for mxfp8. An empty row has as many."""
    checkpoint = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    for settings, multiple in (({"fp8_recipe": "tensorwise"}, 32), ({"fp8_recipe": "mxfp8", "seq_length": 128}, 64)):
        argv = command_line(checkpoint, {"fp32": False, "fp8_format": "hybrid", **SP, **settings})
        for found in pool.run(2, rows, checkpoint, argv):
            assert not any(length % multiple for length in found) and min(found) == multiple
