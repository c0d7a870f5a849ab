"""The tokenizer of a checkpoint, the ids that end its turns, and a fingerprint that tells two of them apart."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from simpo_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder; nothing is downloaded, no code of the folder runs.

    Raises:
        UserError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise UserError(f"--hf-checkpoint {path} is not a folder; give that of a Hugging Face checkpoint")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--hf-checkpoint {path} has no tokenizer that transformers can load: {reason}") from error


def fingerprint(tokenizer: "PreTrainedTokenizerBase", eos_ids: Iterable[int]) -> dict[str, str]:
    """Digests of what turns a row into ids: `tokenizer` (vocabulary, merges, normalizer, special ids) and `template`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        # Padding and truncation are settings of a call, not of the vocabulary.
        rules = {
            key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")
        }
    ends: set[Any] = {*eos_ids, cast("int | None", tokenizer.eos_token_id)} - {None}
    return {
        "tokenizer": _digest([rules, tokenizer.bos_token_id, sorted(ends)]),
        "template": _digest(tokenizer.chat_template),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
