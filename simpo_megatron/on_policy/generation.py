"""Prompts -> responses, block by block, through any backend; `tools/generate_responses.py` runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from simpo_megatron.data.encode import PairEncoder
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.tokenizer import check_known, fingerprint, load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.files import end_of_turn_ids
from simpo_megatron.on_policy.backends import BACKENDS
from simpo_megatron.on_policy.backends.base import Backend, Request, Response
from simpo_megatron.on_policy.journal import Journal
from simpo_megatron.on_policy.prompts import Prompt
from simpo_megatron.on_policy.sampling import SamplingSettings, response_seed
from simpo_megatron.program import Meter, meter
from simpo_megatron.settings import Group
from simpo_megatron.trainer.reference_source import weights_fingerprint_in


class Generator:
    """A model that answers prompts.

    Args:
        checkpoint: folder of the Hugging Face checkpoint: its tokenizer and template, and the weights where the
            backend loads them.
        backend: name in `BACKENDS`.
        settings: of the backend.
        sampling: of the run.

    Raises:
        UserError: the checkpoint or the backend cannot be used.
    """

    def __init__(self, checkpoint: Path, backend: str, settings: Group, sampling: SamplingSettings) -> None:
        self.sampling = sampling
        tokenizer = load_tokenizer(checkpoint)
        eos_ids = end_of_turn_ids(checkpoint)
        self._encoder = PairEncoder(tokenizer, DataOptions(), eos_ids)
        self._backend: Backend = BACKENDS[backend].load()(
            checkpoint,
            settings,
            sampling,
            sorted(self._encoder.eos_ids, key=lambda token: token != tokenizer.eos_token_id),
        )
        self._about = {
            "model": str(checkpoint.resolve()),
            "weights": weights_fingerprint_in(checkpoint),
            **fingerprint(tokenizer, eos_ids),
            "backend": backend,
            **self._backend.about(),
        }

    def about(self) -> dict[str, Any]:
        """What decides the responses, as JSON values."""
        return {**self._about, **vars(self.sampling)}

    def answer(
        self, prompts: Sequence[Prompt], journal: Journal, title: str, temperatures: Sequence[float] | None = None
    ) -> Meter:
        """Answers those prompts that have no row in the journal, and adds their rows.

        Prompts are taken by length, the longest first, so that a batch has little padding and a lack of memory shows at
        the start.

        Args:
            prompts: to answer.
            journal: rows go there, one a prompt.
            title: of the progress bar.
            temperatures: one a prompt; None for that of the settings.

        Raises:
            UserError: a prompt cannot be encoded, or the backend or the disk fails.
        """
        everywhere = temperatures or [self.sampling.temperature] * len(prompts)
        todo = [
            (prompt, heat) for prompt, heat in zip(prompts, everywhere, strict=True) if prompt.id not in journal.done
        ]
        encoded = self._encoder.encode_prompts([(prompt.where, prompt.messages) for prompt, _ in todo])
        self._check_ids([prompt for prompt, _ in todo], encoded)
        by_length = iter(sorted(zip(todo, encoded, strict=True), key=lambda one: -len(one[1])))
        size = max(1, self._backend.block // self.sampling.num_responses)
        with meter(title, len(todo)) as progress:
            while block := list(islice(by_length, size)):
                asked = [list(self._requests(prompt, heat, ids)) for (prompt, heat), ids in block]
                responses = self._backend.generate([request for requests in asked for request in requests])
                left = iter(responses)
                journal.append(
                    [
                        _row(prompt, requests, list(islice(left, len(requests))))
                        for ((prompt, _), _), requests in zip(block, asked, strict=True)
                    ]
                )
                progress.add(len(block), sum(response.tokens for response in responses))
        return progress

    def _check_ids(self, prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]]) -> None:
        """Raises UserError where the model does not know a token, or a prompt and a response are too long for it."""
        for prompt, ids in zip(prompts, encoded, strict=True):
            check_known(ids, self._backend.vocabulary, prompt.where, "--hf-checkpoint")
        context, new = self._backend.context, self.sampling.max_new_tokens
        longest = max(range(len(prompts)), key=lambda i: len(encoded[i]), default=None)
        if context is None or longest is None or len(encoded[longest]) + new <= context:
            return
        tokens = len(encoded[longest])
        fix = f"use at most --max-new-tokens {context - tokens}" if tokens < context else "remove the row"
        raise UserError(
            f"{prompts[longest].where}: the prompt has {tokens} tokens, and --max-new-tokens {new} more would not fit "
            f"into the {context} that the model takes (max_position_embeddings of its config.json); {fix}"
        )

    def _requests(self, prompt: Prompt, temperature: float, ids: Sequence[int]) -> Iterator[Request]:
        """What is asked for a prompt."""
        for index in range(self.sampling.num_responses):
            yield Request(tuple(ids), prompt.messages, temperature, response_seed(self.sampling.seed, prompt.id, index))


def _row(prompt: Prompt, requests: Sequence[Request], responses: Sequence[Response]) -> dict[str, Any]:
    """What is written for a prompt."""
    return {
        "id": prompt.id,
        "prompt": prompt.messages,
        **prompt.columns,
        "responses": [
            {
                "content": response.content,
                "finish_reason": response.finish_reason,
                "tokens": response.tokens,
                "seed": request.seed,
            }
            for request, response in zip(requests, responses, strict=True)
        ],
    }
