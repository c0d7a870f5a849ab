"""The Megatron-LM arguments in a checkpoint: as `args`, as megatron_args.yaml with a line of flags, and read back.

models/megatron_args.py has the names of the architecture's arguments; this module has what a checkpoint holds of them.

Megatron-LM's `--load --use-checkpoint-args` restores most of them from the checkpoint, but not the norm's epsilon,
qk-layernorm, rope scaling and its factor, the window or the vocabulary's divisor (`checkpointing.py`,
`load_args_from_checkpoint`): a run without them starts from the right weights and computes another model.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from simpo_megatron.errors import UserError
from simpo_megatron.models.additions import Additions
from simpo_megatron.models.architecture import Architecture
from simpo_megatron.models.families.registry import config_of_args
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, read_architecture
from simpo_megatron.models.megatron_args import LLAMA3_ROPE, OWN_ROPES
from simpo_megatron.models.rope import Rope
from simpo_megatron.parallel.stages import VOCAB_DIVISOR

# Arguments without a flag in Megatron-LM, which reads them from the checkpoint or sets them itself.
_NO_FLAG = (
    "vocab_size",  # of the tokenizer
    "padded_vocab_size",
    "add_position_embedding",
    "hf_model_type",
    *(f"rope_scaling_{name}" for name in LLAMA3_ROPE),
    *(f"rope_{field.name}" for field in fields(Rope)),
)
_ADDITIONS = tuple(field.name for field in fields(Additions))


def megatron_args(architecture: Architecture, divisor: int = VOCAB_DIVISOR) -> dict[str, Any]:
    """The architecture under Megatron-LM's names, as primitives; `divisor` is `--make-vocab-size-divisible-by`."""
    family = architecture.family
    return {
        **family.megatron_args(architecture),
        "vocab_size": architecture.vocab_size,
        "make_vocab_size_divisible_by": divisor,
        "hf_model_type": family.model_types[0],  # ours: several families may have the same arguments
    }


def not_expressible(architecture: Architecture) -> list[str]:
    """What Megatron-LM's arguments cannot express of this model, a sentence each; the trainer of this package can."""
    rope, found = architecture.rope, []
    if rope.kind == "llama3":
        found += [
            f"rope scaling {name} {getattr(rope, name):g}: Megatron-LM computes with {fixed:g}"
            for name, fixed in LLAMA3_ROPE.items()
            if getattr(rope, name) != fixed
        ]
    if rope.kind == "linear" and rope.factor != int(rope.factor):
        found.append(f"linear rope scaling by {rope.factor:g}: Megatron-LM takes whole numbers")
    if rope.kind in OWN_ROPES and not _has_megatrons_yarn(architecture):
        found.append(f"rope scaling {rope.kind!r}: Megatron-LM has no argument for it")
    if rope.theta != int(rope.theta):
        found.append(f"rope theta {rope.theta!r}: Megatron-LM takes whole numbers")
    found += [
        f"{name} {value!r}: Megatron-LM has no argument for it"
        for name, value in architecture.additions.as_dict().items()
    ]
    return found


def _has_megatrons_yarn(architecture: Architecture) -> bool:
    """Whether the model has the YaRN of Megatron's latent attention, with the values that have no flags."""
    rope = architecture.rope
    return (
        bool(architecture.transformer.get("multi_latent_attention"))
        and (rope.kind, rope.original_max_position_embeddings, rope.attention_factor) == ("yarn", 4096, None)
        and (rope.beta_fast or 32, rope.beta_slow or 1, rope.truncate is False) == (32, 1, False)
        and (rope.mscale is None) == (rope.mscale_all_dim is None)
    )


def flags(args: dict[str, Any]) -> list[str]:
    """The command line of `args` for Megatron-LM's pretrain scripts."""
    line: list[str] = []
    for name, value in args.items():
        if name == "add_bias_linear":
            line += [] if value else ["--disable-bias-linear"]
        elif name not in _NO_FLAG and name not in _ADDITIONS and value is not None and value is not False:
            flag = "--" + name.replace("_", "-")
            if isinstance(value, list):  # one number a layer
                line += [flag, str(value).replace(" ", "")]
            elif isinstance(value, tuple):
                line += [flag, ",".join(map(str, value))]
            else:
                line += [flag] if value is True else [flag, str(value)]
    return line


def yaml_text(architecture: Architecture, args: dict[str, Any]) -> str:
    """megatron_args.yaml: the arguments by name, the line of flags, and what they cannot express."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in args.items()}
    content = {
        "megatron_args": plain,
        "flags": shlex.join(flags(args)),
        "not_expressible": not_expressible(architecture),
        "vocab_size": architecture.vocab_size,
    }
    return (
        "# Arguments of this model for Megatron-LM 0.16; --load alone does not restore all of them.\n"
        + yaml.safe_dump(content, sort_keys=False, width=10**6)
    )


def namespace(args: Mapping[str, Any], **more: Any) -> Namespace:
    """`args` of a checkpoint, as Megatron-LM reads them; all are primitives, so that weights_only loads them.

    Args:
        args: from `megatron_args`.
        **more: of the run that saves; they win over `args`.

    Raises:
        UserError: a value is not a primitive.
    """
    values = {**args, "use_rotary_position_embeddings": True, "ckpt_format": "torch_dist", **more}
    if not all(isinstance(value, (int, float, str, tuple, list, type(None))) for value in values.values()):
        raise UserError("the arguments of this model hold something else than numbers, names, tuples and lists")
    return Namespace(**values)


def common_state(args: Namespace) -> dict[str, Any]:
    """What Megatron-LM's loader asks for, in a checkpoint without a run, in addition to the weights."""
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
    }


def checkpoint_of_args(folder: Path, args: Mapping[str, Any], vocab_size: int | None) -> HFCheckpoint:
    """The model of a Megatron checkpoint without a Hugging Face reference, from its arguments.

    Args:
        folder: of one iteration.
        args: what it was saved with, by name (`folder.read_args`).
        vocab_size: without Megatron's padding; None to take it from the arguments, which may only have the padded one.

    Raises:
        UserError: there are no arguments, or they do not describe a family this package knows.
    """
    if not args:
        raise UserError(f"{folder} has no arguments to make a config.json from; give --hf-checkpoint")
    rows = vocab_size or args.get("vocab_size")
    if rows is None:
        raise UserError(
            f"the arguments in {folder} do not have the size of the vocabulary without padding; give --hf-checkpoint, "
            "or --vocab-size"
        )
    try:
        config = config_of_args(args, rows)
    except UserError as error:
        raise UserError(f"the arguments in {folder} cannot be converted: {error}") from error
    if config is None:
        raise UserError(f"the arguments in {folder} do not describe a family that is supported; give --hf-checkpoint")
    return HFCheckpoint(folder, config, read_architecture(folder, config), (), {})
