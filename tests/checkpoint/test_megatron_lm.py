"""Megatron-LM's own argument parser and loader take converted checkpoints.

Needs a checkout of Megatron-LM at core_v0.16.1: MEGATRON_LM_PATH=/path/to/Megatron-LM. Skipped without one.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support import families as tiny
from tests.support.checkpoints import IDS, to_megatron
from tests.support.distributed import free_environment

MEGATRON_LM = os.environ.get("MEGATRON_LM_PATH")
pytestmark = pytest.mark.skipif(
    not MEGATRON_LM, reason="set MEGATRON_LM_PATH to a checkout of Megatron-LM core_v0.16.1"
)

# One rank: parses the flags in megatron_args.yaml, restores arguments from the checkpoint, loads it, computes logits.
PROGRAM = """
import json, sys
from pathlib import Path
from unittest.mock import MagicMock
megatron_lm, jobs = sys.argv[1:]
import torch
import torch.distributed as dist
from simpo_megatron import compat, cpu
compat.quiet_megatron()
cpu.enable()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from tests.support.checkpoints import IDS, build_empty
from tests.support import families as tiny
sys.path.append(megatron_lm)  # last: it has a package named tools, too
# BERT's tokenizer, and Triton kernels
for absent in ("six", "megatron.core.transformer.custom_layers.batch_invariant_kernels"):
    sys.modules.setdefault(absent, MagicMock())
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.training import arguments, checkpointing, global_vars
for hf_path, out, flags in json.loads(Path(jobs).read_text()):
    sys.argv = ["pretrain_gpt.py", *flags]
    args = arguments.parse_args()
    args, _ = checkpointing.load_args_from_checkpoint(args)
    arguments.validate_args(args)
    global_vars.unset_global_variables()
    global_vars.set_args(args)
    init_num_microbatches_calculator(0, None, 1, 1, 1)
    _, config, models = build_empty(Path(hf_path), {})
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
                 "kv_channels", "add_qkv_bias", "qk_layernorm", "moe_router_topk", "moe_ffn_hidden_size", "window_size",
                 "add_bias_linear", "moe_router_pre_softmax", "layernorm_epsilon"):
        if config.num_moe_experts or not name.startswith("moe"):
            assert getattr(args, name) == getattr(config, name), (hf_path, name)
    assert args.num_experts == config.num_moe_experts
    iteration, _ = checkpointing.load_checkpoint(models, None, None, strict=True)
    assert iteration == 0
    torch.save(tiny.run_schedule(config, models, IDS, None, None), out)
    parallel_state.destroy_model_parallel()
"""
NAMES = ("llama_tied", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe_plain")


def command_line(load: Path, kind: str) -> list[str]:
    """What a user adds to the flags in megatron_args.yaml."""
    saved = yaml.safe_load((load / "release" / "megatron_args.yaml").read_text())
    return [
        *shlex.split(saved["flags"]),
        *("--load", str(load), "--use-checkpoint-args", "--ckpt-format", kind, "--transformer-impl", "local"),
        *(
            "--seq-length",
            "64",
            "--micro-batch-size",
            "1",
            "--no-persist-layer-norm",
            "--no-gradient-accumulation-fusion",
        ),
        *("--exit-on-missing-checkpoint", "--train-iters", "1", "--lr", "1e-5", "--vocab-size", str(tiny.VOCAB)),
        *("--no-masked-softmax-fusion", "--no-bias-swiglu-fusion", "--no-rope-fusion"),
    ]


def test_megatron_lm_loads_every_family(tmp_path: Path) -> None:
    models: dict[Path, Any] = {}
    jobs = []
    for name in NAMES:
        for kind, layout in (("torch_dist", {}), ("torch", {"format": "torch", "transformer_impl": "local"})):
            folder = tmp_path / name / kind
            models[folder] = tiny.make(name, folder / "hf")
            load = to_megatron(folder / "hf", folder / "megatron", **layout)
            jobs.append((str(folder / "hf"), str(folder / "logits.pt"), command_line(load, kind)))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    root = str(Path(__file__).parents[2])
    environment = {**free_environment(), "PYTHONPATH": root, "WORLD_SIZE": "1", "RANK": "0"}
    command = [sys.executable, "-c", PROGRAM, str(MEGATRON_LM), str(tmp_path / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, model in models.items():
        with torch.no_grad():
            expected = model(IDS).logits[0]
        found = torch.load(folder / "logits.pt")
        assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-5, folder
