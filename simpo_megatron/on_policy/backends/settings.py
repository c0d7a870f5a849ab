"""The settings of the backends. They need neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simpo_megatron.on_policy.http_client import Client
from simpo_megatron.settings import Group, required, setting


@dataclass(frozen=True, kw_only=True)
class LocalSettings(Group):
    """Settings of a backend that loads the model itself."""

    trust_remote_code: bool = setting(False, "run Python code that the checkpoint's folder holds")


@dataclass(frozen=True, kw_only=True)
class TransformersSettings(LocalSettings):
    """Generation with transformers."""

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU if there is one")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", "auto: bfloat16 on a GPU, float32 on a CPU")
    batch_size: int | None = setting(None, "responses generated at a time; by default what fits the free memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("batch_size")


@dataclass(frozen=True, kw_only=True)
class VLLMSettings(LocalSettings):
    """Generation with vLLM."""

    tensor_parallel_size: int = setting(1, "GPUs that share the model")
    gpu_memory_utilization: float = setting(0.9, "share of the GPU's memory that vLLM takes")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positive("tensor_parallel_size", "gpu_memory_utilization")


@dataclass(frozen=True, kw_only=True)
class ServerSettings(Group):
    """A server with OpenAI's interface. Its key, if it wants one, is the environment variable OPENAI_API_KEY."""

    server_url: str | None = setting(None, "address, such as http://localhost:8000/v1", "URL")
    server_model: str | None = setting(None, "the model's name there; by default the first that the server lists")
    server_api: Literal["completions", "chat"] = setting(
        "completions", "completions: sends token ids; chat: sends messages, which the server's own template writes"
    )
    concurrency: int = setting(32, "requests at a time")
    timeout: float = setting(600.0, "seconds that a request may take", "SECONDS")
    retries: int = setting(5, "times that a request is sent again after a failure, with growing pauses")

    def __post_init__(self) -> None:
        super().__post_init__()
        required(self.server_url, "--backend server needs --server-url, such as http://localhost:8000/v1")
        self.positive("concurrency", "timeout")
        self.not_negative("retries")

    def client(self) -> Client:
        """A client of the server.

        Raises:
            UserError: the address is none.
        """
        return Client("--server-url", str(self.server_url), self.timeout, self.retries)
