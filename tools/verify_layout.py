r"""Does a parallel layout compute the loss and the gradients that Hugging Face computes, on your checkpoint and data?

    torchrun --nproc-per-node 4 tools/verify_layout.py --hf-checkpoint MODEL --data pairs.jsonl \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 [--fp32] [--json FILE]

One batch (8 pairs, or --global-batch-size) runs through the layout and, one layer at a time, through transformers on
rank 0. Layout, data and objective have training's flags, and --config takes a run's YAML file. Where MODEL is a
config.json, or has no weights, they are random; without a tokenizer the pairs are random too. What is compared and the
tolerances: `simpo_megatron/verify/README.md`.

Exit code: 0 within tolerance, 1 not, 2 a mistake in flags, data or checkpoint. Under torchrun any failure of a worker
is 1; torchrun prints the worker's own code.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from simpo_megatron import compat
from simpo_megatron.config.arguments import (
    GROUPS,
    add_objectives,
    add_settings,
    build_config,
    flat,
    heading,
    settable,
    settings_parser,
    with_file,
)
from simpo_megatron.config.data import DataConfig
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.objectives import OBJECTIVES
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.program import Parser, check_report, exit_code, leave, write_report
from simpo_megatron.settings import path_value, required, source_value

SHOWN = 10  # gradients in the table

# The settings of each group that this program uses. A run's YAML file may hold others: they have no effect here.
USED: dict[str, tuple[str, ...]] = {
    "model": (
        "hf_checkpoint",
        "transformer_impl",
        "attention_backend",
        "gradient_accumulation_fusion",
        "rope_fusion",
        "moe_permute_fusion",
        "make_vocab_size_divisible_by",
        "head",
        "head_slab_bytes",
    ),
    "parallel": tuple(field.name for field in settable(ParallelConfig)),
    "data": tuple(field.name for field in settable(DataConfig) if field.name not in ("train_data", "valid_data")),
    "megatron": ("transformer_config", "ddp_config"),
    "train": ("preset", "global_batch_size", "seed", "device", "bf16", "fp32"),
}


def build_parser() -> Parser:
    """The flags."""
    parser = settings_parser(
        "torchrun --nproc-per-node N tools/verify_layout.py",
        str(__doc__).partition("\n")[0],
        "YAML file of a run; flags win over it",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=source_value,
        dest="train_data",
        metavar="SOURCE",
        help="preferences to verify with: what --train-data of training takes; left out where --hf-checkpoint is a "
        "config.json without weights and tokenizer",
    )
    parser.accept("--train-data", "--data")
    parser.add_argument("--json", type=path_value, metavar="FILE", help="write the report into this file")
    add_objectives(parser)
    for name, used in USED.items():
        add_settings(parser.add_argument_group(heading(GROUPS[name])), GROUPS[name], used)
    return parser


def parse_arguments(argv: Sequence[str] | None) -> tuple[Config, Path | None]:
    """Reads the command line.

    Args:
        argv: the flags; None for those of this process.

    Returns:
        The configuration, and the file for the report or None.

    Raises:
        UserError: a flag is wrong, or the report cannot be written.
    """
    given = vars(build_parser().parse_args(argv))
    settings = with_file(given, {"global_batch_size": 8})
    settings["train_data"] = _sources(given, settings)
    objectives = (field.name for cls in OBJECTIVES.values() for field in settable(cls))
    used = {"objective", "train_data", *objectives, *(name for names in USED.values() for name in names)}
    config = build_config({name: value for name, value in settings.items() if name in used} | {"train_iters": 1})
    report = given.get("json")
    if report is not None:
        check_report("--json", report, [config.model.checkpoint_folder])
    return config, report


def _sources(given: dict[str, Any], settings: dict[str, Any]) -> Any:
    """What to verify with: the data, or random pairs where there are neither weights nor a tokenizer.

    Args:
        given: the flags.
        settings: the flags over the file; data in a file is not used where there is no tokenizer.

    Raises:
        UserError: --data is missing, or is given without a tokenizer to read it.
    """
    from simpo_megatron.checkpoint.source import lacks_tokenizer
    from simpo_megatron.verify.random_weights import RANDOM_PAIRS

    model = settings.get("hf_checkpoint")
    if model is not None and lacks_tokenizer(Path(model)):
        if "train_data" in given:
            raise UserError(f"--data needs a tokenizer, and {model} has none; leave --data out to use random token ids")
        return [RANDOM_PAIRS]
    return required(settings.get("train_data"), "--data is missing; give preferences to verify with")


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

    from simpo_megatron.checkpoint.source import config_alone, read_model
    from simpo_megatron.parallel.together import host_group
    from simpo_megatron.trainer.data import load_data
    from simpo_megatron.trainer.distributed import initialize, resolve_device, shut_down
    from simpo_megatron.trainer.setup import build_engine, build_transformer_config
    from simpo_megatron.verify.compare import compare, with_any_reference
    from simpo_megatron.verify.random_weights import RANDOM_PAIRS, random_pairs, random_weights

    device = resolve_device(config.train.device, config.train.deterministic_mode, config.megatron.nccl_buffers)
    alone = config_alone(config.model.checkpoint_folder)
    hf = read_model(config.model.checkpoint_folder, loaded=False, dry_run=alone)
    if config.train.bf16 and hf.architecture.num_experts is not None:
        raise UserError(
            "a model with experts is verified in fp32, because in bf16 rounding decides near-ties between experts and "
            "no tolerance tells that from a mistake; add --fp32"
        )
    transformer = build_transformer_config(config, hf)
    started_here = not dist.is_initialized()
    initialize(transformer, config.parallel.distributed_timeout_minutes, device, config.train.seed)
    with random_weights(hf, config.train.seed) if alone else nullcontext(hf) as model:
        if config.data.train_data == (RANDOM_PAIRS,):
            count, longest = config.train.global_batch_size, config.data.options.max_length
            pairs = random_pairs(hf.architecture.vocab_size, longest, count, config.train.seed)
            messages = [f"{hf.path} has no tokenizer: {count} pairs of random token ids are used"]
        else:
            pairs, _, messages = load_data(config.data, model)
        if dist.get_rank() == 0:
            print("\n".join(messages), flush=True)
        if config.objective.needs_reference:
            pairs = with_any_reference(pairs)
        report = compare(build_engine(config, model, transformer, train_iters=1), model, pairs, config)
    passed = [report is None or report.passed]
    if report is not None:
        show(report, config)
        if report_file is not None:
            # JSON has no NaN; it is written as a string.
            content = json.loads(json.dumps(_as_json(report, config)), parse_constant=str)
            write_report("--json", report_file, json.dumps(content, indent=1) + "\n")
    dist.broadcast_object_list(passed, src=0, group=host_group())
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
    leave(main())
