"""Which layouts of a model fit into the memory of these GPUs, and what they cost; no GPU and no weights are needed.

    python tools/plan_layout.py --hf-checkpoint PATH --gpus 64 [--gpu-memory 80GiB] [--seq-length 4096] [--compare dpo]
        [--lora-rank 16] [--use-precision-aware-optimizer ...] [--optimizer-cpu-offload ...] [--json FILE]

PATH is a Hugging Face checkpoint or a config.json. The table shows the best layouts first, each with

* the memory of the rank that needs most, for bf16 weights, the distributed optimizer and Transformer Engine's layers.
  Gradients and optimizer state are those of the training flags --main-grads-dtype, --exp-avg-dtype and so on;
* the bubble, which is the share of a step in which a pipeline stage waits;
* the time of a step divided by that of an ideal one. `simpo_megatron/planning/layouts.py` says what that leaves out.

A tenth of the memory is kept free for the CUDA context, communication buffers and fragmentation. `--compare dpo` also
shows what DPO needs for its reference model. With `--lora-rank` the weights are frozen, and adapters on --lora-targets
train: the frozen weights need neither gradients nor optimizer state, and are the reference of DPO as well.

Exit code: 0 where a layout fits, 1 where none does, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from simpo_megatron.adapters.lora import adapter_entries
from simpo_megatron.adapters.settings import lora_of
from simpo_megatron.config.adapter import AdapterConfig
from simpo_megatron.config.arguments import add_settings, build_group, heading
from simpo_megatron.config.memory import MemoryConfig
from simpo_megatron.disk import human
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, read_hf_config
from simpo_megatron.models.weight_table import WeightEntry
from simpo_megatron.planning.checkpoint_size import CheckpointSize, checkpoint_size, save_host_bytes
from simpo_megatron.planning.layouts import MOST_GPUS, LayoutCost, Request, fewest, fitting
from simpo_megatron.program import Parser, check_report, exit_code, write_report
from simpo_megatron.settings import parse_size, path_value

SHOWN = 15
FREE = 0.1  # share of the memory that stays free


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="plan_layout.py", description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--hf-checkpoint", type=path_value, required=True, metavar="PATH", help="checkpoint folder or config.json"
    )
    parser.accept("--model", "--hf-checkpoint")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the run")
    parser.add_argument("--gpu-memory", default="80GiB", metavar="SIZE", help="memory of one GPU (default 80GiB)")
    parser.add_argument(
        "--seq-length", type=int, default=4096, metavar="N", help="tokens of a packed row (default 4096)"
    )
    parser.add_argument("--global-batch-size", type=int, default=128, metavar="N", help="pairs of a step (default 128)")
    pair_tokens = "mean tokens of a pair, with its prompt counted twice (default half of --seq-length)"
    parser.add_argument("--pair-tokens", type=int, metavar="N", help=pair_tokens)
    parser.add_argument("--head-slab-bytes", default="256MiB", metavar="SIZE", help="as in training (default 256MiB)")
    adapters = parser.add_argument_group(heading(AdapterConfig))
    add_settings(adapters, AdapterConfig, ["lora_rank", "lora_targets"], with_defaults=True)
    parser.add_argument("--compare", choices=["dpo"], help="also show what DPO needs")
    memory = [field.name for field in fields(MemoryConfig) if not field.name.startswith(("fp8", "overlap"))]
    add_settings(parser.add_argument_group(heading(MemoryConfig)), MemoryConfig, memory, with_defaults=True)
    parser.add_argument("--json", type=path_value, metavar="FILE", help="write all layouts to this file")
    return parser


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        name: for the table.
        layouts: that fit on --gpus, best first.
        fewest: the smallest number of GPUs on which a layout fits, and the best layout there; None where none fits.
    """

    name: str
    layouts: list[LayoutCost]
    fewest: tuple[int, LayoutCost] | None


def read_request(args: argparse.Namespace) -> Request:
    """The run that layouts are wanted for.

    Raises:
        UserError: a number is out of range, or settings contradict each other.
    """
    for flag in ("gpus", "seq_length", "global_batch_size", "pair_tokens"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value} must be greater than 0")
    pair = args.pair_tokens or max(1, args.seq_length // 2)
    if pair > args.seq_length:
        raise UserError(f"--pair-tokens {pair} exceeds --seq-length {args.seq_length}; a row holds whole pairs")
    memory = parse_size("--gpu-memory", args.gpu_memory)
    if args.json is not None:
        check_report("--json", args.json, [args.hf_checkpoint])
    return Request(
        gpu_bytes=int(memory * (1 - FREE)),
        seq_length=args.seq_length,
        packed_rows=math.ceil(args.global_batch_size * pair / args.seq_length),
        slab_bytes=parse_size("--head-slab-bytes", args.head_slab_bytes),
        memory=build_group(MemoryConfig, vars(args)),
    )


def run(argv: Sequence[str] | None) -> int:
    """Finds the layouts, prints them and writes the report; returns the exit code."""
    args = build_parser().parse_args(argv)
    request, hf = read_request(args), read_hf_config(args.hf_checkpoint)
    adapters: tuple[WeightEntry, ...] | None = None
    if (lora := lora_of(build_group(AdapterConfig, vars(args)), hf.architecture)) is not None:
        adapters = adapter_entries(hf.architecture, lora)
        request = replace(request, lora=lora)
    size = checkpoint_size(hf.architecture, table=adapters)
    methods = [_method("SimPO" if adapters is None else "SimPO with adapters", hf, args.gpus, request)]
    if args.compare:
        reference = replace(request, reference=adapters is None)
        methods.append(_method("DPO, reference on the GPUs", hf, args.gpus, reference))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(
        f"{hf.architecture.family.name} of {hf.architecture.num_parameters / 1e9:.2f}e9 parameters, "
        f"{args.gpus} GPUs of {args.gpu_memory} ({1 - FREE:.0%} of it used), rows of {args.seq_length} tokens, "
        f"{request.packed_rows} rows a step"
    )
    for method in methods:
        show(console, method)
    offloaded = request.memory.optimizer_offload_fraction if request.memory.optimizer_cpu_offload else 0.0
    for line in (*answers(methods, args.gpu_memory), *remarks(size, methods[0], args.global_batch_size, offloaded)):
        console.print(line)
    if args.json is not None:
        report = {
            "settings": {name: str(value) for name, value in vars(args).items()},
            **as_json(hf, size, methods, offloaded),
        }
        write_report("--json", args.json, json.dumps(report, indent=1) + "\n")
    return 0 if methods[0].layouts else 1


def _method(name: str, hf: HFCheckpoint, gpus: int, request: Request) -> Method:
    return Method(name, fitting(hf.architecture, gpus, request), fewest(hf.architecture, request))


def show(console: Console, method: Method) -> None:
    """Prints the best layouts of one method."""
    if not method.layouts:
        console.print(f"{method.name}: no layout fits")
        return
    title = f"{method.name}: the best {min(SHOWN, len(method.layouts))} of {len(method.layouts)} layouts that fit"
    table = Table(title=title, title_justify="left")
    experts = any(one.parallel.expert_tensor_parallel_size for one in method.layouts)
    for name in ("TP", "CP", "PP", "chunk", *(("EP", "ETP") if experts else ()), "DP", "rows"):
        table.add_column(name, justify="right")
    table.add_column("recompute")
    # Columns that are 0 everywhere are left out.
    parts = [name for name in asdict(method.layouts[0].memory) if any(getattr(m.memory, name) for m in method.layouts)]
    parts.remove("host") if "host" in parts else None
    for name in (*parts, "GiB in all", "bubble", "step time"):
        table.add_column(name, justify="right")
    for one in method.layouts[:SHOWN]:
        p = one.parallel
        sizes = [p.tensor_model_parallel_size, p.context_parallel_size, p.pipeline_model_parallel_size]
        sizes += [p.num_layers_per_virtual_pipeline_stage or "-"]
        sizes += [p.expert_model_parallel_size, p.expert_tensor_parallel_size] if experts else []
        table.add_row(
            *map(str, (*sizes, one.data_parallel_size, one.microbatches)),
            recomputed(one),
            *(f"{asdict(one.memory)[name] / 2**30:.1f}" for name in parts),
            f"{one.memory.total / 2**30:.1f}",
            f"{one.bubble:.0%}",
            f"{one.slowdown:.2f}",
        )
    console.print(table)


def answers(methods: Sequence[Method], memory: str) -> list[str]:
    """The fewest GPUs of every method, in sentences."""
    lines = []
    for method in methods:
        if method.fewest is None:
            lines.append(f"{method.name}: does not fit on {MOST_GPUS} GPUs of {memory}")
            continue
        gpus, one = method.fewest
        number = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        lines.append(f"{method.name}: fits from {number} of {memory} on ({describe(one)})")
    if len(methods) > 1 and methods[0].fewest is not None:
        lines.append(
            f"DPO, log-probs of the reference computed before: {methods[0].fewest[0]} GPUs as SimPO, and one more "
            "forward pass over the data, a third of an epoch's arithmetic"
        )
    return lines


def remarks(size: CheckpointSize, method: Method, pairs: int, offloaded: float = 0.0) -> list[str]:
    """The size of a checkpoint, the host memory of a save, and whether data-parallel ranks would have nothing to do.

    Args:
        size: of a checkpoint.
        method: whose layouts are shown.
        pairs: of a step.
        offloaded: share of the optimizer state in host memory.
    """
    lines = [f"a checkpoint of training takes {size}; --dry-run compares it with the disk"]
    if method.layouts:
        gpus, sharded = _spread(method.layouts[0])
        if host := method.layouts[0].memory.host * min(gpus, 8):
            lines.append(f"the optimizer takes up to {human(host)} of host memory on a node in the best layout")
        default, full = (
            save_host_bytes(size, gpus, sharded, fully_reshardable=form, offloaded=offloaded) for form in (False, True)
        )
        lines.append(
            f"a save takes {human(default)} of host memory on a node of {min(gpus, 8)} GPUs in the best layout, and up "
            f"to {human(full)} with --dist-ckpt-optim-fully-reshardable"
        )
    if any(one.data_parallel_size > pairs for one in method.layouts[:SHOWN]):
        lines.append(
            f"warning: a data-parallel size (DP) above the {pairs} pairs of a step leaves ranks idle; use fewer GPUs, "
            "or raise --global-batch-size"
        )
    return lines


def _spread(one: LayoutCost) -> tuple[int, int]:
    """GPUs of a layout, and how many of them hold different weights: tensor- times pipeline-parallel size."""
    p = one.parallel
    sharded = p.tensor_model_parallel_size * p.pipeline_model_parallel_size
    return sharded * p.context_parallel_size * one.data_parallel_size, sharded


def describe(one: LayoutCost) -> str:
    """A layout in one line."""
    p = one.parallel
    sizes = {
        "TP": p.tensor_model_parallel_size,
        "CP": p.context_parallel_size,
        "PP": p.pipeline_model_parallel_size,
        "EP": p.expert_model_parallel_size,
        "DP": one.data_parallel_size,
    }
    named = " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one GPU"
    if p.expert_tensor_parallel_size:  # shown even where it is 1, because the flag's default is TP
        named += f", ETP{p.expert_tensor_parallel_size}"
    return f"{named}, recompute {recomputed(one)}, {one.memory.total / 2**30:.1f} GiB"


def recomputed(one: LayoutCost) -> str:
    """What a layout recomputes: none, full, or the modules of a layer."""
    return " ".join(one.parallel.recompute_modules or (one.parallel.recompute_granularity or "none",))


def as_json(hf: HFCheckpoint, size: CheckpointSize, methods: Sequence[Method], offloaded: float) -> dict[str, Any]:
    """The report; sizes are in bytes. `offloaded` is the share of the optimizer state in host memory."""

    def layout(one: LayoutCost) -> dict[str, Any]:
        spread = _spread(one)
        host = {
            "default": save_host_bytes(size, *spread, offloaded=offloaded),
            "fully_reshardable": save_host_bytes(size, *spread, fully_reshardable=True),
        }
        memory = {**asdict(one.memory), "total": one.memory.total}
        host["optimizer_state"] = one.memory.host * min(spread[0], 8)
        return {**asdict(one), "memory": memory, "host_memory_of_a_save_per_node": host}

    return {
        "parameters": hf.architecture.num_parameters,
        "checkpoint": asdict(size),
        "objectives": {
            method.name: {
                "layouts": [layout(one) for one in method.layouts],
                "fewest_gpus": None if method.fewest is None else method.fewest[0],
                "fewest_layout": None if method.fewest is None else layout(method.fewest[1]),
            }
            for method in methods
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code("plan_layout.py", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
