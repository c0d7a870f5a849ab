r"""SimPO with Megatron-LM's own pretrain(), from an unmodified checkout (core_v0.16.1).

    PYTHONPATH=MEGATRON_LM torchrun --nproc-per-node 8 examples/megatron_lm/pretrain_simpo.py \
        YOUR USUAL ARGUMENTS --load CONVERTED --finetune --tokenizer-model HF_CHECKPOINT \
        --train-data-path train.jsonl --valid-data-path test.jsonl --simpo-beta 2.5 --simpo-gamma-beta-ratio 0.55

CONVERTED comes from `python tools/hf_to_megatron.py --hf-checkpoint HF_CHECKPOINT --save CONVERTED`, which also writes
the arguments of the architecture. Expect Megatron-LM's own log, checkpoints and evaluation. Without a GPU the script
runs on the CPU over gloo: add `--distributed-backend gloo`, `--transformer-impl local` and the `--no-...-fusion` flags
(tests/test_megatron_lm.py has them all). README.md in this folder has the details, and what Megatron-LM needs to be
installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simpo_megatron import compat, cpu

compat.quiet_megatron()

from simpo_megatron import megatron_lm  # noqa: E402  (it imports Megatron-Core)
from simpo_megatron.errors import UserError  # noqa: E402
from simpo_megatron.program import exit_code, leave  # noqa: E402


def require_weights(args: Any, exists: Callable[[str | None], bool]) -> None:
    """Refuses a --load without a checkpoint, with which Megatron-LM would train random weights.

    The folder of --save may be empty: a run that is not resumed yet. `--pretrained-checkpoint` then has the weights.

    Args:
        args: Megatron-LM's.
        exists: whether a folder holds a checkpoint.

    Raises:
        UserError: it names the flag and the folder.
    """
    if args.pretrained_checkpoint is not None:
        flag, folder, may_be_empty = "--pretrained-checkpoint", args.pretrained_checkpoint, exists(args.load)
    else:
        flag, folder, may_be_empty = "--load", args.load, args.load == args.save and not args.finetune
    if folder is not None and not may_be_empty and not exists(folder):
        raise UserError(
            f"{flag} {folder} holds no latest_checkpointed_iteration.txt, and training would start from random "
            "weights; give the folder that tools/hf_to_megatron.py wrote, or that of a run"
        )


def main() -> None:
    """Hands our dataset, model and forward step to Megatron-LM's pretrain()."""
    compat.check_megatron_lm()
    cpu.enable_megatron_lm_without_gpu()
    # Megatron-LM is imported after both.
    from gpt_builders import gpt_builder
    from megatron.core.enums import ModelType
    from megatron.training import get_args, pretrain
    from megatron.training.checkpointing import checkpoint_exists
    from model_provider import model_provider

    def build_model(*args: Any, **kwargs: Any) -> Any:
        require_weights(get_args(), checkpoint_exists)
        return model_provider(gpt_builder, *args, **kwargs)

    pretrain(
        megatron_lm.train_valid_test_datasets_provider,
        megatron_lm.with_logprob_head(build_model),
        ModelType.encoder_or_decoder,
        megatron_lm.forward_step,
        extra_args_provider=megatron_lm.add_simpo_args,
        args_defaults=megatron_lm.ARGS_DEFAULTS,
    )


if __name__ == "__main__":
    leave(exit_code("pretrain_simpo.py", main))
