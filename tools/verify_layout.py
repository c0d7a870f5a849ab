"""Does a parallel layout compute the loss and the gradients that Hugging Face computes, on your checkpoint and your data?

    torchrun --nproc-per-node 4 tools/verify_layout.py --hf-checkpoint MODEL --data pairs.jsonl \\
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 [--fp32] [--json FILE]

Runs the first global batch of the data order (8 pairs unless --global-batch-size says otherwise) through transformers on rank
0, one layer at a time, and through the layout, and compares summed log-probs, lengths, rewards, loss and the gradient of every
tensor. All layout, data and loss flags are those of training. Tolerances: `simpo_megatron/verify/compare.py`.

Exit code: 0 within tolerance, 1 not, 2 bad arguments. torchrun turns every failure of a worker into 1 and prints the worker's.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simpo_megatron import compat
from simpo_megatron.arguments import flat, parse
from simpo_megatron.config import Config
from simpo_megatron.errors import UserError
from simpo_megatron.program import exit_code

SHOWN = 10


def parse_arguments(argv: Sequence[str] | None) -> tuple[Config, Path | None]:
    """The configuration of the layout and the file for the report."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", type=str)
    parser.add_argument("--json", type=Path)
    own, rest = parser.parse_known_args(argv)
    given = [] if own.data is None else ["--train-data", own.data]
    if own.data is None and not {"-h", "--help"} & set(rest):
        raise UserError("--data is missing; give the preferences to verify with")
    config = parse([*rest, *given], defaults={"global_batch_size": 8, "train_iters": 1})
    unused = {
        "--save": config.checkpoint.save,
        "--load": config.checkpoint.load,
        "--export-hf": config.model.export_hf,
        "--tensorboard-dir": config.log.tensorboard_dir,
        "--wandb-project": config.log.wandb_project,
    }
    if config.train.dry_run:
        raise UserError("--dry-run is of the training program; drop it")
    for flag, value in unused.items():
        if value is not None:
            raise UserError(f"{flag} {value}: nothing is trained or written here; drop it")
    if config.loss.moe_aux_loss_coeff:
        raise UserError(
            "--moe-aux-loss-coeff has no counterpart in the reference; drop it, the other gradients do not change"
        )
    if own.json is not None and not own.json.absolute().parent.is_dir():
        raise UserError(f"--json {own.json}: {own.json.absolute().parent} does not exist; make it first")
    return config, own.json


def verify(config: Config, report_file: Path | None = None) -> int:
    """Compares, prints the report on rank 0, returns the exit code on every rank."""
    compat.quiet_megatron()
    compat.check_megatron_core()
    import torch.distributed as dist

    from simpo_megatron.models.build import build_model
    from simpo_megatron.models.hf import read_hf_checkpoint
    from simpo_megatron.models.load import load_hf_weights
    from simpo_megatron.trainer.distributed import initialize, resolve_device, shut_down, together
    from simpo_megatron.trainer.engine import Engine
    from simpo_megatron.trainer.loop import layout_config, load_data
    from simpo_megatron.verify.compare import compare

    device = resolve_device(config.train.device)
    assert config.model.hf_checkpoint is not None
    hf = read_hf_checkpoint(config.model.hf_checkpoint)
    transformer = layout_config(config, hf)
    started_here = not dist.is_initialized()
    initialize(transformer, config.parallel.distributed_timeout_minutes, device, config.train.seed)
    store, _, _ = load_data(config, hf)
    models = build_model(
        hf,
        transformer,
        transformer_impl=config.model.transformer_impl,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
    )
    with together():
        load_hf_weights(models, hf, progress=dist.get_rank() == 0)
    report = compare(Engine(config, models, transformer, hf.vocab_size, train_iters=1), hf, store, config)
    passed = [report is None or report.passed]
    if report is not None:
        show(report, config)
        if report_file is not None:
            report_file.write_text(json.dumps(_as_json(report, config), indent=1) + "\n", encoding="utf-8")
    dist.broadcast_object_list(passed, src=0)
    if started_here:
        shut_down()
    return 0 if passed[0] else 1


def show(report: Any, config: Config) -> None:
    """The report for people."""
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
    for pair in report.wrong_lengths[:SHOWN]:
        console.print(f"pair {pair}: its scored tokens are not those of the data")
    failed = sum(not found.passed for found in report.gradients)
    precision = "bf16" if config.train.bf16 else "fp32"
    if report.passed:
        console.print(f"this layout computes what Hugging Face computes, in {precision}: {len(report.pairs)} pairs")
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
