"""Models of transformers for generation and scoring: device, dtype, loading, fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from simpo_megatron.errors import UserError
from simpo_megatron.trainer.reference_source import weights_fingerprint


def device_and_dtype(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """What "auto" stands for on this machine.

    Raises:
        UserError: a GPU is asked for, and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU; use --device cpu")
    found = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    name = ("bfloat16" if found == "cuda" else "float32") if dtype == "auto" else dtype
    return found, getattr(torch, name)


def load_model(auto: Any, checkpoint: Path, dtype: torch.dtype, device: str, trust_remote_code: bool) -> Any:
    """Loads a model, and refuses a checkpoint that lacks some of its weights: transformers would draw them at random.

    Args:
        auto: the `AutoModelFor...` class.
        checkpoint: folder.
        dtype: of the weights.
        device: "cpu" or "cuda".
        trust_remote_code: whether code of the folder may run.

    Raises:
        UserError: the model cannot be loaded, or weights are missing.
    """
    transformers.utils.logging.disable_progress_bar()
    if not (checkpoint / "config.json").is_file():
        raise UserError(f"{checkpoint} has no config.json; give the folder of a Hugging Face checkpoint")
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what is missing is an error below
    try:
        model, info = auto.from_pretrained(
            checkpoint,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # of transformers, safetensors, or the checkpoint's own code
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{checkpoint} cannot be loaded as {auto.__name__.removeprefix('Auto')}: {reason}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{checkpoint} has no weights for {', '.join(missing[:3])}, which {auto.__name__.removeprefix('Auto')} "
            "needs; is it another kind of model?"
        )
    return model.eval().to(device)


def weights_of(checkpoint: Path) -> str | None:
    """The fingerprint of the weights of a folder; None where it has none."""
    files = sorted({*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.bin")})
    return weights_fingerprint(files) if files else None
