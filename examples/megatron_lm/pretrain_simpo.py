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

import sys
from functools import partial

from simpo_megatron import compat, cpu

compat.quiet_megatron()

from simpo_megatron import megatron_lm  # noqa: E402  (it imports Megatron-Core)
from simpo_megatron.program import exit_code  # noqa: E402


def main() -> None:
    """Hands our dataset, model and forward step to Megatron-LM's pretrain()."""
    compat.check_megatron_lm()
    cpu.enable_megatron_lm_without_gpu()
    # Megatron-LM is imported after both.
    from gpt_builders import gpt_builder
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from model_provider import model_provider

    pretrain(
        megatron_lm.train_valid_test_datasets_provider,
        megatron_lm.with_logprob_head(partial(model_provider, gpt_builder)),
        ModelType.encoder_or_decoder,
        megatron_lm.forward_step,
        extra_args_provider=megatron_lm.add_simpo_args,
        args_defaults=megatron_lm.ARGS_DEFAULTS,
    )


if __name__ == "__main__":
    sys.exit(exit_code("pretrain_simpo.py", main))
