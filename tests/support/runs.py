"""A whole training run inside the worker pool, and what it logged."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.distributed import WorkerPool
from tests.support.tiny import write_rows


@dataclass(frozen=True)
class Inputs:
    """A checkpoint and preferences with nothing wrong, and a folder for what is."""

    checkpoint: Path
    data: Path
    folder: Path

    def with_rows(self, rows: list[dict[str, Any]]) -> Path:
        return write_rows(self.folder / "wrong.jsonl", rows)

    def copy_checkpoint(self) -> Path:
        return Path(shutil.copytree(self.checkpoint, self.folder / "wrong"))


def run_main(argv: list[str]) -> tuple[int, str, str]:
    """On a rank: exit code, stdout and stderr of the program."""
    from simpo_megatron.train import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def train(argv: list[str]) -> str | None:
    """Runs the training program on this rank; the sentence of a UserError, or None."""
    from simpo_megatron.config.arguments import parse
    from simpo_megatron.errors import UserError
    from simpo_megatron.train import run

    try:
        run(parse(argv))
    except UserError as error:
        return str(error)
    return None


def flags(checkpoint: Path, data: Path, **settings: Any) -> list[str]:
    """The command line of a short fp32 run."""
    values = {
        "hf_checkpoint": checkpoint,
        "train_data": data,
        "train_iters": 4,
        "global_batch_size": 8,
        "seq_length": 512,
        "lr": 1e-3,
        "device": "cpu",
        "fp32": True,
        **settings,
    }
    argv = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is not False:
            argv += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    return argv


def run_and_read(pool: WorkerPool, world: int, argv: list[str], save: Path) -> list[dict[str, float]]:
    """Trains on `world` ranks and returns the rows of metrics.jsonl."""
    outcomes = pool.run(world, train, [*argv, "--save", str(save)])
    assert outcomes == [None] * world, outcomes[0]
    return read_rows(save)


def read_rows(save: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def without_speed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """What the rows of metrics.jsonl say of the model, and nothing of the machine."""
    speed = ("time", "tokens_per_second", "tflops_per_gpu", "mfu", "memory_", "seconds/")
    return [{name: value for name, value in row.items() if not name.startswith(speed)} for row in rows]


def megatron_lm_args(model: Path, data: Path, **changes: Any) -> Any:
    """Those of Megatron-LM's arguments that `simpo_megatron/megatron_lm.py` reads, for `make_checkpoint`'s Llama."""
    from simpo_megatron import megatron_lm

    own = vars(megatron_lm.add_simpo_args(argparse.ArgumentParser()).parse_args([]))
    megatron = {
        "micro_batch_size": 1,
        "dataloader_type": "external",
        "calculate_per_token_loss": False,
        "fp16": False,
        "sft": False,
        "mtp_num_layers": None,
        "num_experts": None,
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "allgather",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(model),
        "train_data_path": [str(data)],
        "valid_data_path": None,
        "transformer_impl": "local",
        "context_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "sequence_parallel": False,
        "bf16": True,
        "accumulate_allreduce_grads_in_fp32": True,
        "seq_length": 256,
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 8,
    }
    return SimpleNamespace(**{**own, **megatron, **changes})
