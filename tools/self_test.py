r"""Does everything that a run needs work on this machine? No model, data or network is needed.

    torchrun --nproc-per-node N tools/self_test.py [--save DIR] [--json report.json] [--csv tools/results/gpu.csv]
    torchrun --nproc-per-node N tools/self_test.py --hf-checkpoint MODEL

Tiny models of every family run in every layout that N processes allow, with each implementation of the layers that is
installed, and are compared with transformers in fp32 on the CPU. A run is saved and resumed at another layout, weights
are exported and converted, the head and its kernels are compared with fp64, head and step are measured, and versions,
variables and the file system of --save are checked. With --hf-checkpoint MODEL the rows prove that model instead, which
is what a new family needs. Without torchrun it runs as one process. The user's guide is
`simpo_megatron/self_test/README.md`.

Exit code: 0 if no row FAILED, 1 if one did, 2 for a mistake on the command line. Under torchrun any failure of a worker
is 1; torchrun prints the worker's own code.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import append_rows, processor

from simpo_megatron import compat
from simpo_megatron.errors import UserError
from simpo_megatron.program import Parser, check_report, exit_code, write_report
from simpo_megatron.settings import path_value


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(prog="torchrun --nproc-per-node N tools/self_test.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="cuda (over NCCL), cpu (over gloo), or auto: cuda if there is a GPU (default: auto)",
    )
    parser.add_argument(
        "--save",
        type=path_value,
        metavar="DIR",
        help="existing folder for checkpoints, which all nodes share; what is written there is removed (default: a "
        "temporary folder)",
    )
    parser.add_argument(
        "--hf-checkpoint",
        type=path_value,
        metavar="DIR",
        help="prove a model of a supported family instead: config, tensors, gradients in every layout, export, "
        "conversion, arguments, chat template; a tiny or small one",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="TEXT", help="only rows whose name holds one of these texts"
    )
    parser.add_argument("--json", type=path_value, metavar="FILE", help="write the report into this file")
    parser.add_argument(
        "--csv", type=path_value, metavar="FILE", help="append what was measured to this CSV file (tools/results)"
    )
    return parser


def run(argv: Sequence[str] | None) -> int:
    """Runs the rows and prints the table; returns the exit code, the same on every rank.

    Raises:
        UserError: a mistake on the command line.
    """
    args = build_parser().parse_args(argv)
    for flag, file in (("--json", args.json), ("--csv", args.csv)):
        if file is not None:
            check_report(flag, file, [])
    if args.save is not None and not args.save.is_dir():
        raise UserError(f"--save {args.save} is not a folder; create it, or leave --save out")
    # Transformer Engine multiplies fp32 matrices in TF32, whose errors would hide mistakes. cuBLAS reads this once.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    compat.quiet_megatron()
    compat.check_megatron_core()
    from simpo_megatron.self_test.registry import chosen_rows
    from simpo_megatron.self_test.report import as_csv_rows, as_json, device_name, has_failed, printing_journal
    from simpo_megatron.self_test.run import Found, benches, run_rows

    load = f"{os.getloadavg()[0]:.1f}"
    with benches(args.device, args.save) as bench:
        rows = chosen_rows(bench, args.only, args.hf_checkpoint)
        journal = printing_journal(bench, rows)
        show = journal.finish

        def finish(found: list[Found]) -> None:
            show(found)
            if bench.rank == 0:
                report = as_json(found, bench, device_name(bench, processor()))
                if args.json is not None:
                    # JSON has no NaN; it is written as a string.
                    content = json.loads(json.dumps(report), parse_constant=str)
                    write_report("--json", args.json, json.dumps(content, indent=1) + "\n")
                if args.csv is not None and (measured := as_csv_rows(found)):
                    append_rows(args.csv, measured, _where(report, load))

        journal.finish = finish
        try:
            run_rows(rows, bench, journal)
        finally:  # also where a rank has ended, and torchrun stops this one
            finish(journal.found)
    return 1 if has_failed(journal.found) else 0


def _where(report: dict[str, Any], load: str) -> dict[str, Any]:
    """The first columns of a CSV file: when, where, versions."""
    names = ("torch", "cuda", "nccl", "megatron-core", "transformer-engine", "triton", "transformers")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": report["machine"],
        "processes": report["processes"],
        "load_before": load,
        **{name: report["versions"].get(name, "") for name in names},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code("self_test.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
