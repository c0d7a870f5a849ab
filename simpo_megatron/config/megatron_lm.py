"""Which of Megatron-LM's arguments work with preferences: the plug, `megatron_lm.py`, refuses the others."""

from __future__ import annotations

from typing import Any

from simpo_megatron.config.refused import BREAKS
from simpo_megatron.settings import flag, require, required

# Megatron-LM's argument, the one value that works, and why or what to do.
_NEEDED: tuple[tuple[str, Any, str], ...] = (
    ("micro_batch_size", 1, "a microbatch is one packed row; set it to 1"),
    ("dataloader_type", "external", "the datasets provider yields microbatches; set it to external"),
    ("calculate_per_token_loss", False, "the loss is a mean over pairs; drop it"),
    ("fp16", False, "a log-prob sum leaves fp16's range; use --bf16"),
    ("sft", False, "it changes how losses are averaged; use --objective sft"),
    ("mtp_num_layers", None, "the head scores one token ahead; drop it"),
)
# Its flag, where that has another name than the argument.
_FLAGS = {"fp8": "--fp8-format", "fp4": "--fp4-format"}


def check_values(args: Any) -> None:
    """Refuses values that do not work with the loss or with packed rows.

    Args:
        args: Megatron-LM's.

    Raises:
        UserError: it names the flag, its value and what to do.
    """
    for name, needed, why in _NEEDED:
        value = getattr(args, name)
        require(value == needed, f"{flag(name)} {value} cannot be used with SimPO: {why}")
    for name, why in BREAKS.items():
        value = getattr(args, name, None)  # not every release has all of them
        off = value in (None, False, "none")
        shown = "" if value is True else f" {value}"
        require(off, f"{_FLAGS.get(name, flag(name))}{shown} cannot be used with SimPO: {why}")
    dispatcher = args.moe_token_dispatcher_type
    require(
        not args.num_experts or dispatcher == "alltoall",
        f"--moe-token-dispatcher-type {dispatcher} does not work with packed rows of changing length; use alltoall",
    )
    require(
        not args.attention_dropout and not args.hidden_dropout,
        "--attention-dropout and --hidden-dropout must be 0: the two responses of a pair must not see different noise",
    )
    require(
        not (args.share_prompts and getattr(args, "apply_rope_fusion", False)),
        "--share-prompts: the fused rotary embedding cannot count both responses from the end of the prompt; give "
        "--no-rope-fusion",
    )
    require(
        args.tokenizer_type == "HuggingFaceTokenizer",
        f"--tokenizer-type {args.tokenizer_type} has no chat template; use HuggingFaceTokenizer",
    )
    required(args.train_data_path, "--train-data-path is missing; give preferences: a prepared prefix or a .jsonl file")


def moe_aux_loss_coeff(args: Any) -> float:
    """Megatron-LM's --moe-aux-loss-coeff: the sum if it is a list (one number for each loss); 0 without experts."""
    coefficient = args.moe_aux_loss_coeff if args.num_experts else 0.0
    return float(sum(coefficient)) if isinstance(coefficient, list) else coefficient


def notes(args: Any) -> list[str]:
    """What works and costs more than a user may expect, one line each."""
    found = []
    if args.bf16 and not args.accumulate_allreduce_grads_in_fp32:
        found.append(
            "gradients are kept in bf16, and the head adds in fp32: every microbatch needs an fp32 copy of the output "
            "layer's gradient; leave out --grad-reduce-in-bf16 and --main-grads-dtype bf16 to save it"
        )
    if args.pipeline_model_parallel_size > 1 and not args.simpo_variable_seq_lengths:
        found.append(
            f"every packed row has --seq-length {args.seq_length} tokens, the empty ones too; the shorter it is, the "
            "less is padding (--variable-seq-lengths: rows end after their last pair, and the stages exchange shapes)"
        )
    return found
