r"""Computes the log-probs of a prepared set under a reference model, and writes them beside it.

    torchrun --nproc-per-node 4 tools/score_reference.py --hf-checkpoint REFERENCE --data PREFIX \
        --tensor-model-parallel-size 2 --seq-length 4096

It writes PREFIX.reference, which training with --objective dpo and the like reads. It takes the flags of the layout and
of the batch that training takes. With those of the run, its first step computes bit for bit the same log-probs. A run
that was killed goes on where it stopped. Name the model as --reference-checkpoint of training if it is not the one that
training starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simpo_megatron import compat
from simpo_megatron.config.arguments import (
    GROUPS,
    add_settings,
    build_config,
    heading,
    settable,
    settings_parser,
    with_file,
)
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.parallel.config import ParallelConfig
from simpo_megatron.program import Parser, exit_code, leave
from simpo_megatron.settings import required, source_value

# The settings of each group that this program uses. A run's YAML file may hold others: they have no effect here.
USED: dict[str, tuple[str, ...]] = {
    "model": (
        "hf_checkpoint",
        "transformer_impl",
        "attention_backend",
        "rope_fusion",
        "moe_permute_fusion",
        "make_vocab_size_divisible_by",
        "head",
        "head_slab_bytes",
    ),
    "parallel": tuple(field.name for field in settable(ParallelConfig)),
    "data": ("seq_length", "share_prompts"),
    "train": ("global_batch_size", "seed", "device", "bf16", "fp32"),
}


def build_parser() -> Parser:
    """The flags."""
    parser = settings_parser(
        "torchrun --nproc-per-node N tools/score_reference.py",
        str(__doc__).partition("\n")[0],
        "YAML file of a run; flags win over it",
    )
    parser.add_argument(
        "--data",
        type=source_value,
        metavar="PREFIX",
        help="prefix of a prepared set, from tools/preprocess_preferences.py; needed",
    )
    parser.accept("--train-data", "--data")
    for name, used in USED.items():
        add_settings(parser.add_argument_group(heading(GROUPS[name])), GROUPS[name], used)
    return parser


def parse_arguments(argv: Sequence[str] | None) -> Config:
    """Reads the command line.

    Args:
        argv: the flags; None for those of this process.

    Raises:
        UserError: a flag is wrong.
    """
    given = vars(build_parser().parse_args(argv))
    data = required(given.get("data"), "--data is missing; give the prefix of a prepared set")
    settings = with_file(given)
    used = {name for names in USED.values() for name in names}
    kept: dict[str, Any] = {name: value for name, value in settings.items() if name in used}
    return build_config({**kept, "train_data": (data,), "train_iters": 1})


def score(config: Config) -> int:
    """Scores the pairs, and writes the file on rank 0.

    Args:
        config: from `parse_arguments`.

    Returns:
        The exit code.

    Raises:
        UserError: checkpoint, data or layout cannot be used, or the file cannot be written; the same on every rank.
    """
    compat.quiet_megatron()
    compat.check_megatron_core()
    import torch.distributed as dist

    from simpo_megatron.checkpoint.source import read_model
    from simpo_megatron.data.prepared_format import is_prepared
    from simpo_megatron.trainer.data import load_data
    from simpo_megatron.trainer.distributed import initialize, resolve_device, shut_down
    from simpo_megatron.trainer.reference import score_prepared
    from simpo_megatron.trainer.setup import build_transformer_config, name_layers

    (prefix,) = config.data.training_sources
    if not is_prepared(prefix):
        raise UserError(f"--data {prefix} is not a prepared set; make one with tools/preprocess_preferences.py")
    device = resolve_device(config.train.device, config.train.deterministic_mode)
    hf = read_model(config.model.checkpoint_folder, loaded=False, dry_run=False)
    config = name_layers(config)
    transformer = build_transformer_config(config, hf)
    started_here = not dist.is_initialized()
    initialize(transformer, config.parallel.distributed_timeout_minutes, device, config.train.seed)
    pairs, _, _ = load_data(config.data, hf)
    path = score_prepared(config, hf, transformer, pairs)
    if dist.get_rank() == 0:
        print(f"{path}: log-probs of {len(pairs)} pairs under {hf.path}", flush=True)
    if started_here:
        shut_down()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return exit_code("score_reference.py", lambda: score(parse_arguments(argv)))


if __name__ == "__main__":
    leave(main())
