"""The model in Megatron-LM's `pretrain()`: its Hugging Face checkpoint, and whether the arguments describe the same."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from simpo_megatron.checkpoint.saved_args import not_expressible
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import HFCheckpoint, read_hf_checkpoint
from simpo_megatron.settings import flag


def hf_checkpoint(args: Any) -> HFCheckpoint:
    """The Hugging Face checkpoint that --tokenizer-model names: tokenizer, chat template and unpadded vocabulary.

    Raises:
        UserError: the flag is missing, or the checkpoint cannot be read.
    """
    if args.tokenizer_model is None:
        raise UserError(
            "--tokenizer-model is missing; give the folder of the Hugging Face checkpoint that the weights came from"
        )
    return _read_once(Path(args.tokenizer_model))


@functools.cache
def _read_once(path: Path) -> HFCheckpoint:
    """Reads the headers of the checkpoint once: every microbatch asks for the vocabulary."""
    return read_hf_checkpoint(path)


def check_architecture(args: Any, hf: HFCheckpoint) -> None:
    """Compares those of Megatron-LM's arguments with config.json that are in both, and refuses what has none.

    Raises:
        UserError: Megatron-LM would compute another model.
    """
    wanted = hf.architecture.transformer
    beyond = not_expressible(hf.architecture)
    if wanted.get("multi_latent_attention"):
        beyond.append("multi-latent attention: it refuses packed rows there")
    if beyond:
        raise UserError(
            f"{hf.path} is a model that Megatron-LM's training cannot compute ({'; '.join(beyond)}); train it with "
            "simpo_megatron.train"
        )
    names = {"num_layers": "num_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_attention_heads"}
    names |= {"num_query_groups": "num_query_groups", "kv_channels": "kv_channels", "num_moe_experts": "num_experts"}
    for key, name in names.items():
        given = getattr(args, name, None)
        if name == "num_query_groups" and not args.group_query_attention:
            given = args.num_attention_heads
        if key in wanted and given != wanted[key]:
            raise UserError(
                f"{flag(name)} {given}, but {hf.path} has {wanted[key]}; use the arguments of that model (they are in "
                "megatron_args.yaml, which tools/hf_to_megatron.py writes beside the weights)"
            )
