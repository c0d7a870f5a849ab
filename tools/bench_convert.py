"""Conversion speed beside `cp` of the same bytes on the same disk, with peak memory; and the plans of larger models.

    python tools/bench_convert.py --folder SCRATCH [--model llama-3.1-8b] [--rounds 1] [--max-memory 1GiB] [--workers 2]
    python tools/bench_convert.py --plans                  # what 70B and 405B would take here; writes nothing
    python tools/bench_convert.py --folder SCRATCH --make  # only the synthetic checkpoint, in SCRATCH/MODEL

Makes a checkpoint of random bytes in the shape of the model, then measures in turn: `cp` and sync, conversion to
torch_dist, its verification, conversion back. Before each of them, the files that it reads are dropped from the page
cache; each ends when its output is on the disk. The peak is the largest sum of resident memory of the program's
processes, sampled every 20 ms. It needs three times the checkpoint's bytes of disk and removes all of it. Rows go to
`tools/results/convert.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from simpo_megatron.checkpoint.cli import positive  # noqa: E402
from simpo_megatron.disk import human  # noqa: E402
from simpo_megatron.program import Parser, exit_code  # noqa: E402
from simpo_megatron.settings import parse_size  # noqa: E402
from tools.machine import append_rows  # noqa: E402

CSV = ROOT / "tools" / "results" / "convert.csv"
ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": ROPE,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# hidden size, feed-forward size, layers, heads: config.json of meta-llama/Llama-3.1-*
SIZES = {
    "llama-3.1-8b": (4096, 14336, 32, 32),
    "llama-3.1-70b": (8192, 28672, 80, 64),
    "llama-3.1-405b": (16384, 53248, 126, 128),
    "tiny": (256, 512, 4, 8),
}
PLANNED = ("llama-3.1-70b", "llama-3.1-405b")


def config_of(model: str) -> dict[str, Any]:
    """config.json of a model."""
    hidden, ffn, layers, heads = SIZES[model]
    own = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads}
    return LLAMA | own | ({"vocab_size": 1000} if model == "tiny" else {})


def make_checkpoint(folder: Path, model: str) -> int:
    """Writes a checkpoint of random bytes in files of up to 5 GiB; returns its bytes. Tensors are never held whole."""
    import numpy as np

    from simpo_megatron.checkpoint.source import imagine_weights, tensor_bytes
    from simpo_megatron.checkpoint.to_hf import safetensors_header
    from simpo_megatron.models.hf_checkpoint import read_hf_config
    from simpo_megatron.models.weight_files import INDEX, MAX_FILE_BYTES, file_names, index_text, split_files

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(model), indent=2))
    tensors = imagine_weights(read_hf_config(folder)).tensors
    names, sizes = list(tensors), [tensor_bytes(tensor) for tensor in tensors.values()]
    files = split_files(sizes, MAX_FILE_BYTES)
    noise = np.random.default_rng(0).bytes(64 * 2**20 + 4099)
    weight_map, total = {}, 0
    for file, positions in zip(file_names(len(files)), files, strict=True):
        with (folder / file).open("wb") as stream:
            stream.write(safetensors_header({names[at]: tensors[names[at]] for at in positions})[0])
            for at in positions:
                weight_map[names[at]], left = file, sizes[at]
                while left:  # another part of the noise every time, so that no two pieces are alike
                    start = (total // 7919) % 4096
                    total += (size := min(left, 64 * 2**20))
                    stream.write(noise[start : start + size])
                    left -= size
            stream.flush()
            os.fsync(stream.fileno())
    if len(files) > 1:
        (folder / INDEX).write_text(index_text(weight_map, total))
    return total


def drop_from_cache(folder: Path) -> None:
    """Makes the next reader of a folder's files read the disk."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(command: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command and its children.

    Raises:
        RuntimeError: it failed.
    """
    import psutil

    start, peak = time.perf_counter(), 0
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    process = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            peak = max(peak, sum(one.memory_info().rss for one in family))
        except psutil.Error:  # one has just ended
            pass
        time.sleep(0.02)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    return time.perf_counter() - start, peak


def copy_command(source: Path, target: Path) -> list[str]:
    """`cp` as the floor, its bytes on the disk when it ends."""
    quoted = f'cp -r --reflink=never --sparse=never "{source}" "{target}" && sync "{target}"/*'
    return ["bash", "-c", quoted]


def run_round(folder: Path, source: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One round; a row for every program."""
    limits = ["--max-memory", str(args.max_memory), "--workers", str(args.workers)]
    megatron, back, copy = folder / "megatron", folder / "back", folder / "copy"

    def tool(name: str, **flags: Path) -> list[str]:
        line = [sys.executable, str(ROOT / "tools" / name)]
        for flag, value in flags.items():
            line += ["--" + flag.replace("_", "-"), str(value)]
        return [*line, *limits]

    programs = [
        ("cp", source, copy_command(source, copy)),
        ("hf_to_megatron", source, tool("hf_to_megatron.py", hf_checkpoint=source, save=megatron)),
        ("verify", megatron, tool("verify_checkpoint.py", load=megatron)),
        ("megatron_to_hf", megatron, tool("megatron_to_hf.py", load=megatron, hf_reference=source, save=back)),
    ]
    size, rows = sum(path.stat().st_size for path in source.glob("*.safetensors")), []
    for name, reads, command in programs:
        drop_from_cache(reads)
        load = os.getloadavg()[0]
        seconds, peak = measure(command)
        row = {
            "step": name,
            "bytes": size,
            "seconds": round(seconds, 2),
            "mb_per_s": round(size / seconds / 1e6),
            "peak_rss_mib": round(peak / 2**20),
            "load_before": round(load, 1),
        }
        rows.append(row)
        if name == "cp":
            shutil.rmtree(copy)
        speed = f"{size / seconds / 1e6:.0f} MB/s"
        print(f"{name}: {seconds:.1f} s, {speed}, peak {human(peak)}, load before {load:.1f}", flush=True)
    if args.check:
        _check_bytes(source, back)
    for path in (megatron, back):
        shutil.rmtree(path)
    return rows


def _check_bytes(source: Path, back: Path) -> None:
    """Raises RuntimeError where a tensor that came back is not the source's."""
    from simpo_megatron.checkpoint.source import read_source
    from simpo_megatron.checkpoint.transfer.cut import plan_hash
    from simpo_megatron.checkpoint.transfer.moves import Unit
    from simpo_megatron.checkpoint.transfer.processes import run_units

    units = []
    for folder in (source, back):
        tensors = read_source(folder).tensors
        units.append(Unit(folder.name, (), tuple(plan_hash(name, tensors[name], 2**26) for name in sorted(tensors))))
    before, after = run_units(units, None, 1, "comparing")
    if before.hashes != after.hashes:
        raise RuntimeError("the bytes that came back are not the source's")


def plans(args: argparse.Namespace) -> None:
    """Prints the estimates for the larger models."""
    for model in PLANNED:
        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / "config.json").write_text(json.dumps(config_of(model)))
            save = (args.folder or Path(temporary)) / "planned"
            command = [
                sys.executable,
                str(ROOT / "tools" / "hf_to_megatron.py"),
                "--plan",
                "--hf-checkpoint",
                temporary,
            ]
            command += ["--save", str(save), "--max-memory", str(args.max_memory), "--workers", str(args.workers)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            print(model, *found[-2:], sep="\n  ")


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="bench_convert.py", description="Conversion beside cp.")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="scratch space; made, and emptied again")
    parser.add_argument("--model", choices=tuple(SIZES), default="llama-3.1-8b")
    parser.add_argument("--rounds", type=positive, default=1)
    parser.add_argument("--max-memory", type=partial(parse_size, "--max-memory"), default=2**30, metavar="SIZE")
    parser.add_argument("--workers", type=positive, default=1)
    parser.add_argument("--make", action="store_true", help="make the synthetic checkpoint and leave it there")
    parser.add_argument("--plans", action="store_true", help="print the plans of the larger models")
    parser.add_argument("--check", action="store_true", help="compare the bytes that came back with the source")
    parser.add_argument("--csv", type=Path, default=CSV, metavar="FILE")
    return parser


def run(argv: Sequence[str] | None) -> int:
    """Measures."""
    from simpo_megatron.checkpoint.manifest import made_by
    from simpo_megatron.errors import UserError

    args = build_parser().parse_args(argv)
    if args.plans:
        plans(args)
        return 0
    if args.folder is None:
        raise UserError("--folder is missing; give scratch space on the disk to measure")
    source = args.folder / args.model
    if source.exists():
        raise UserError(f"{source} exists; remove it, or give another --folder")
    make_checkpoint(source, args.model)
    if args.make:
        return 0
    try:
        rows = [row | {"round": index} for index in range(args.rounds) for row in run_round(args.folder, source, args)]
    finally:
        for name in (args.model, "megatron", "back", "copy", ".back.conversion"):
            shutil.rmtree(args.folder / name, ignore_errors=True)
    floor = min(row["seconds"] for row in rows if row["step"] == "cp")
    facts = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} {os.cpu_count()} cores",
        "torch": made_by()["torch"],
        "python": platform.python_version(),
        "model": args.model,
        "max_memory_mib": args.max_memory // 2**20,
        "workers": args.workers,
    }
    rows = [row | {"of_cp": round(floor / row["seconds"], 3)} for row in rows]
    append_rows(args.csv, rows, facts)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return exit_code("bench_convert.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
