"""Measures the data path: preparation beside TRL's, ten million pairs mapped from disk, padding, and the loader.

    python tools/bench_data.py --data pairs.jsonl [--hf-checkpoint DIR] [--repeat 2] [--pairs 10000000]

Every preparation runs in a process of its own, which imports everything before the clock starts. TRL's time is that of
constructing its trainer on all rows, less that on two rows. The ten million pairs have realistic lengths and a sparse
.bin, so they take little disk. Without `--hf-checkpoint` the model of `bench_step.py` is made. The table goes to the
terminal, the rows go to `tools/results/data.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
CSV = ROOT / "tools" / "results" / "data.csv"
MAX_LENGTH, SEQ_LENGTH, BATCH = 2048, 4096, 128


def cpu_seconds() -> float:
    """CPU seconds of this process and of those it has waited for. A busy machine does not change them."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def prepare_ours(args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Seconds and CPU seconds from the file to the prepared set on disk, with the loading of the tokenizer."""
    from megatron.core.datasets import indexed_dataset  # noqa: F401  the import is not measured

    from simpo_megatron import compat
    from simpo_megatron.data import DataOptions
    from simpo_megatron.data.prepare import prepare
    from simpo_megatron.data.tokenizer import load_tokenizer

    compat.quiet_megatron()
    load_tokenizer(args.hf_checkpoint)
    options = DataOptions(max_length=MAX_LENGTH, max_prompt_length=MAX_LENGTH // 2)
    started, used = time.perf_counter(), cpu_seconds()
    prepare(args.data, args.hf_checkpoint, folder / "ours", options, workers=args.workers)
    return time.perf_counter() - started, cpu_seconds() - used


def prepare_trl(args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Seconds and CPU seconds that constructing TRL's trainer takes longer for all rows than for two."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    from simpo_megatron.data.reading import read_rows

    make_config, make_trainer = (CPOConfig, CPOTrainer) if args.only == "trl-cpo" else (DPOConfig, DPOTrainer)
    rows = [row for _, row in read_rows(args.data)]
    messages = [
        {"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:]} for row in rows
    ]
    tokenizer = AutoTokenizer.from_pretrained(args.hf_checkpoint)
    small = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(small).save_pretrained(folder / "small")
    fixed = {"max_length": MAX_LENGTH, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}

    def seconds(some: list[dict[str, Any]], workers: int | None) -> np.ndarray:
        config = make_config(output_dir=str(folder), dataset_num_proc=workers, **fixed)
        data: Any = Dataset.from_list(some)
        started = np.array([time.perf_counter(), cpu_seconds()])
        make_trainer(model=str(folder / "small"), args=config, train_dataset=data, processing_class=tokenizer)
        return np.array([time.perf_counter(), cpu_seconds()]) - started

    few = seconds(messages[:2], None)
    wall, cpu = seconds(messages, args.workers if args.workers > 1 else None) - few
    return float(wall), float(cpu)


def make_large(prefix: Path, pairs: int) -> None:
    """Writes a prepared set with lengths as in real data; the ids are a hole in the file."""
    from simpo_megatron.data.pairs import all_columns
    from simpo_megatron.data.prepared_format import SUFFIXES, VERSION, part, record_type

    generator = np.random.default_rng(0)
    median, spread = np.array([32, 300, 100]), np.array([0.9, 0.7, 0.9])
    lengths = np.exp(spread * generator.standard_normal((pairs, 3), dtype=np.float32))
    lengths = np.clip(median * lengths, 1, 1000).astype(np.int32).ravel()
    ends = np.cumsum(lengths, dtype=np.int64)
    with part(prefix, ".idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3 * pairs, pairs + 1))
        file.write(lengths.tobytes() + (4 * (ends - lengths)).tobytes())
        file.write(np.arange(0, 3 * pairs + 1, 3, dtype=np.int64).tobytes())
    with part(prefix, ".bin").open("wb") as file:
        file.truncate(4 * int(ends[-1]))
    records = np.lib.format.open_memmap(part(prefix, ".pairs.npy"), "w+", record_type(), (pairs,))
    for name, numbers in all_columns(pairs, {}).items():
        records[name] = numbers
    records.flush()
    about = {
        "version": VERSION,
        "pairs": pairs,
        "tokens": int(ends[-1]),
        "crc32": dict.fromkeys(SUFFIXES[:3], 0),
        "largest_token": 0,
        "longest_sequence": 2000,
        "options": {"max_length": MAX_LENGTH},
        "fingerprint": {},
        "report": {},
    }
    part(prefix, ".json").write_text(json.dumps(about))


def open_large(prefix: Path) -> dict[str, float]:
    """Seconds and MiB that it takes to open a set, and then to read the first and a later batch."""
    import psutil
    import torch  # noqa: F401  imports are not measured
    from megatron.core.datasets import indexed_dataset  # noqa: F401

    from simpo_megatron import compat
    from simpo_megatron.data.prepared_set import PreparedPairs

    compat.quiet_megatron()

    def resident() -> tuple[float, float]:
        """MiB of this process: all, and the part that the kernel cannot drop because it is not in a file."""
        info = psutil.Process().memory_info()
        return info.rss / 2**20, (info.rss - info.shared) / 2**20

    def batch(position: int) -> None:
        indices = data.order(position, BATCH, seed=1)
        _ = (
            [ids.sum() for i in indices for ids in data.pair(i)],
            data.columns["weight"][indices],
            data.prompt_length[indices],
        )

    before, started = resident(), time.perf_counter()
    data = PreparedPairs(prefix, verify=False)
    found = {"open_seconds": time.perf_counter() - started, "open_rss_mib": resident()[0] - before[0]}
    started = time.perf_counter()
    batch(0)
    found["first_batch_seconds"] = time.perf_counter() - started
    started = time.perf_counter()
    for step in range(1, 51):
        batch(step * BATCH)
    found["batch_seconds"] = (time.perf_counter() - started) / 50
    for i, name in enumerate(("rss", "rss_without_mapped_pages")):
        found[f"after_51_batches_{name}_mib"] = resident()[i] - before[i]
    return found


def loader(pairs: Any, shared: bool) -> dict[str, float]:
    """Seconds that a step of `BATCH` pairs takes to pack and to lay out as tensors."""
    from simpo_megatron.batch.row import BatchCounts, RowFormat, pack_row
    from simpo_megatron.data import pack_batch, pair_costs

    steps, tokens, started = len(pairs) // BATCH, 0, time.perf_counter()
    for step in range(steps):
        indices = pairs.order(step * BATCH, BATCH, seed=1)
        prompt = pairs.prompt_length[indices]
        responses = [pairs.chosen_length[indices], pairs.rejected_length[indices]]
        lengths = prompt * (1 if shared else 2) + sum(responses)
        for row in pack_batch(lengths, SEQ_LENGTH, 1, costs=pair_costs(prompt, responses, 4096, shared))[0]:
            batch = pack_row(pairs, indices[row].tolist(), BatchCounts(BATCH, 1, 1), RowFormat(share_prompts=shared))
            tokens += batch.tokens.shape[1]
    return {"seconds_a_step": (time.perf_counter() - started) / steps, "tokens_an_epoch": tokens}


def child(args: argparse.Namespace, only: str, **flags: Any) -> Any:
    """Runs one measurement in its own process."""
    command = [sys.executable, __file__, "--only", only, "--data", str(args.data)]
    command += ["--hf-checkpoint", str(args.hf_checkpoint)]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{only} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def benchmark(args: argparse.Namespace, folder: Path) -> list[tuple[str, str, float, str]]:
    """(measure, setting, value, unit) of everything."""
    from simpo_megatron.data.packing import packing_figures
    from simpo_megatron.data.prepared_set import PreparedPairs
    from simpo_megatron.data.reading import read_rows

    lines = [json.dumps(row, ensure_ascii=False) + "\n" for _, row in read_rows(args.data)]
    args.data = folder / "rows.jsonl"
    args.data.write_text("".join(lines * args.repeat), encoding="utf-8")
    count = len(lines) * args.repeat
    found: list[tuple[str, str, float, str]] = []
    rates: dict[tuple[str, int], np.ndarray] = {}
    sides = [(only, workers) for workers in (1, 2) for only in ("ours", "trl-cpo", "trl-dpo")]
    for only, workers in sides:
        rates[only, workers] = count / np.array(child(args, only, workers=workers, folder=folder))
        for rate, unit in zip(rates[only, workers].tolist(), ("pairs/s", "pairs/CPU second"), strict=True):
            found.append(("preparation", f"{only}, {workers} workers, {count} rows", rate, unit))
    for other in ("trl-cpo", "trl-dpo"):
        ours, theirs = rates["ours", 2], np.maximum(rates[other, 1], rates[other, 2])
        for ratio, of in zip((ours / theirs).tolist(), ("wall clock", "CPU time"), strict=True):
            found.append(("preparation", f"ours, 2 workers / {other}, its best, {of}", ratio, "ratio"))
    pairs = PreparedPairs(folder / "ours")
    real = np.stack([pairs.prompt_length[:], pairs.chosen_length[:], pairs.rejected_length[:]], axis=1)[: len(lines)]
    figures = packing_figures(real, SEQ_LENGTH)
    for name in ("padding_unpacked", "padding_packed", "tokens_per_row", "saved_by_shared_prompts"):
        found.append(("packing", f"{name}, rows of {SEQ_LENGTH}, {BATCH} pairs a batch", figures[name], ""))
    for shared in (False, True):
        for name, value in loader(pairs, shared).items():
            found.append(("loader", f"{name}, shared prompts {shared}, {BATCH} pairs a step", value, ""))
    for size in (1000, args.pairs):
        make_large(folder / f"large{size}", size)
        for name, value in child(args, "open", prefix=folder / f"large{size}").items():
            found.append(("mapped set", f"{name}, {size} pairs", value, name.rsplit("_", 1)[1]))
    return found


def append_csv(rows: list[tuple[str, str, float, str]], args: argparse.Namespace, data: str, load: float) -> None:
    """Appends the rows with machine, load and versions."""
    from machine import append_rows, processor

    where = {
        "date": time.strftime("%Y-%m-%d"),
        "data": data,
        "machine": processor(),
        "load_average": round(load, 1),
        **{name: version(name) for name in ("megatron-core", "transformers", "tokenizers", "trl", "numpy")},
    }
    names = ("measure", "setting", "value", "unit")
    append_rows(CSV, [dict(zip(names, (*row[:2], f"{row[2]:.5g}", row[3]), strict=True)) for row in rows], where)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of pairs (UltraFeedback-binarized)")
    parser.add_argument("--hf-checkpoint", type=Path)
    parser.add_argument("--repeat", type=int, default=2, help="times the rows are prepared")
    parser.add_argument("--pairs", type=int, default=10_000_000, help="pairs of the large set")
    for name, kind in (("--only", str), ("--workers", int), ("--folder", Path), ("--prefix", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # how the tool calls itself
    args = parser.parse_args()
    if args.only:
        measure = {"ours": prepare_ours, "open": lambda args, _: open_large(args.prefix)}.get(args.only, prepare_trl)
        print("\n" + json.dumps(measure(args, args.folder)))
        return
    if not args.data.is_file():
        parser.error(f"--data {args.data} is not a file")
    from bench_step import make_model
    from rich.console import Console
    from rich.table import Table

    load, data = os.getloadavg()[0], args.data.name
    with tempfile.TemporaryDirectory() as folder:
        args.hf_checkpoint = args.hf_checkpoint or make_model(Path(folder) / "model", args.data)
        rows = benchmark(args, Path(folder))
    table = Table("measure", "setting", "value", "unit")
    for measure, setting, value, unit in rows:
        table.add_row(measure, setting, f"{value:.4g}", unit)
    Console().print(table)
    append_csv(rows, args, data, load)


if __name__ == "__main__":
    main()
