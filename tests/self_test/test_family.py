"""The rows of a checkpoint: they pass for a right family, and fail for one that computes something else."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from simpo_megatron.models.families import registry
from simpo_megatron.models.families.phi3 import PHI3
from simpo_megatron.self_test.family import unread_keys
from tests.support import families as tiny
from tests.support.distributed import WorkerPool
from tests.support.real_templates import tokenizer_of
from tools import self_test

ROWS = ["config", "tensors", "arguments", "conversion", "weights", "2 + SP, plain", "CP 2, plain", "tokenizer"]


def other_base(config: dict[str, Any]) -> Any:
    """A mistake: another base of the rotary embedding."""
    return replace(PHI3.rope(config), theta=20000.0)


def crash_on_one(*args: Any, **kwargs: Any) -> Any:
    """A mistake: rank 1 cannot build its layers, and the others wait for it."""
    if dist.get_rank() == 1:
        raise ZeroDivisionError("no layers today")
    return PHI3.layer_spec(*args, **kwargs)


def program(argv: list[str], **mistake: Any) -> tuple[int, str]:
    """On a rank: exit code and stdout; with a mistake, the family has it in place of what it has under that name."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        if mistake:
            patch.setattr(registry, "FAMILIES", (replace(PHI3, **mistake), *registry.FAMILIES))
        return self_test.main(argv), out.getvalue()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Phi with a tokenizer, whose generation config has the end of a turn."""
    folder, tokenizer = tmp_path / "model", tokenizer_of("phi3")
    tiny.make("phi3_tied", folder, vocab_size=509)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def test_a_checkpoint_is_proved(pool: WorkerPool, checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    argv = ["--device", "cpu", "--hf-checkpoint", str(checkpoint), "--only", *ROWS, "--json", str(report)]
    (code, out), _ = pool.run(2, program, argv)
    assert code == 0, out
    found = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    assert {row["result"] for row in found.values()} == {"proved"} and len(found) == 10
    assert found["tokenizer: the end of a turn"]["figure"] == "a response ends with <|end|>"
    assert found["conversion: rank files of TP 2 and back"]["figure"] == "every byte"


def test_a_family_that_computes_something_else_fails(pool: WorkerPool, checkpoint: Path) -> None:
    argv = ["--device", "cpu", "--hf-checkpoint", str(checkpoint), "--only", "torch_dist", "gradients: DP, plain"]
    ((code, out),) = pool.run(1, partial(program, rope=other_base), argv)
    assert code == 1
    assert "gradients: DP, plain head: FAILED" in out and "conversion: torch_dist and back: proved" in out
    assert "the family is wrong about this checkpoint" in out


def export_wrong_experts(argv: list[str]) -> tuple[int, str]:
    """On a rank: the program, while tensors that hold all experts are exported with other numbers."""
    from simpo_megatron.models.weight_table import WeightEntry

    as_stored = WeightEntry.as_stored

    def doubled(entry: WeightEntry, parts: Any, held: tuple[int, ...]) -> Any:
        return as_stored(entry, parts, held) * (2 if entry.sliced else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightEntry, "as_stored", doubled)
        return program(argv)


def test_other_numbers_in_a_tensor_of_all_experts_fail(pool: WorkerPool, tmp_path: Path) -> None:
    tiny.make("gpt_oss", tmp_path)
    argv = ["--device", "cpu", "--hf-checkpoint", str(tmp_path), "--only", "weights: export"]
    [(code, out)] = pool.run(1, export_wrong_experts, argv)
    assert code == 1 and "other bytes in model.layers.0.mlp.experts.down_proj" in out, out


def test_the_error_of_one_rank_is_told_and_the_next_row_runs(pool: WorkerPool, checkpoint: Path) -> None:
    argv = ["--device", "cpu", "--hf-checkpoint", str(checkpoint), "--only", "gradients: TP 2 + SP, plain", "tokenizer"]
    (code, out), _ = pool.run(2, partial(program, layer_spec=crash_on_one), argv)
    assert code == 1
    assert "plain head: FAILED; rank 1: ZeroDivisionError: no layers today (test_family.py:" in out, out
    assert "tokenizer: the end of a turn: proved" in out


def test_a_model_that_is_not_supported_is_one_line(pool: WorkerPool, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    ((code, out),) = pool.run(1, program, ["--device", "cpu", "--hf-checkpoint", str(checkpoint)])
    assert code == 2 and "model_type 'mamba'; supported are" in out and "Traceback" not in out


def test_keys_that_a_family_does_not_read_are_named(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    del config["partial_rotary_factor"]  # it is in rope_parameters, too
    assert unread_keys({**config, "attn_logit_scale": 2.0}) == ["attn_logit_scale"]
