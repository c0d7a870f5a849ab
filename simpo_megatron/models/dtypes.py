"""The dtypes a checkpoint may have, by the names of safetensors."""

from __future__ import annotations

import torch

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
