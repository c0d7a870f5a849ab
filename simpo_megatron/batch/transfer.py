"""The arrays of a microbatch, sent from the host to the device in one copy that the host does not wait for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simpo_megatron.parallel.context import round_up

_ALIGNMENT = 256  # bytes; kernels may read a tensor in wide words


def send(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Copies arrays to a device, in one buffer. For a GPU the buffer is pinned, so that the copy runs on its own.

    Args:
        arrays: by name; any shape and dtype.
        device: where the tensors go.

    Returns:
        The tensors by name: views of one buffer on the device.
    """
    ends = np.cumsum([round_up(array.nbytes, _ALIGNMENT) for array in arrays.values()]).tolist()
    starts = dict(zip(arrays, [0, *ends], strict=False))
    host = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    _views(host, arrays, starts, fill=True)
    return _views(host.to(device, non_blocking=True), arrays, starts)


def _views(
    buffer: Tensor, arrays: dict[str, np.ndarray], starts: dict[str, int], fill: bool = False
) -> dict[str, Tensor]:
    """The part of a buffer that belongs to each array, in its shape and dtype; with `fill` it is filled."""
    views = {}
    for name, array in arrays.items():
        source = torch.from_numpy(np.ascontiguousarray(array))
        part = buffer[starts[name] : starts[name] + array.nbytes].view(source.dtype).view(source.shape)
        views[name] = part.copy_(source) if fill else part
    return views
