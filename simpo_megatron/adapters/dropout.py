"""Dropout on the input of an adapter: which elements are kept, and which ranks keep the same.

    start_streams(streams, device, seed, position)     # before each step
    mask = kept(x, probability, stream)                # on every rank of the stream, in the same order

Ranks draw from a stream of random numbers that has the seed and the position of the run, and their own numbers, as its
seed. Ranks with the same input and one A share a stream, and so their masks; ranks with other tokens or other columns
of the input have streams of their own. Nothing of this is in a checkpoint: a run that is resumed starts the streams of
its next step as the run without an end would have.

The states of the streams are kept by Megatron's tracker. Its recomputation of layers puts back what the tracker held in
the forward pass, so the same elements are kept again. Its `fork` is not used: it changes the generator of the device,
and warns on a CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

Stream = tuple[int, ...]  # the ranks that draw the same numbers


def start_streams(streams: Iterable[Stream], device: torch.device, seed: int, position: int) -> None:
    """Sets the streams of this rank to where a step starts.

    Args:
        streams: of this rank's adapters.
        device: where the masks are drawn.
        seed: of the run.
        position: of the step in the run.
    """
    tracker: Any = get_cuda_rng_tracker()
    generator = torch.Generator(device)
    states = tracker.get_states()
    for ranks in streams:
        digest = hashlib.sha256(f"{seed} {position} {ranks}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        states[_name(ranks)] = generator.get_state()
    tracker.set_states(states)


def kept(x: Tensor, probability: float, stream: Stream) -> Tensor:
    """Draws which elements of a tensor stay.

    Args:
        x: of any shape.
        probability: with which an element is dropped.
        stream: started by `start_streams`.

    Returns:
        A mask of the shape of x, bool.
    """
    tracker: Any = get_cuda_rng_tracker()
    generator = torch.Generator(x.device)
    states = tracker.get_states()
    generator.set_state(states[_name(stream)])
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - probability, generator=generator)
    states[_name(stream)] = generator.get_state()
    tracker.set_states(states)
    return mask


def _name(stream: Stream) -> str:
    return f"adapter dropout {stream}"
