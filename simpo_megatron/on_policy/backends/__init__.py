"""What generates responses, by its name in `--backend`. A new one is a file, its settings and a line in `BACKENDS`.

base.py                   the interface
settings.py               the settings of each
transformers_backend.py   transformers, anywhere
vllm_backend.py           vLLM's offline interface
server.py                 a server with OpenAI's interface
"""

from __future__ import annotations

from simpo_megatron.on_policy.backends.settings import ServerSettings, TransformersSettings, VLLMSettings
from simpo_megatron.on_policy.registry import Entry

BACKENDS = {
    "transformers": Entry(TransformersSettings, f"{__name__}.transformers_backend", "TransformersBackend"),
    "vllm": Entry(VLLMSettings, f"{__name__}.vllm_backend", "VLLMBackend"),
    "server": Entry(ServerSettings, f"{__name__}.server", "ServerBackend"),
}
