"""Measures the head alone, forward and backward: this package's, its peers', and the GEMMs that every head needs.

    python tools/bench_head.py [--device cpu|cuda] [--shapes 2x512:2048x64000 1x512+2048:2048x64000@2 ...] [--json FILE]

A shape is PAIRSxRESPONSE[+PROMPT]:HIDDENxVOCABULARY[@TENSOR_PARALLEL]; response and prompt are numbers of tokens. Every
measurement runs in processes of its own, one a shard. They also time the floor: the three GEMMs over the response
tokens alone. The floor is in the dtype of the weight, or in fp32 where the CPU only emulates bf16, because fp32 is
faster there. A measurement that takes longer than --limit is stopped.

`--objective NAME ...` measures our head alone, with the losses of these objectives beside that of SimPO (`all`: every
objective with two responses). They take turns in one process. The ratio is the median of their time by SimPO's in the
same repeat; on a CPU it is that of the time of the cores. The rows go to `tools/results/head_objectives.csv`.

Columns: milliseconds and floor (the best of --repeats); peak extra bytes beyond inputs and the fp32 `main_grad` that
Megatron's DDP keeps in any case (resident memory of the process on a CPU, torch's allocator on CUDA); collectives of
one pass; relative errors of both gradients against fp64. Rows are appended to `tools/results/head.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from head_peers import IMPLEMENTATIONS, Problem, Shape, expected_gradients, reason_to_skip
from head_worker import MIB, memory, work
from machine import append_rows, processor

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "tools" / "results" / "head.csv"
OBJECTIVES_CSV = CSV.with_name("head_objectives.csv")
SHAPES = {
    "cpu": ["2x512:2048x64000", "2x64:2048x64000", "2x64+256:2048x64000", "1x128:2048x64000", "16x8:2048x64000"]
    + [f"2x64:2048x64000@{tp}" for tp in (2, 4)],
    "cuda": ["8x512:4096x128256", "8x512+2048:4096x128256", "1x4096:4096x128256", "16x256:4096x128256"],
}


def measure(args: argparse.Namespace, name: str, shape: str, dtype: str, gradients: Path) -> dict[str, Any]:
    """Runs one measurement in processes of its own, one a shard.

    Args:
        args: of the command line.
        name: of the implementation.
        shape: as on the command line.
        dtype: as on the command line.
        gradients: the file that the first rank writes its gradients to.

    Returns:
        What the first rank measured; a `note` says why something is missing.
    """
    ranks = Shape.parse(shape).tensor_parallel
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"only": name, "shapes": shape, "dtypes": dtype, "gradients": gradients}
    for option in ("device", "repeats", "threads", "slab_mib"):
        options[option.replace("_", "-")] = getattr(args, option)
    command = [sys.executable, __file__, *(part for key, value in options.items() for part in (f"--{key}", str(value)))]
    command += ["--objective", *args.objective] if args.objective else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": str(max(1, args.threads // ranks))}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        processes = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank)},
                stdout=out if rank == 0 else subprocess.DEVNULL,
                stderr=errors if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(ranks)
        ]
        peak, stopped = 0, False
        try:
            processes[0].wait(timeout=args.limit)
        except subprocess.TimeoutExpired:
            stopped = True
            if args.device == "cpu":
                peak = memory("VmHWM", processes[0].pid)
        for process in processes:
            if stopped:
                process.kill()
            process.wait()
        out.seek(0)
        errors.seek(0)
        found: dict[str, Any] = {}
        for line in out.read().splitlines():
            if line.startswith("{"):
                found |= json.loads(line)
        base = found.pop("base", None)
        if stopped:
            extra = {"peak_extra_bytes": peak - base} if base else {}
            return {**found, "milliseconds": None, **extra, "note": f"stopped after {args.limit} s"}
        if processes[0].returncode:
            return {"note": "failed: " + (errors.read().strip().splitlines() or ["no message"])[-1]}
    return found


def error(found: Any, right: Any) -> float:
    """The norm of the difference, relative to the norm of what is right."""
    return float((found.double() - right).norm() / right.norm())


def benchmark(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures every implementation on every shape in every dtype. Returns a row for each, also if it could not run."""
    import torch
    from rich.progress import Progress

    rows = []
    jobs = len(args.shapes) * len(args.dtypes) * len(args.implementations)
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        bar, right, known = progress.add_task("measuring", total=jobs), None, None
        for shape in args.shapes:
            parsed = Shape.parse(shape)
            for dtype in args.dtypes:
                for name in args.implementations:
                    progress.update(bar, description=f"{shape} {dtype} {name}")
                    row: dict[str, Any] = dict.fromkeys(COLUMNS)
                    row |= {"implementation": name, "shape": shape, "dtype": dtype, "note": ""}
                    gradients = Path(folder) / "gradients.pt"
                    gradients.unlink(missing_ok=True)
                    skipped = reason_to_skip(name, parsed)
                    row |= {"note": f"skipped: {skipped}"} if skipped else measure(args, name, shape, dtype, gradients)
                    if gradients.exists():
                        whole = shape.partition("@")[0]
                        if known != whole:
                            problem = Problem(Shape.parse(whole), torch.bfloat16, args.device, 0)
                            right, known = expected_gradients(problem), whole
                        hidden, weight = torch.load(gradients, weights_only=True)
                        row["grad_hidden_error"] = error(hidden, right[0])
                        row["grad_weight_error"] = error(weight, right[1].cpu()[: len(weight)])
                    if row["milliseconds"]:
                        row["times_floor"] = row["milliseconds"] / row["floor_milliseconds"]
                    rows.append(row)
                    progress.advance(bar)
    return rows


def benchmark_objectives(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures our head with the loss of every objective of --objective on every shape in every dtype."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            for dtype in args.dtypes:
                found = measure(args, "ours", shape, dtype, Path(folder) / "gradients.pt")
                if "objectives" not in found:
                    raise SystemExit(f"{shape} {dtype}: {found['note']}")
                for name, measured in found["objectives"].items():
                    rows.append({"objective": name, "shape": shape, "dtype": dtype, **measured})
    return rows


COLUMNS = ("implementation", "shape", "dtype", "milliseconds", "floor_milliseconds", "times_floor", "peak_extra_bytes")
COLUMNS += ("collectives", "grad_hidden_error", "grad_weight_error", "note")


def table(rows: list[dict[str, Any]]) -> None:
    """Prints the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(
        "shape", "dtype", "implementation", "ms", "floor ms", "x floor", "peak MiB", "collectives", "dH", "dW", "note"
    )

    def text(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    for row in rows:
        peak = row["peak_extra_bytes"]
        shown.add_row(
            *(row[key] for key in ("shape", "dtype", "implementation")),
            *(text(row[key], ".1f") for key in ("milliseconds", "floor_milliseconds")),
            text(row["times_floor"], ".2f"),
            text(None if peak is None else peak / MIB, ".0f"),
            row["collectives"] or "-",
            *(text(row[key], ".1e") for key in ("grad_hidden_error", "grad_weight_error")),
            row["note"],
        )
    Console(width=200 if not sys.stdout.isatty() else None).print(shown)


def objectives_table(rows: list[dict[str, Any]]) -> None:
    """Prints the rows of `benchmark_objectives` as a table."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("shape", "dtype", "objective", "ms", "floor ms", "of SimPO's time", "peak MiB")
    for row in rows:
        numbers = (row["milliseconds"], row["floor_milliseconds"])
        shown.add_row(
            *(row[key] for key in ("shape", "dtype", "objective")),
            *(f"{number:.1f}" for number in numbers),
            f"{row['ratio']:.3f}",
            f"{row['peak_extra_bytes'] / MIB:.0f}",
        )
    Console(width=200 if not sys.stdout.isatty() else None).print(shown)


def compared(names: list[str]) -> list[str]:
    """The objectives to measure, SimPO first; `all` stands for every one with two responses."""
    from simpo_megatron.objectives import OBJECTIVES

    every = [name for name, cls in OBJECTIVES.items() if cls.responses == 2]
    chosen = every if "all" in names else names
    if unknown := [name for name in chosen if name not in every]:
        raise SystemExit(f"--objective {unknown[0]} is not known; use all or {' or '.join(every)}")
    return list(dict.fromkeys(["simpo", *chosen]))


def where(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and settings, for the CSV file."""
    import torch

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return ""

    machine = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    packages = ("torch", "megatron-core", "liger-kernel", "triton")
    load = f"{os.getloadavg()[0]:.1f}"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "threads": args.threads,
        "load_before": load,
        "slab_mib": args.slab_mib,
        "repeats": args.repeats,
        **{package: installed(package) for package in packages},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="default: " + ", ".join(SHAPES["cpu"]) + " (cpu)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float32"], help="default: bfloat16, on a CPU float32 too"
    )
    parser.add_argument("--implementations", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--limit", type=int, default=60, help="seconds a measurement may take")
    parser.add_argument("--slab-mib", type=int, default=256, help="--head-slab-bytes of ours")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all shards together")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--objective", nargs="+", metavar="NAME", help="compare our head with these losses, or all")
    for name in ("--only", "--gradients"):
        parser.add_argument(name, help=argparse.SUPPRESS)  # how the tool calls itself
    args = parser.parse_args()
    args.shapes = args.shapes or SHAPES[args.device]
    args.dtypes = args.dtypes or (["bfloat16"] if args.device == "cuda" else ["bfloat16", "float32"])
    args.objective = compared(args.objective) if args.objective else []
    if args.only:
        print(json.dumps(work(args)))
        return
    setting = where(args)
    if args.objective:
        rows = benchmark_objectives(args)
        objectives_table(rows)
        append_rows(OBJECTIVES_CSV, rows, setting)
        return
    rows = benchmark(args)
    table(rows)
    append_rows(CSV, rows, setting)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
