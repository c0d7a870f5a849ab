"""Tokens per second of whole training steps: this package at TP1 and TRL's CPOTrainer, on the same model and pairs.

    python tools/bench_step.py --data pairs.jsonl [--hf-checkpoint DIR] [--steps 6] [--json rows.json]

Both sides run in processes of their own, in turns (`--rounds`), on the same pairs in the same order. A step is forward,
backward, clipping and AdamW. `--heads fused plain` measures both heads of this package. Tokens of prompts and responses
are counted, padding is not. `--lora-rank R` freezes the model and trains adapters on all projections: this package's,
and PEFT's in TRL (`peft_config`), with alpha 2 R.

TRL pads every micro-batch to its longest response. So it is measured at several micro-batch sizes and compared at its
best; `--trl-micro-batches` without a number leaves it out. Without `--hf-checkpoint` a random Llama is made, with a
tokenizer trained on the data. The table goes to the terminal, the rows to `tools/results/step.csv`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import append_rows, clocks, processor, since

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "tools" / "results" / "step.csv"
SEED, BETA, GAMMA, LR = 1234, 2.0, 1.0, 1e-5
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>{{ m['content'] }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)


def make_model(folder: Path, data: Path) -> Path:
    """A random Llama of about 20M parameters and a byte-level BPE of 8,000 tokens, as a Hugging Face checkpoint."""
    import torch
    from toy_tokenizer import train_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    with data.open(encoding="utf-8") as lines:
        tokenizer = train_tokenizer(lines, 8000, ["<|bos|>", "<|eot|>", "<|start|>", "<|end|>"], CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def batches(pairs: Any, args: argparse.Namespace) -> list[Any]:
    """Indices of the pairs of every step, the same for both sides."""
    return [pairs.order(step * args.pairs, args.pairs, SEED) for step in range(args.steps)]


def read_pairs(args: argparse.Namespace) -> Any:
    """The tokenized pairs, as training reads them."""
    from transformers import AutoTokenizer

    from simpo_megatron.data import DataOptions, load_preferences

    options = DataOptions(max_length=args.max_length, max_prompt_length=args.max_length // 2)
    return load_preferences(args.data, AutoTokenizer.from_pretrained(args.hf_checkpoint), options)[0]


def run_ours(args: argparse.Namespace) -> list[list[float]]:
    """Seconds of each step of this package, by both clocks."""
    from simpo_megatron.config.arguments import parse
    from simpo_megatron.train import run

    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "hf-checkpoint": args.hf_checkpoint,
            "train-data": args.data,
            "train-iters": args.steps,
            "global-batch-size": args.pairs,
            "seq-length": args.seq_length,
            "max-length": args.max_length,
            "lr": LR,
            "lr-warmup-fraction": 0,
            "simpo-beta": BETA,
            "simpo-gamma": GAMMA,
            "seed": SEED,
            "device": "cpu",
            "head": args.only.removeprefix("simpo_megatron "),
            "tensorboard-dir": folder,
        }
        if args.lora_rank:
            flags |= {"lora-rank": args.lora_rank, "lora-alpha": 2 * args.lora_rank}
        argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        from simpo_megatron.trainer.engine import Engine

        seconds, step = [], Engine.train_step

        def timed(self: Engine, batch: Any) -> dict[str, float]:
            started = clocks()
            metrics = step(self, batch)
            seconds.append(since(started))
            return metrics

        Engine.train_step = timed  # type: ignore[method-assign]
        run(parse([*argv, *(["--fp32"] if args.precision == "fp32" else [])]))
    return seconds


def peft_config(args: argparse.Namespace) -> Any:
    """PEFT's adapters on all projections of a Llama; None where all weights are trained."""
    if not args.lora_rank:
        return None
    from peft import LoraConfig

    from simpo_megatron.adapters.lora import TARGETS

    rank = args.lora_rank
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")


def run_trl(args: argparse.Namespace) -> list[list[float]]:
    """Seconds of each step of TRL's CPOTrainer on the same token ids, in micro-batches of --micro-batch pairs."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from simpo_megatron.data.reading import read_rows

    pairs = read_pairs(args)
    rows = [row for _, row in read_rows(args.data)]
    if len(rows) != len(pairs):
        raise SystemExit(
            f"{args.data}: {len(rows) - len(pairs)} rows were dropped; give data without rows that are dropped"
        )
    order = [int(i) for batch in batches(pairs, args) for i in batch]
    messages = [
        {"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:]}
        for row in (rows[i] for i in order)
    ]
    seconds: list[list[float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = clocks()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(since(self.started))

    class Sequential(CPOTrainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory() as folder:
        config = CPOConfig(
            output_dir=folder,
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=BETA,
            simpo_gamma=GAMMA,
            max_length=args.max_length,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=args.pairs // args.micro_batch,
            max_steps=args.steps,
            learning_rate=LR,
            max_grad_norm=1.0,
            bf16=args.precision == "bf16",
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Sequential(
            model=AutoModelForCausalLM.from_pretrained(args.hf_checkpoint, dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_list(messages),
            processing_class=AutoTokenizer.from_pretrained(args.hf_checkpoint),
            callbacks=[Clock()],
            peft_config=peft_config(args),
        )
        trainer.train()
    return seconds


def measure(args: argparse.Namespace, implementation: str, micro_batch: int, precision: str) -> list[list[float]]:
    """Runs one side in a process of its own; the seconds of its steps without the first, which warms up."""
    command = [sys.executable, __file__, "--only", implementation, "--micro-batch", str(micro_batch)]
    for name in ("data", "hf_checkpoint", "steps", "pairs", "seq_length", "max_length", "lora_rank"):
        command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads)}
    result = subprocess.run([*command, "--precision", precision], capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{implementation} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])[1:]


def table(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a table, with the ratio to TRL's best micro-batch size."""
    from rich.console import Console
    from rich.table import Table

    numbers = ("seconds", "tokens_per_second", "ratio_to_best_trl", "cpu_seconds", "cpu_ratio_to_best_trl")
    shown = Table("precision", "implementation", "micro-batch", *(name.replace("_", " ") for name in numbers))
    for row in rows:
        values = (f"{row[name]:.4g}" for name in numbers)
        shown.add_row(row["precision"], row["implementation"], str(row["micro_batch"] or "packed"), *values)
    Console().print(shown)


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures both sides in turns; one row for each implementation, micro-batch size and precision."""
    pairs = read_pairs(args)
    tokens = statistics.mean(int(pairs.pair_tokens[batch].sum()) for batch in batches(pairs, args)[1:])
    sides = [
        *((f"simpo_megatron {head}", 0) for head in args.heads),
        *(("trl", size) for size in args.trl_micro_batches),
    ]
    rows = []
    for precision in args.precisions:
        seconds: dict[tuple[str, int], list[list[float]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for name, micro in sides:
                seconds[name, micro] += measure(args, name, micro, precision)
        mean = {side: [statistics.mean(of) for of in zip(*found, strict=True)] for side, found in seconds.items()}
        trl = [value for (name, _), value in mean.items() if name == "trl"] or [[math.nan, math.nan]]
        best, cpu_best = (min(of) for of in zip(*trl, strict=True))
        rows += [
            {
                "precision": precision,
                "implementation": name,
                "micro_batch": micro,
                "seconds": round(wall, 4),
                "tokens_per_second": round(tokens / wall, 1),
                "ratio_to_best_trl": round(best / wall, 3),
                "cpu_seconds": round(cpu, 4),
                "cpu_ratio_to_best_trl": round(cpu_best / cpu, 3),
            }
            for (name, micro), (wall, cpu) in mean.items()
        ]
    return rows


def setting(args: argparse.Namespace, load: float) -> dict[str, Any]:
    """Machine, versions and setting of a row.

    Args:
        args: of the command line.
        load: of the machine before the measurement.
    """
    return {
        "date": time.strftime("%Y-%m-%d"),
        "data": args.data.name,
        "pairs": args.pairs,
        "steps": args.steps * args.rounds,
        "max_length": args.max_length,
        "lora_rank": args.lora_rank,
        "threads": args.threads,
        "load_before": load,
        "machine": processor(),
        **{name: version(name) for name in ("torch", "megatron-core", "transformers", "trl", "peft")},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="JSONL of conversational pairs (UltraFeedback-binarized)"
    )
    parser.add_argument("--hf-checkpoint", type=Path, help="model to measure; default a random Llama of 20M parameters")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps a round; the first is left out")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of an optimizer step")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a packed row of this package")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of prompt and response together")
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank; 0: all weights")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of a process")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument(
        "--heads", nargs="+", default=["fused"], choices=["fused", "plain"], help="which --head of this package"
    )
    parser.add_argument("--trl-micro-batches", nargs="*", type=int, default=[1, 4, 16], help="pairs; none: without TRL")
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    for name, kind in (("--only", str), ("--micro-batch", int), ("--precision", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # how the tool starts its own processes
    args = parser.parse_args()
    if args.only:
        print("\n" + json.dumps((run_trl if args.only == "trl" else run_ours)(args)))
        return
    if not args.data.is_file():
        parser.error(f"--data {args.data} is not a file")
    with tempfile.TemporaryDirectory() as folder:
        args.hf_checkpoint = args.hf_checkpoint or make_model(Path(folder), args.data)
        load = round(os.getloadavg()[0], 2)
        rows = benchmark(args)
    table(rows)
    append_rows(CSV, rows, setting(args, load))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
