"""The settings of TRL, of the SimPO repository and of Megatron-LM: which setting does the same here.

    advise("learning_rate", known, flag)    ->    "did you mean --lr?"

A setting that Megatron-LM and this package spell alike is not listed. `trainer/FROM_TRL.md` shows the table of TRL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from simpo_megatron.program import nearest


class Counterpart(NamedTuple):
    """What sets the same here.

    Attributes:
        settings: by field name; several where the other name does the work of several. Empty where none does.
        note: what differs; where there are no settings, why.
    """

    settings: tuple[str, ...]
    note: str = ""


_PAIRS = "the pairs of a step, over all processes and accumulated microbatches"
_MODEL_SHAPE = Counterpart(("hf_checkpoint",), "its config.json describes the model")
_TOKENIZER = Counterpart(("hf_checkpoint",), "the tokenizer is the one in this folder")
_NO_DROPOUT = Counterpart((), "a run has no dropout but --lora-dropout")
_ADAM = Counterpart((), "the optimizer is Adam with decoupled weight decay")

# Fields of CPOConfig, DPOConfig, TrainingArguments, ModelConfig and ScriptArguments, in the order of FROM_TRL.md.
TRL = {
    "beta": Counterpart(("simpo_beta",), "default 2; TRL's is 0.1; other objectives have a beta of their own"),
    "simpo_gamma": Counterpart(("simpo_gamma",), "absolute in both; default half of beta, TRL's is 0.5"),
    "loss_type": Counterpart(("objective", "simpo_loss_type"), "TRL's `simpo` is the default: `simpo` with `sigmoid`"),
    "cpo_alpha": Counterpart(("simpo_sft_weight",), "default 0; TRL's is 1"),
    "label_smoothing": Counterpart(("simpo_label_smoothing",)),
    "alpha": Counterpart((), "AlphaPO is not supported"),
    "ld_alpha": Counterpart((), "LD-DPO is not supported"),
    "per_device_train_batch_size": Counterpart(("global_batch_size",), _PAIRS),
    "gradient_accumulation_steps": Counterpart(("global_batch_size",), _PAIRS),
    "per_device_eval_batch_size": Counterpart((), "an evaluation packs pairs as training does"),
    "num_train_epochs": Counterpart(("train_epochs",), "no default; TRL's is 3"),
    "max_steps": Counterpart(("train_iters",)),
    "learning_rate": Counterpart(("lr",), "default 1e-6, as in TRL"),
    "lr_scheduler_type": Counterpart(("lr_decay_style",), "default cosine; TRL's is linear"),
    "warmup_ratio": Counterpart(("lr_warmup_fraction",), "default 0.1; TRL's is 0"),
    "warmup_steps": Counterpart(("lr_warmup_fraction",), "a share of the steps, not a number of steps; default 0.1"),
    "weight_decay": Counterpart(("weight_decay",), "norms and biases are not decayed"),
    "max_grad_norm": Counterpart(("clip_grad",)),
    "adam_beta1": Counterpart(("adam_beta1",)),
    "adam_beta2": Counterpart(("adam_beta2",)),
    "adam_epsilon": Counterpart(("adam_eps",)),
    "optim": _ADAM,
    "seed": Counterpart(("seed",), "of the data order; default 1234"),
    "data_seed": Counterpart(("seed",)),
    "max_length": Counterpart(("max_length",), "default half of `--seq-length`; TRL's is 1024"),
    "max_prompt_length": Counterpart(("max_prompt_length",), "cuts a prompt only if its sequence is too long"),
    "max_completion_length": Counterpart(("max_length",), "limits prompt and response together"),
    "truncation_mode": Counterpart(("prompt_truncation",), "the part of the prompt that is kept"),
    "padding_free": Counterpart(("seq_length",), "pairs are always packed, into rows of this many tokens"),
    "dataset_num_proc": Counterpart((), "`tools/preprocess_preferences.py --workers` tokenizes in parallel"),
    "dataset_name": Counterpart(("train_data",), "files, prepared sets or hub ids, also with weights"),
    "dataset_train_split": Counterpart(("train_data",), "write the split behind the name, `OWNER/NAME:SPLIT`"),
    "dataset_test_split": Counterpart(("valid_data",), "write the split behind the name, `OWNER/NAME:SPLIT`"),
    "model_name_or_path": Counterpart(("hf_checkpoint",), "a local folder; hub ids are not downloaded"),
    "dtype": Counterpart(("fp32",), "bf16 unless this is given"),
    "torch_dtype": Counterpart(("fp32",), "bf16 unless this is given"),
    "bf16": Counterpart(("bf16",), "on by default, with fp32 gradients and master weights"),
    "fp16": Counterpart(("fp16",), "refused, because log-prob sums leave its range"),
    "attn_implementation": Counterpart(("transformer_impl",)),
    "use_liger_kernel": Counterpart(("head",), "the fused head is the default"),
    "gradient_checkpointing": Counterpart(("recompute_granularity",), "off by default; TRL's is on"),
    "activation_checkpointing": Counterpart(("recompute_granularity",), "off by default"),
    "disable_dropout": _NO_DROPOUT,
    "router_aux_loss_coef": Counterpart(("moe_aux_loss_coeff",), "default 0"),
    "fsdp": Counterpart(("tensor_model_parallel_size", "use_distributed_optimizer"), "parallelism is Megatron's"),
    "deepspeed": Counterpart(("tensor_model_parallel_size", "use_distributed_optimizer"), "parallelism is Megatron's"),
    "ddp_timeout": Counterpart(("distributed_timeout_minutes",), "minutes, not seconds"),
    "use_cpu": Counterpart(("device",), "`--device cpu`"),
    "output_dir": Counterpart(("save", "export_hf"), "checkpoints go to `--save`, the trained model to `--export-hf`"),
    "save_steps": Counterpart(("save_interval",), "default: one checkpoint, after the last step; TRL's is 500"),
    "save_strategy": Counterpart(("save_interval",), "steps between two checkpoints"),
    "save_total_limit": Counterpart(("keep_last",), "default: every checkpoint is kept"),
    "resume_from_checkpoint": Counterpart(("load",), "the folder of `--save`; the latest checkpoint is taken"),
    "eval_steps": Counterpart(("eval_interval",)),
    "eval_strategy": Counterpart(("eval_interval",), "with `--valid-data` also before and after training"),
    "logging_steps": Counterpart(("log_interval",), "default 1; TRL's is 10"),
    "logging_dir": Counterpart(("tensorboard_dir",)),
    "report_to": Counterpart(("tensorboard_dir", "wandb_project"), "TensorBoard is on with `--save`"),
    "push_to_hub": Counterpart((), "nothing is uploaded; `--export-hf` writes a local folder"),
    "precompute_ref_log_probs": Counterpart(
        ("reference_checkpoint",), "reference log-probs are always computed once, before the first step"
    ),
    "use_peft": Counterpart(("lora_rank",), "a rank trains adapters"),
    "lora_r": Counterpart(("lora_rank",), "no default; TRL's is 16"),
    "lora_alpha": Counterpart(("lora_alpha",), "default twice the rank; TRL's is 32"),
    "lora_target_modules": Counterpart(("lora_targets",), "default all projections; embeddings have no adapters"),
    "use_rslora": Counterpart(("use_rslora",)),
    "lora_dropout": Counterpart(("lora_dropout",), "default 0; TRL's is 0.05, and its `disable_dropout` sets it to 0"),
    "lora_modules_to_save": Counterpart((), "with adapters all weights are frozen"),
    "use_dora": Counterpart((), "DoRA is not supported"),
}
SIMPO_REPOSITORY = {
    "gamma": Counterpart(("simpo_gamma",), "absolute, in units of reward"),
    "gamma_beta_ratio": Counterpart(("simpo_gamma_beta_ratio",)),
    "sft_weight": Counterpart(("simpo_sft_weight",)),
    "dataset_mixer": Counterpart(("train_data",), "with weights: `0.7 A 0.3 B`"),
}
MEGATRON_LM = {
    "micro_batch_size": Counterpart(
        ("global_batch_size", "seq_length"),
        "a microbatch is one packed row of `--seq-length` tokens; a batch counts pairs",
    ),
    "rampup_batch_size": Counterpart((), "the batch size is constant"),
    "train_samples": Counterpart(("train_epochs", "train_iters")),
    "lr_warmup_iters": Counterpart(("lr_warmup_fraction",), "a share of the steps"),
    "lr_warmup_samples": Counterpart(("lr_warmup_fraction",), "a share of the steps"),
    "lr_warmup_init": Counterpart((), "the learning rate rises from 0"),
    "lr_decay_iters": Counterpart((), "the learning rate decays over the whole run"),
    "lr_decay_samples": Counterpart((), "the learning rate decays over the whole run"),
    "optimizer": _ADAM,
    "data_path": Counterpart(("train_data",)),
    "train_data_path": Counterpart(("train_data",)),
    "valid_data_path": Counterpart(("valid_data",)),
    "split": Counterpart(("valid_data",), "held-out pairs are a source of their own"),
    "eval_iters": Counterpart(("eval_interval",), "an evaluation reads all of `--valid-data`"),
    "tokenizer_model": _TOKENIZER,
    "tokenizer_type": _TOKENIZER,
    "encoder_seq_length": Counterpart(("seq_length",)),
    "num_layers": _MODEL_SHAPE,
    "hidden_size": _MODEL_SHAPE,
    "ffn_hidden_size": _MODEL_SHAPE,
    "num_attention_heads": _MODEL_SHAPE,
    "group_query_attention": _MODEL_SHAPE,
    "num_query_groups": _MODEL_SHAPE,
    "max_position_embeddings": _MODEL_SHAPE,
    "position_embedding_type": _MODEL_SHAPE,
    "rotary_base": _MODEL_SHAPE,
    "normalization": _MODEL_SHAPE,
    "swiglu": _MODEL_SHAPE,
    "untie_embeddings_and_output_weights": _MODEL_SHAPE,
    "num_experts": _MODEL_SHAPE,
    "moe_router_topk": _MODEL_SHAPE,
    "attention_dropout": _NO_DROPOUT,
    "hidden_dropout": _NO_DROPOUT,
    "use_flash_attn": Counterpart(("attention_backend",)),
    "recompute_activations": Counterpart(("recompute_granularity",), "`--recompute-granularity selective`"),
    "fine_grained_activation_offloading": Counterpart(
        ("recompute_granularity",), "Megatron's offloading needs a fixed number of microbatches"
    ),
    "distributed_backend": Counterpart(("device",), "cuda is over NCCL, cpu over gloo"),
    "ckpt_format": Counterpart((), "checkpoints are torch_dist"),
}
COUNTERPARTS = {**MEGATRON_LM, **SIMPO_REPOSITORY, **TRL}

_QUANTIZED = re.compile(r"load_in_[48]bit|bnb|qlora")


def advise(name: str, known: Collection[str], spell: Callable[[str], str]) -> str | None:
    """What to tell a user who gave a name that is not a setting.

    Args:
        name: as a field name.
        known: the settings that the program has.
        spell: writes a setting as the user would: as a flag, or as a key of a file.

    Returns:
        The second part of a sentence, such as "did you mean --lr?"; None if nothing is known and no name is near.

    >>> advise("cpo_alpha", ["simpo_sft_weight"], str)
    "did you mean simpo_sft_weight? (default 0; TRL's is 1)"
    """
    if _QUANTIZED.search(name):
        return "quantized weights are not supported; adapters train on weights in bf16, with --lora-rank"
    there = {other: found for other, found in COUNTERPARTS.items() if set(found.settings) <= set(known)}
    near = nearest(name, {*known, *there})
    if near is not None and near not in known and nearest(name, [near], 0.85) is None:
        near = nearest(name, known)  # far from the other program's name: another setting
    if near is None:
        return None
    if near in known:
        return f"did you mean {spell(near)}?"
    settings, note = there[near]
    note = note.replace("`", "")
    if not settings:
        return note
    question = f"did you mean {' or '.join(map(spell, settings))}?"
    return f"{question} ({note})" if note else question
