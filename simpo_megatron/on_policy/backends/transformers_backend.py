"""Responses by transformers: batches with left padding and a KV cache, on a GPU or a CPU.

Every response has its own random numbers, so it does not depend on the batch that it was generated in, up to the
rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from simpo_megatron.data.tokenizer import load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.models.transformers_model import choose_device, choose_dtype, load_model
from simpo_megatron.on_policy.backends.base import Request, Response
from simpo_megatron.on_policy.backends.settings import TransformersSettings
from simpo_megatron.on_policy.sampling import SamplingSettings

_MOST = 256  # responses in a batch
_USED = 0.5  # share of the free memory that keys, values and logits of a batch may take


class TransformersBackend:
    """See `base.Backend`."""

    def __init__(
        self, checkpoint: Path, settings: TransformersSettings, sampling: SamplingSettings, eos_ids: Sequence[int]
    ) -> None:
        self._sampling, self._eos_ids = sampling, list(eos_ids)
        self._device = choose_device(settings.device)
        self._dtype = choose_dtype(settings.dtype, self._device)
        self._tokenizer = load_tokenizer(checkpoint)
        self._model: Any = load_model(
            "--hf-checkpoint", checkpoint, self._dtype, self._device, trust_remote_code=settings.trust_remote_code
        )
        # What a call leaves open, such as a repetition penalty, transformers takes from the model's own.
        self._model.generation_config = GenerationConfig()
        self.context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self.vocabulary = self._model.get_input_embeddings().weight.shape[0]
        self.block = settings.batch_size or self._batch_that_fits()

    def about(self) -> dict[str, Any]:
        """See `base.Backend`."""
        return {"dtype": str(self._dtype).removeprefix("torch."), "device": self._device}

    def _batch_that_fits(self) -> int:
        """Responses of full length whose keys, values and logits fit into a share of the free memory."""
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        length = min(2 * self._sampling.max_new_tokens, self.context or 2**31)
        cache = 2 * config.num_hidden_layers * width * self._dtype.itemsize * length
        logits = 4 * 6 * config.vocab_size  # fp32 copies of the last position while a token is drawn
        free = torch.cuda.mem_get_info()[0] if self._device == "cuda" else psutil.virtual_memory().available
        return int(min(max(_USED * free // (cache + logits), 1), _MOST))

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """See `base.Backend`. A batch that does not fit the GPU's memory is divided, and so are all that follow."""
        found: list[Response] = []
        while len(found) < len(requests):
            batch = requests[len(found) : len(found) + self.block]
            try:
                found += self._batch(batch)
            except torch.OutOfMemoryError as error:
                if self.block == 1:
                    raise UserError(
                        f"--max-new-tokens {self._sampling.max_new_tokens}: one response does not fit the GPU's "
                        "memory; lower it, or use a larger GPU"
                    ) from error
                self.block = -(-min(self.block, len(batch)) // 2)
                torch.cuda.empty_cache()
        return found

    @torch.inference_mode()
    def _batch(self, requests: Sequence[Request]) -> list[Response]:
        longest = max(len(request.ids) for request in requests)
        pad = self._eos_ids[0] if self._eos_ids else 0
        rows = [[pad] * (longest - len(request.ids)) + list(request.ids) for request in requests]
        mask = [[0] * (longest - len(request.ids)) + [1] * len(request.ids) for request in requests]
        output = self._model.generate(
            input_ids=torch.tensor(rows, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            # Draw makes the chosen token the most likely one.
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=self._sampling.max_new_tokens,
                eos_token_id=self._eos_ids or None,
                pad_token_id=pad,
            ),
            logits_processor=LogitsProcessorList([Draw(requests, self._sampling, longest)]),
        )
        return [self._response(ids) for ids in output[:, longest:].tolist()]

    def _response(self, ids: list[int]) -> Response:
        ends = [position for position, token in enumerate(ids) if token in self._eos_ids]
        kept = ids[: ends[0]] if ends else ids
        return Response(
            content=str(self._tokenizer.decode(kept, skip_special_tokens=True)),
            finish_reason="stop" if ends else "length",
            tokens=len(kept) + bool(ends),
        )


class Draw(LogitsProcessor):
    """Draws the next token of every row with the row's own random numbers, and gives it the only finite logit.

    Temperature, top-k and top-p are applied in this order, by the meaning that transformers and vLLM give them. A row
    with temperature 0 takes the most likely token.

    Args:
        requests: one a row.
        sampling: of all rows.
        start: number of positions before the first generated one.
    """

    def __init__(self, requests: Sequence[Request], sampling: SamplingSettings, start: int) -> None:
        self._sampling, self._start = sampling, start
        self._temperatures = [request.temperature for request in requests]
        # One number a token, drawn on the CPU: the same on every device.
        self._numbers = torch.stack(
            [
                torch.rand(sampling.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                for seed in (request.seed for request in requests)
            ]
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits, all but one of them -inf.

        Args:
            input_ids: [rows, length].
            scores: [rows, vocabulary].

        Raises:
            UserError: a logit is NaN or infinity, so that there is no distribution to draw from.
        """
        if not bool((scores < torch.inf).all()):
            raise UserError(
                "--hf-checkpoint: the model's logits are NaN or infinite; its weights are damaged or overflow in this "
                "dtype, so check them, or give --dtype float32"
            )
        numbers = self._numbers[:, input_ids.shape[1] - self._start].to(scores.device)
        chosen = draw(scores.double(), torch.tensor(self._temperatures, device=scores.device), self._sampling, numbers)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def draw(logits: Tensor, temperatures: Tensor, sampling: SamplingSettings, numbers: Tensor) -> Tensor:
    """Draws a token for every row, by the inverse of the cumulative distribution.

    Args:
        logits: float64 [rows, vocabulary].
        temperatures: [rows]; 0 takes the largest logit.
        sampling: top_k and top_p.
        numbers: float64 [rows], uniform in [0, 1).

    Returns:
        int64 [rows].
    """
    greedy = temperatures == 0
    scaled = logits / torch.where(greedy, 1.0, temperatures)[:, None]
    ordered, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    # A token stays where those before it do not reach top_p yet; so the first always stays.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    cumulative = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulative, (numbers * cumulative[:, -1])[:, None], right=True)[:, 0]
    last = (probabilities > 0).sum(-1) - 1  # rounding must not draw a token that was left out
    place = torch.minimum(place, last).masked_fill(greedy, 0)
    return tokens.gather(1, place[:, None])[:, 0]
