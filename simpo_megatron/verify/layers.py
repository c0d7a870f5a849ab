"""Compares a Megatron checkpoint with its Hugging Face source, layer by layer, in fp32.

Both run every layer on the hidden states that transformers computed for the layer below. So an error shows in the layer
that makes it. Only one layer of each side is in memory at a time. Megatron's side is a model of one layer in this
process.

Shapes: n tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from simpo_megatron import cpu
from simpo_megatron.checkpoint.parameters import StoredModel, StoredParameter
from simpo_megatron.checkpoint.transfer.cut import whole_parameter
from simpo_megatron.checkpoint.transfer.execute import Files, read_rect
from simpo_megatron.models.dtypes import TORCH
from simpo_megatron.models.hf_checkpoint import HFCheckpoint

TOLERANCE = 1e-5  # relative to the largest value, in fp32
TOKENS = 48  # random ids that run through both
SHOWN = 5  # layers in the table if all agree


def compare_forward(hf: HFCheckpoint, saved: StoredModel, tolerance: float = TOLERANCE) -> int:
    """Compares, and prints a table. It makes a process group of one process for Megatron and removes it again.

    Args:
        hf: the source, which transformers runs.
        saved: the Megatron checkpoint.
        tolerance: the largest difference that passes, divided by the largest value.

    Returns:
        0 if the embedding, every layer and the logits agree, else 1.
    """
    errors = [
        (name, error)
        for name, error in track(_errors(hf, saved), "forward", total=hf.architecture.num_layers + 2, transient=True)
    ]
    wrong = [(name, error) for name, error in errors if not error <= tolerance]
    table = Table("computed by", "relative difference", "")
    for name, error in wrong or sorted(errors, key=lambda entry: -entry[1])[:SHOWN]:
        table.add_row(name, f"{error:.1e}", "WRONG" if not error <= tolerance else "ok")
    Console(soft_wrap=True).print(table)
    print(
        f"{len(wrong)} of {len(errors)} differ, the first is {wrong[0][0]}"
        if wrong
        else f"{hf.architecture.num_layers} layers, embedding and logits compute the same"
    )
    return 1 if wrong else 0


@torch.no_grad()
def _errors(hf: HFCheckpoint, saved: StoredModel) -> Iterator[tuple[str, float]]:
    """Yields name and relative difference of the embedding, of every layer and of the logits."""
    from simpo_megatron.verify.reference import Reference

    cpu.enable()
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        ids = torch.randint(hf.architecture.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
        reference, ours = Reference(hf, torch.float32, "cpu"), _OneLayer(hf, saved)
        hidden = reference.embed(ids)
        yield "embedding", _difference(ours.embed(ids), hidden)
        for layer in range(hf.architecture.num_layers):
            above = reference.layer(layer, hidden)
            yield f"layer {layer}", _difference(ours.layer(layer, hidden), above)
            hidden = above
        yield "logits", _difference(ours.logits(hidden), reference.logits(hidden))
    finally:
        _leave()


def _leave() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


class _OneLayer:
    """Megatron's model without its other layers, for one layer at a time. Its weights are read when it runs."""

    def __init__(self, hf: HFCheckpoint, saved: StoredModel) -> None:
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        self.hf = hf
        self.stored = {
            (stored.parameter.entry.megatron, stored.parameter.layer, stored.parameter.expert): stored
            for stored in saved.parameters
        }
        self.built, self.model = self._build(0)

    def _build(self, layer: int) -> tuple[HFCheckpoint, Any]:
        from dataclasses import replace

        from simpo_megatron.models.build import build_model, transformer_config

        hf = replace(self.hf, architecture=self.hf.architecture.only(layer))
        [model] = build_model(hf, transformer_config(hf, bf16=False), transformer_impl="local")
        return hf, model.eval()

    def _fill(self, layer: int | None) -> None:
        """Reads the parameters of a layer into the model; None: those outside the layers."""
        from simpo_megatron.models.placement import place_parameters

        table, tied = self.built.architecture.weights, self.built.architecture.tied
        for place in place_parameters(self.model, table, tied=tied):
            if (place.layer is None) == (layer is None):
                stored = self.stored[place.entry.megatron, layer or 0, place.expert or 0]
                _read_into(stored, place.parameter)

    def embed(self, ids: Tensor) -> Tensor:
        """The embedding of ids [n]: [1, n, H]."""
        self._fill(None)
        return self.model.embedding(ids[None], torch.arange(len(ids))[None]).transpose(0, 1)

    def layer(self, layer: int, hidden: Tensor) -> Tensor:
        """The output [1, n, H] of a layer for hidden states [1, n, H]."""
        if self.hf.architecture.only(layer) != self.built.architecture:  # a layer of another kind
            self.built, self.model = self._build(layer)
        self._fill(layer)
        rotary = getattr(self.model, "rotary_pos_emb", None)  # latent attention has its own
        rotary = None if rotary is None else rotary(hidden.shape[1])
        above = self.model.decoder.layers[0](hidden.transpose(0, 1).contiguous(), None, rotary_pos_emb=rotary)
        return above[0].transpose(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits [1, n, V] of the last hidden states [1, n, H]."""
        self._fill(None)
        normed = self.model.decoder.final_layernorm(hidden.transpose(0, 1).contiguous())
        weight = self.model.shared_embedding_or_output_weight() if self.hf.architecture.tied else None
        logits, _ = self.model.output_layer(normed, weight=weight)
        return logits.transpose(0, 1)[..., : self.hf.architecture.vocab_size]


def _read_into(stored: StoredParameter, parameter: Tensor) -> None:
    import numpy as np

    item, files = stored.parameter, Files(None)
    buffer = np.zeros(item.size, np.uint8)
    try:
        for rect in whole_parameter(stored):
            read_rect(files, rect, buffer)
    finally:
        files.close()
    tensor = torch.from_numpy(buffer).view(TORCH[item.dtype]).view(item.shape)
    parameter.data.zero_()
    parameter.data[: item.rows].copy_(tensor)
