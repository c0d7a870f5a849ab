"""Time and memory of a training step of each variant, beside DPO with a reference model in memory.

    python -m examples.study.cost OUTPUT simpo dpo      # the folder of a study; prints the cost as JSON

The model is a larger one with random weights, so that a second copy shows in the memory. Each variant has processes of
its own, with one thread. The time of a step is CPU time, which other programs on the machine hardly change, and the
least of all steps. The memory is the most that a process had, without what it had before it built the model.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples.study.plan import VARIANTS, Plan, Variant
from examples.study.runs import finished
from simpo_megatron.config.arguments import parse
from simpo_megatron.errors import UserError
from simpo_megatron.files import atomic_write
from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from simpo_megatron.trainer.data import load_data
from simpo_megatron.trainer.distributed import initialize, resolve_device
from simpo_megatron.trainer.reference_scoring import ScoringEngine
from simpo_megatron.trainer.scoring import score_batch, score_pairs
from simpo_megatron.trainer.setup import build_engine, build_transformer_config, name_layers

RESIDENT = "dpo, resident reference"
PASSES = 2  # processes of each variant, in turn
STEPS = 4  # of each process; the first one is not timed
PAIRS = 8  # of a step
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}


def measure(plan: Plan) -> dict[str, dict[str, float]]:
    """The cost of every variant of a plan, by its name, and that of `RESIDENT`: `seconds` of a step and `mib`.

    It is measured in a fresh process: this one has started threads, which do not survive a fork.

    Raises:
        UserError: the process fails.
    """
    names = [variant.name for variant in plan.variants]
    settings = [str(SHAPE), *names]
    file, log = plan.output / "cost.json", plan.output / "cost.log"
    found = finished(file, settings)
    if found is None:
        command = [sys.executable, "-m", "examples.study.cost", str(plan.output), *names]
        with log.open("w", encoding="utf-8") as lines:
            done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=lines, text=True)
        if done.returncode:
            raise UserError(f"the cost of a step could not be measured; the log is {log}")
        found = {"settings": settings, "cost": json.loads(done.stdout)}
        atomic_write(file, json.dumps(found))
    return found["cost"]


def _make_model(output: Path) -> Path:
    """A Llama of 10 million parameters with the tokenizer of the study, in OUTPUT/cost_model."""
    tokenizer = AutoTokenizer.from_pretrained(output / "model", local_files_only=True)
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    folder = output / "cost_model"
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB


def _train(variant: Variant, resident: bool, model: Path, pairs_file: Path, answer: Connection) -> None:
    """Takes the steps of one variant, in a process of its own, and sends their CPU seconds and the memory in MiB."""
    before = _peak_mib()
    flags = ["--objective", variant.objective, *variant.flags, "--hf-checkpoint", str(model)]
    flags += ["--train-data", str(pairs_file), "--device", "cpu", "--fp32", "--seq-length", "2048"]
    config = name_layers(parse([*flags, "--train-iters", str(STEPS), "--global-batch-size", str(PAIRS)]))
    resolve_device("cpu")
    hf = read_hf_checkpoint(model)
    initialize(build_transformer_config(config, hf), 10, "cpu", seed=1)
    pairs, _, _ = load_data(config.data, hf)
    reference = None
    if variant.needs_reference:
        reference = ScoringEngine.build(config, hf, build_transformer_config(config, hf))
        pairs = pairs.with_reference_sums(score_pairs(reference, pairs))
        reference = reference if resident else None
    engine = build_engine(config, hf, build_transformer_config(config, hf), STEPS)
    seconds = []
    for step in range(STEPS):
        indices = pairs.order(step * PAIRS, PAIRS, seed=1)
        started = time.process_time()
        if reference is not None:
            sums = np.zeros((len(pairs), 2), np.float32)
            sums[indices], _ = score_batch(reference, pairs, indices)
            pairs = pairs.with_reference_sums(sums)
        engine.train_step(engine.packer.pack(pairs, indices))
        seconds.append(time.process_time() - started)
    answer.send((seconds, _peak_mib() - before))


def _quietly(*arguments: Any) -> None:
    with redirect_stdout(sys.stderr), redirect_stderr(sys.stderr):
        _train(*arguments)


def run(output: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """Measures some variants, and DPO with a reference model in memory, each in `PASSES` processes."""
    torch.set_num_threads(1)
    model = _make_model(output)
    pairs_file = output / "cost_pairs.jsonl"
    rows = (output / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    pairs_file.write_text("".join(rows[: STEPS * PAIRS]), encoding="utf-8")
    fork = multiprocessing.get_context("fork")  # a child shares what the imports took
    names = [*names, RESIDENT]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    mib: dict[str, list[float]] = {name: [] for name in names}
    for name in names * PASSES:
        ours, theirs = fork.Pipe(duplex=False)
        variant = VARIANTS.get(name, VARIANTS["dpo"])
        child = fork.Process(target=_quietly, args=(variant, name == RESIDENT, model, pairs_file, theirs))
        child.start()
        theirs.close()  # so that reading ends when the child does
        found, peak = ours.recv()
        child.join()
        seconds[name] += found[1:]
        mib[name].append(peak)
    return {name: {"seconds": min(seconds[name]), "mib": min(mib[name])} for name in names}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2:])))
