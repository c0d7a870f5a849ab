r"""SimPO training: Hugging Face checkpoint and preferences in, aligned Hugging Face checkpoint out.

    torchrun --nproc-per-node 4 -m simpo_megatron.train --hf-checkpoint MODEL --train-data pairs.jsonl \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --train-epochs 1 --export-hf ALIGNED

`--help` lists every flag, and `--dry-run` checks a run in one CPU process (`dry_run.py`). The user's guide is
`trainer/README.md`. A mistake that the user can fix ends the program with one line and exit code 2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from simpo_megatron import compat
from simpo_megatron.config.arguments import parse
from simpo_megatron.config.run import Config
from simpo_megatron.errors import same_on_all_ranks
from simpo_megatron.program import exit_code, leave


def run(config: Config) -> None:
    """Wires a run together: device, checks, process groups, loop.

    Args:
        config: of the run.

    Raises:
        UserError: a mistake that the user can fix; the same on every rank.
    """
    compat.quiet_megatron()
    compat.check_megatron_core()
    from simpo_megatron.checkpoint.folder import read_tracker
    from simpo_megatron.checkpoint.source import read_model
    from simpo_megatron.dry_run import dry_run
    from simpo_megatron.trainer.distributed import initialize, resolve_device, shut_down
    from simpo_megatron.trainer.folders import check_writable, hold_folders
    from simpo_megatron.trainer.loop import start_run
    from simpo_megatron.trainer.setup import build_transformer_config, name_layers
    from simpo_megatron.trainer.signals import watch

    train = config.train
    device = "cpu"
    if not train.dry_run:
        device = resolve_device(train.device, train.deterministic_mode, config.megatron.nccl_buffers)
    load = config.checkpoint.load
    loaded = load is not None and read_tracker(load) is not None
    hf = read_model(config.model.checkpoint_folder, loaded=loaded, dry_run=config.train.dry_run)
    for flag, folder in (
        ("--save", config.checkpoint.save),
        ("--export-hf", config.model.export_hf),
        ("--export-adapter", config.adapter.export_adapter),
        ("--tensorboard-dir", config.log.tensorboard_dir),
    ):
        if folder is not None:
            check_writable(flag, folder)
    if config.train.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            dry_run(config, hf)
        return
    with same_on_all_ranks():
        config = name_layers(config)
        transformer = build_transformer_config(config, hf)
    initialize(transformer, config.parallel.distributed_timeout_minutes, device, config.train.seed)
    # After `initialize`: no rank is still writing its probe into a folder.
    with hold_folders(config), watch(config) as stopping:
        found = start_run(config, hf, transformer, stopping)
        if found is not None:
            found.execute()
    shut_down()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""

    def action() -> None:
        with same_on_all_ranks():
            config = parse(argv)
        run(config)

    return exit_code("simpo_megatron.train", action)


if __name__ == "__main__":
    leave(main())
