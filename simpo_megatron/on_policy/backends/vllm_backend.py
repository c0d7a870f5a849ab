"""Responses by vLLM's offline interface, where vLLM is installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from simpo_megatron.errors import UserError
from simpo_megatron.on_policy.backends.base import Request, Response
from simpo_megatron.on_policy.backends.settings import VLLMSettings
from simpo_megatron.on_policy.sampling import SamplingSettings


class VLLMBackend:
    """See `base.Backend`. vLLM batches by itself, so it is asked for many responses at a time."""

    block, context, vocabulary = 4096, None, None

    def __init__(
        self, checkpoint: Path, settings: VLLMSettings, sampling: SamplingSettings, eos_ids: Sequence[int]
    ) -> None:
        try:
            import vllm
        except ImportError:
            raise UserError(
                "--backend vllm: vllm is not installed; install it in an environment of its own, since its versions of "
                "torch and transformers differ from Megatron's, or use --backend server or transformers"
            ) from None
        self._sampling_params, self._sampling, self._eos_ids = vllm.SamplingParams, sampling, list(eos_ids)
        self._model = vllm.LLM(
            model=str(checkpoint),
            tensor_parallel_size=settings.tensor_parallel_size,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            trust_remote_code=settings.trust_remote_code,
        )

    def about(self) -> dict[str, Any]:
        """See `base.Backend`."""
        return {"vllm": metadata.version("vllm")}

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """See `base.Backend`. Token ids are given, so vLLM adds no BOS."""
        sampling = self._sampling
        outputs = self._model.generate(
            [{"prompt_token_ids": list(request.ids)} for request in requests],
            [
                self._sampling_params(
                    n=1,
                    temperature=request.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k or -1,
                    max_tokens=sampling.max_new_tokens,
                    seed=request.seed,
                    stop_token_ids=self._eos_ids,
                )
                for request in requests
            ],
        )
        return [
            Response(output.outputs[0].text, str(output.outputs[0].finish_reason), len(output.outputs[0].token_ids))
            for output in outputs
        ]
