"""The tokenizer of a checkpoint, and a fingerprint by which a prepared set recognizes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from simpo_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: Path, flag: str = "--hf-checkpoint") -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Nothing is downloaded, and no code of the folder runs.

    Args:
        path: the folder.
        flag: that names it, for the error.

    Raises:
        UserError: transformers can load none.
    """
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise UserError(f"{flag} {path} is not a folder; give the folder of a Hugging Face checkpoint")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{flag} {path} has no tokenizer that transformers can load: {reason}") from error


def check_known(ids: Sequence[int], vocabulary: int | None, where: str, flag: str) -> None:
    """Checks that a model has an embedding of every token.

    Args:
        ids: of a row; at least one.
        vocabulary: rows of the embedding; None where what computes the model checks them itself.
        where: place of the row, for the error.
        flag: that names the model.

    Raises:
        UserError: a token is not known, so the tokenizer is that of another model.
    """
    if vocabulary is not None and max(ids) >= vocabulary:
        raise UserError(
            f"{where}: the tokenizer of {flag} gives the token {max(ids)}, and the model's embedding has {vocabulary}; "
            "put the model's own tokenizer into its folder"
        )


def fingerprint(tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int]) -> dict[str, str]:
    """Digests of everything in a checkpoint that decides how a row becomes ids.

    Args:
        tokenizer: of the checkpoint.
        eos_ids: ids that end a response besides the tokenizer's EOS (`files.end_of_turn_ids`).

    Returns:
        `tokenizer`: of vocabulary, merges, normalizer and special ids; `template`: of the chat template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        # Padding and truncation are left out: they are set by the last call of the tokenizer.
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
