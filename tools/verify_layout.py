r"""Does a parallel layout compute the loss and the gradients that Hugging Face computes, on your checkpoint and data?

    torchrun --nproc-per-node 4 tools/verify_layout.py --hf-checkpoint MODEL --data pairs.jsonl \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 [--fp32] [--json FILE]

One batch (8 pairs, or --global-batch-size) runs through the layout and, one layer at a time, through transformers on
rank 0. Layout, data and objective have training's flags. What is compared and the tolerances:
`simpo_megatron/verify/README.md`.

Exit code: 0 within tolerance, 1 not, 2 a mistake in flags, data or checkpoint. Under torchrun any failure of a worker
is 1; torchrun prints the worker's own code.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simpo_megatron import compat
from simpo_megatron.config.arguments import build_parser, flat, parse
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.program import check_report, exit_code, write_report

SHOWN = 10  # gradients in the table


# Settings of training that this program does not use. A run's YAML file may hold them; their flags are refused.
FIXED = {
    "train_iters": 1,
    "train_epochs": None,
    "valid_data": None,
    "save": None,
    "load": None,
    "save_interval": None,
    "export_hf": None,
    "tensorboard_dir": None,
    "wandb_project": None,
    "dry_run": False,
}


def parse_arguments(argv: Sequence[str] | None) -> tuple[Config, Path | None]:
    """Reads the command line.

    Args:
        argv: the flags; None for those of this process.

    Returns:
        The configuration, and the file for the report or None.

    Raises:
        UserError: a flag is wrong, or the report cannot be written.
    """
    parser = build_parser("torchrun --nproc-per-node N tools/verify_layout.py", __doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        nargs="+",
        dest="train_data",
        metavar="SOURCE",
        help="preferences to verify with, as --train-data takes them",
    )
    reports: list[Path] = []
    parser.add_argument(
        "--json", type=reports.append, dest="json", metavar="PATH", help="write the report into this file"
    )
    config = parse(argv, parser, {"global_batch_size": 8}, FIXED)
    if config.train.moe_aux_loss_coeff:
        raise UserError(
            f"--moe-aux-loss-coeff {config.train.moe_aux_loss_coeff:g} has no counterpart in the reference; verify "
            "with 0"
        )
    report = Path(reports[-1]) if reports else None
    if report is not None:
        check_report("--json", report)
    return config, report


def verify(config: Config, report_file: Path | None = None) -> int:
    """Compares, and prints the report on rank 0.

    Args:
        config: from `parse_arguments`.
        report_file: for the report as JSON, or None.

    Returns:
        The exit code, the same on every rank.

    Raises:
        UserError: checkpoint, data or layout cannot be used.
    """
    compat.quiet_megatron()
    compat.check_megatron_core()
    import torch.distributed as dist

    from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
    from simpo_megatron.trainer.data import load_data
    from simpo_megatron.trainer.distributed import initialize, resolve_device, shut_down
    from simpo_megatron.trainer.setup import build_engine, build_transformer_config
    from simpo_megatron.verify.compare import compare

    device = resolve_device(config.train.device)
    hf = read_hf_checkpoint(config.model.checkpoint_folder)
    if config.train.bf16 and hf.architecture.num_experts is not None:
        raise UserError(
            "a model with experts is verified in fp32, because in bf16 rounding decides near-ties between experts and "
            "no tolerance tells that from a mistake; add --fp32"
        )
    transformer = build_transformer_config(config, hf)
    started_here = not dist.is_initialized()
    initialize(transformer, config.parallel.distributed_timeout_minutes, device, config.train.seed)
    pairs, _, messages = load_data(config.data, hf)
    if dist.get_rank() == 0:
        print("\n".join(messages), flush=True)
    report = compare(build_engine(config, hf, transformer, train_iters=1), hf, pairs, config)
    passed = [report is None or report.passed]
    if report is not None:
        show(report, config)
        if report_file is not None:
            # JSON has no NaN; it is written as a string.
            content = json.loads(json.dumps(_as_json(report, config)), parse_constant=str)
            write_report("--json", report_file, json.dumps(content, indent=1) + "\n")
    dist.broadcast_object_list(passed, src=0)
    if started_here:
        shut_down()
    return 0 if passed[0] else 1


def show(report: Any, config: Config) -> None:
    """Prints the report.

    Args:
        report: a `compare.Report`.
        config: of the run.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for title, found, shown in (
        ("compared with transformers in fp32", report.values, len(report.values)),
        (f"gradients, worst {SHOWN} of {len(report.gradients)}", report.gradients, SHOWN),
    ):
        table = Table(title, "relative error", "allowed", "")
        for entry in found[:shown]:
            table.add_row(entry.name, f"{entry.error:.1e}", f"{entry.allowed:.0e}", "ok" if entry.passed else "WRONG")
        console.print(table)
    for name in report.uncompared[:SHOWN]:
        console.print(f"{name}: no rank holds it, or the reference has no gradient for it")
    for pair in report.wrong_lengths[:SHOWN]:
        console.print(f"pair {pair}: its scored tokens are not those of the data")
    failed = sum(not found.passed for found in report.gradients)
    precision = "bf16" if config.train.bf16 else "fp32"
    if report.passed:
        console.print(
            f"this layout computes what Hugging Face computes, in {precision}: pairs {len(report.pairs)}, microbatches "
            f"of a data-parallel rank {report.microbatches}"
        )
    else:
        console.print(
            f"WRONG in {precision}: {failed} of {len(report.gradients)} gradients are off; do not train on this layout"
        )


def _as_json(report: Any, config: Config) -> dict[str, Any]:
    import megatron.core
    import torch
    import transformers

    return {
        "passed": report.passed,
        **asdict(report),
        "settings": flat(config),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
            "transformers": transformers.__version__,
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code("verify_layout.py", lambda: verify(*parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
