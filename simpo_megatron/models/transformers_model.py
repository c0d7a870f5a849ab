"""Whole models of transformers on one device: the oracle of a diagnosis, and what generates and scores responses.

model = load_model("--hf-checkpoint", folder, dtype=torch.bfloat16, device="cuda")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from simpo_megatron.errors import UserError
from simpo_megatron.settings import require


def choose_device(device: str) -> str:
    """What `--device` auto, cpu or cuda stands for on this machine.

    Raises:
        UserError: a GPU is asked for, and there is none.
    """
    found = torch.cuda.is_available()
    require(found or device != "cuda", "--device cuda finds no CUDA device; use --device cpu")
    return "cuda" if found and device != "cpu" else "cpu"


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """What `--dtype` auto, bfloat16 or float32 stands for on a device."""
    return getattr(torch, ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype)


def load_model(
    flag: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    auto: str = "AutoModelForCausalLM",
    trust_remote_code: bool = False,
) -> Any:
    """Loads a model for forward passes.

    A checkpoint that lacks some of the model's weights is refused: transformers would draw them at random.

    Args:
        flag: that names the folder, for the error.
        folder: the Hugging Face checkpoint.
        dtype: of the weights.
        device: of the weights.
        auto: the class of transformers that finds the model's own.
        trust_remote_code: whether Python code of the folder may run.

    Raises:
        UserError: transformers cannot load it, or weights of the model are not in it.
    """
    import transformers

    transformers.logging.disable_progress_bar()
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder; give the folder of a Hugging Face checkpoint")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # weights that are missing are an error below
    try:
        loaded: Any = getattr(transformers, auto).from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # of transformers, safetensors, or the checkpoint's own code
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{flag} {folder} cannot be loaded by transformers: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{flag} {folder} has no weights for {', '.join(missing[:3])}, and {len(missing)} are missing in all; is "
            "it another kind of model?"
        )
    return model.to(device).eval().requires_grad_(False)
