"""Scores by a reward model of transformers: one forward pass a batch, batches of conversations of similar length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from simpo_megatron.data.tokenizer import check_known, fingerprint, load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.files import read_json
from simpo_megatron.models.transformers_model import choose_device, choose_dtype, load_model
from simpo_megatron.on_policy.scorers.base import Answered
from simpo_megatron.on_policy.scorers.settings import RewardModelSettings
from simpo_megatron.settings import required
from simpo_megatron.trainer.reference_source import weights_fingerprint_in

_AUTO = "AutoModelForSequenceClassification"


class RewardModel:
    """See `base.Scorer`. The conversation is written by the reward model's own template; two BOS become one."""

    block = 64

    def __init__(self, settings: RewardModelSettings) -> None:
        self._settings = settings
        self._folder, self._tokenizer, own_code = _found(settings)
        device = choose_device(settings.device)
        dtype = choose_dtype(settings.dtype, device)
        self._model = load_model("--reward-model", self._folder, dtype, device, _AUTO, settings.trust_remote_code)
        self._vocabulary = None
        if not own_code:
            self._vocabulary = self._model.get_input_embeddings().weight.shape[0]
            self._check_outputs(getattr(self._model.config, "num_labels", 1))
        self._about = {
            "reward_model": str(self._folder.resolve()),
            "weights": weights_fingerprint_in(self._folder),
            **fingerprint(self._tokenizer, ()),
            "dtype": str(dtype).removeprefix("torch."),
        }

    @classmethod
    def check(cls, settings: RewardModelSettings) -> None:
        """See `base.Scorer`."""
        _found(settings)

    def about(self) -> dict[str, Any]:
        """See `base.Scorer`."""
        return self._about

    def score(self, rows: Sequence[Answered]) -> list[list[float]]:
        """See `base.Scorer`."""
        flat = [self._ids(row, response) for row in rows for response in row.responses]
        scores = [0.0] * len(flat)
        order = sorted(range(len(flat)), key=lambda i: len(flat[i]), reverse=True)
        while order:
            padded = self._model.config.pad_token_id is not None
            size = max(1, self._settings.batch_tokens // len(flat[order[0]])) if padded else 1
            batch, order = order[:size], order[size:]
            try:
                found = self._batch([flat[i] for i in batch])
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"--batch-tokens {self._settings.batch_tokens}: {len(batch)} conversations of "
                    f"{len(flat[batch[0]])} tokens do not fit the GPU's memory; lower it"
                ) from error
            for i, score in zip(batch, found, strict=True):
                scores[i] = score
        numbers = iter(scores)
        return [[next(numbers) for _ in row.responses] for row in rows]

    def _check_outputs(self, count: int) -> None:
        """Raises UserError if there is more than one number a conversation."""
        if count != 1:
            raise UserError(f"--reward-model {self._folder} has {count} outputs; a reward model has one")

    def _ids(self, row: Answered, response: str) -> list[int]:
        messages = [*row.prompt, {"role": "assistant", "content": response}]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template raises errors of its own
            raise UserError(
                f"{row.where}: the template of --reward-model {self._folder} refuses it ({error})"
            ) from error
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        bos = self._tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        check_known(ids, self._vocabulary, row.where, f"--reward-model {self._folder}")
        longest = self._settings.max_length or getattr(self._model.config, "max_position_embeddings", None) or len(ids)
        if len(ids) > longest:
            raise UserError(
                f"{row.where}: prompt and response have {len(ids)} tokens, and the reward model takes {longest}; "
                "remove the row, or give a reward model for longer texts"
            )
        return ids

    @torch.inference_mode()
    def _batch(self, sequences: Sequence[list[int]]) -> list[float]:
        longest, device = len(sequences[0]), self._model.device
        # Padded on the right with a token that the model takes for padding: it reads the last token before it. A model
        # that knows no such token gets one conversation at a time.
        pad = self._model.config.pad_token_id
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in sequences], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences], device=device)
        output = self._model(input_ids=ids, attention_mask=mask)
        # Code of a folder's own may put one number a conversation into `.score`, as ArmoRM's does.
        found = output.logits if getattr(output, "score", None) is None else output.score
        self._check_outputs(found.numel() // len(sequences))
        return found.float().flatten().tolist()


def _found(settings: RewardModelSettings) -> tuple[Path, Any, bool]:
    """The folder of the reward model, its tokenizer, and whether code in the folder computes it.

    Raises:
        UserError: a part of it is missing, or its code must not run.
    """
    folder = required(settings.reward_model, "--reward-model is missing; give the folder of a reward model")
    tokenizer: Any = load_tokenizer(folder, "--reward-model")
    if not tokenizer.chat_template:
        raise UserError(f"--reward-model {folder} has no chat template; add chat_template.jinja to its folder")
    code = (read_json(folder / "config.json").get("auto_map") or {}).get(_AUTO)
    if code and not settings.trust_remote_code:
        raise UserError(
            f"--reward-model {folder} is computed by code in its folder ({code}); read it and add "
            "--trust-remote-code, or give another reward model"
        )
    return folder, tokenizer, bool(code)
