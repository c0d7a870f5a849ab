r"""What preference training did to a model: two Hugging Face checkpoints beside each other on a set of pairs.

    python tools/diagnose.py --hf-checkpoint ALIGNED --reference-checkpoint SFT --data heldout.jsonl --objective dpo \
        [--report diagnosis.html] [--json diagnosis.json]

It computes the exact KL of both models at the response positions; whether the reward of --objective and the likelihood
rank the responses of a pair alike; and how likelihood and reward depend on length. It runs transformers in one process,
with both models in memory, and holds the logits of some positions at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpo_megatron import compat
from simpo_megatron.config.arguments import add_objectives, build_objective, with_file
from simpo_megatron.config.data import DataConfig
from simpo_megatron.config.data_tools import data_config, data_parser
from simpo_megatron.data import Pairs, load_preferences
from simpo_megatron.data.prepared_format import is_prepared
from simpo_megatron.data.prepared_set import PreparedPairs
from simpo_megatron.data.tokenizer import fingerprint, load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.files import end_of_turn_ids
from simpo_megatron.program import Parser, check_report, exit_code, write_report
from simpo_megatron.settings import path_value, source_value


def build_parser() -> Parser:
    """The flags."""
    parser = data_parser("diagnose.py", __doc__)
    for flag, text in (
        ("--hf-checkpoint", "folder of the model that was trained"),
        ("--reference-checkpoint", "folder of the model it is compared with, such as the one it started from"),
    ):
        parser.add_argument(flag, required=True, type=path_value, metavar="DIR", help=text)
    parser.add_argument("--data", required=True, type=source_value, metavar="SOURCE", help="rows, or a prepared prefix")
    parser.accept("--train-data", "--data")
    parser.add_argument("--report", type=path_value, default=None, metavar="FILE", help="write an HTML page here")
    parser.add_argument("--json", type=path_value, default=None, metavar="FILE", help="write the numbers here")
    parser.add_argument("--bf16", action="store_true", default=False, help="weights in bf16 (default: fp32)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="cuda if there is a GPU")
    parser.add_argument(
        "--batch-tokens", type=int, default=8192, metavar="N", help="tokens of a batch, with padding (default 8192)"
    )
    add_objectives(parser)
    return parser


def read_pairs(source: str, policy: Path, reference: Path, data: DataConfig) -> Pairs:
    """The pairs, as training reads them with the tokenizer of the policy.

    Args:
        source: rows or a prepared set.
        policy: folder of the policy.
        reference: folder of the reference model.
        data: how rows become pairs.

    Raises:
        UserError: the source or a tokenizer cannot be read, or the tokenizers differ.
    """
    tokenizer, eos_ids = load_tokenizer(policy), end_of_turn_ids(policy)
    of_policy = fingerprint(tokenizer, ())
    if of_policy["tokenizer"] != fingerprint(load_tokenizer(reference, "--reference-checkpoint"), ())["tokenizer"]:
        raise UserError(
            f"--reference-checkpoint {reference} has another tokenizer than --hf-checkpoint {policy}, so the ids of "
            "the pairs mean something else to it; give two checkpoints with the same tokenizer"
        )
    if is_prepared(source):
        pairs = PreparedPairs(source, verify=True)
        pairs.check(fingerprint(tokenizer, eos_ids), {}, policy)
        return pairs
    pairs, report = load_preferences(source, tokenizer, data.options, eos_token_ids=eos_ids, progress=True)
    print(report.summary(source), flush=True)
    return pairs


def run(args: argparse.Namespace) -> None:
    """Scores the pairs, prints the numbers and writes page and JSON."""
    compat.quiet_megatron()
    objective, data = build_objective(with_file(vars(args))), data_config(args)
    folders = {"--hf-checkpoint": args.hf_checkpoint, "--reference-checkpoint": args.reference_checkpoint}
    for flag, file in (("--report", args.report), ("--json", args.json)):
        if file is not None:
            check_report(flag, file, [Path(args.data), *folders.values()])
    if args.batch_tokens < 1:
        raise UserError(f"--batch-tokens {args.batch_tokens} must be at least 1")
    pairs = read_pairs(args.data, args.hf_checkpoint, args.reference_checkpoint, data)

    import torch

    from simpo_megatron.diagnose import figures, load_model, score
    from simpo_megatron.diagnose.page import page, rankings_table, table
    from simpo_megatron.models.transformers_model import choose_device

    device = choose_device(args.device)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    policy, reference = (load_model(flag, folder, dtype, device) for flag, folder in folders.items())
    scored = score(policy, reference, pairs, args.batch_tokens)
    found = figures(scored, objective)
    _print(rankings_table(found), header=True)
    _print(table(found))
    names = {
        "policy": str(args.hf_checkpoint),
        "reference": str(args.reference_checkpoint),
        "data": args.data,
        "objective": objective.describe(),
    }
    if args.json is not None:
        write_report("--json", args.json, json.dumps({**names, **found}, indent=2) + "\n")
    if args.report is not None:
        write_report("--report", args.report, page(found, scored, objective, names))


def _print(rows: Sequence[Sequence[str]], header: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    shown: Any = Table(*rows[0]) if header else Table("number", "value")
    for row in rows[1:] if header else rows:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code("diagnose.py", lambda: run(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
