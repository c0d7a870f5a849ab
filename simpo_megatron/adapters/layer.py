"""The factors of one linear layer, and what they add to its output.

    LinearAdapter(entry, lora, ...).attach(linear)      # one of Megatron's layers or of Transformer Engine's

The parameters stand below the layer as `adapter.q_proj_a`, `adapter.q_proj_b` and so on. The names of the base weights
do not change. A grouped layer of experts has factors for each of them: `adapter.down_proj_a3`.

What is sent between the tensor-parallel ranks is as wide as the rank, not as the hidden size:

    column-parallel   A is whole and B is split by rows. A x is gathered from the parts of the sequence; without
                      sequence parallelism its gradient is summed.
    row-parallel      A is split by columns and B is whole. A x is summed, or summed and scattered over the sequence.
    experts           nothing is sent: the token dispatcher sums the outputs of the expert-tensor-parallel ranks, and
                      their gradients. The gradient of the whole factor is summed.

Under sequence parallelism a whole factor sees a part of the tokens. Megatron sums its gradient over the ranks, because
it has the attribute `sequence_parallel` (`distributed/finalize_model_grads.py`).

Dropout acts on the input of A, as in PEFT, with a mask for each projection. The ranks of a column-parallel layer draw
the same masks, because they have the same input and one A; under sequence parallelism they have other tokens, and in a
row-parallel layer other columns, and draw their own (`dropout.py`).

Shapes: T tokens of this rank, S those behind a gather, r rank, n targeted projections of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from simpo_megatron.adapters.dropout import Stream, kept
from simpo_megatron.adapters.lora import Lora, projections
from simpo_megatron.models.weight_table import WeightEntry


class LinearAdapter(torch.nn.Module):
    """The factors of one linear layer of a rank.

    Args:
        entry: of the base weight.
        lora: the adapter.
        group: the ranks that the layer is split over.
        sequence_parallel: whether each of these ranks has other tokens; not of experts.
        experts: of a grouped layer, how many it holds; None for a layer of one weight.
        like: the base weight, for dtype and device.

    Attributes:
        enabled: whether the factors add to the output of the layer.
        stream: of the random numbers of dropout; None without dropout.
    """

    def __init__(
        self,
        entry: WeightEntry,
        lora: Lora,
        *,
        group: Any,
        sequence_parallel: bool,
        experts: int | None,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.entry, self.scale, self.group = entry, lora.scale, group
        self.rank, self.dropout, self.enabled = lora.rank, lora.dropout, True
        self.of_experts, self.grouped = bool(entry.experts), experts is not None
        self.sequence_parallel = sequence_parallel and not self.of_experts
        same_input = entry.tp_dim == 0 and not self.sequence_parallel
        drawing = dist.get_process_group_ranks(group) if same_input else [dist.get_rank()]
        self.stream: Stream | None = tuple(drawing) if lora.dropout else None
        ranks = group.size()
        self.targets = [name for name in projections(entry) if name in lora.targets]
        for target, (rows, columns) in zip(projections(entry), entry.shapes, strict=True):
            if target not in self.targets:
                continue
            rows, columns = (rows // ranks, columns) if entry.tp_dim == 0 else (rows, columns // ranks)
            for suffix in [""] if experts is None else map(str, range(experts)):
                for factor, shape in (("a", (lora.rank, columns)), ("b", (rows, lora.rank))):
                    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
                    self.register_parameter(f"{target}_{factor}{suffix}", parameter)

    def attach(self, linear: torch.nn.Module) -> None:
        """Puts the factors below a layer, which then adds them to its output."""
        linear.add_module("adapter", self)
        if hasattr(linear, "return_layernorm_output"):  # the norm is inside of it, and A reads what the norm returns
            linear.return_layernorm_output = True  # type: ignore[assignment]
        linear.register_forward_hook(_add_adapter)

    def forward(self, x: Tensor, output: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        """The output of the layer with what the factors add.

        Args:
            x: [T, ..., in], the input of the base weight.
            output: [S, ..., out], the output of the layer.
            tokens: of every expert, of a grouped layer.
        """
        if not self.enabled:
            return output
        if not self.grouped:
            return output + self._delta(x, "")
        parts = x.split([int(count) for count in tokens or ()])
        return output + torch.cat([self._delta(part, str(expert)) for expert, part in enumerate(parts)])

    def _delta(self, x: Tensor, suffix: str) -> Tensor:
        """What the factors add."""
        first, *others = [getattr(self, f"{target}_a{suffix}") for target in self.targets]
        a = torch.cat([first, *others]) if others else first
        bs = [getattr(self, f"{target}_b{suffix}") for target in self.targets]
        return self._by_rows(x, a, bs) if self.entry.tp_dim == 0 else self._by_columns(x, a, bs[0])

    def _low(self, x: Tensor, a: Tensor) -> Tensor:
        """A x for all A, stacked in a [n * r, in]: one GEMM, but for dropout, which gives each another input.

        The tokens are one dimension here: of a tensor [T, 1, in] that was [1, T, in], torch would multiply each token
        alone where no gradient is needed.
        """
        tokens = x.flatten(0, -2)
        if self.stream is None or not self.training:
            low = F.linear(tokens, a)
        else:
            parts = [F.linear(tokens * kept(tokens, self.dropout, self.stream), part) for part in a.split(self.rank)]
            low = torch.cat(parts, dim=-1) / (1 - self.dropout)
        return low.unflatten(0, x.shape[:-1])

    def _by_rows(self, x: Tensor, a: Tensor, bs: list[Tensor]) -> Tensor:
        if self.of_experts:
            low = self._low(x, copy_to_tensor_model_parallel_region(a, group=self.group))
        elif self.sequence_parallel:
            low = gather_from_sequence_parallel_region(self._low(x, a), group=self.group)
        else:
            low = copy_to_tensor_model_parallel_region(self._low(x, a), group=self.group)
        found = dict(zip(self.targets, (low * self.scale).split(self.rank, dim=-1), strict=True))
        weights, ranks, parts = dict(zip(self.targets, bs, strict=True)), self.group.size(), []
        for target, rows in zip(projections(self.entry), self.entry.rows, strict=True):
            if target in found:
                parts.append(F.linear(found[target], weights[target]))
            else:
                parts.append(low.new_zeros(*low.shape[:-1], rows // ranks))
        return self.entry.part_layout.join(parts, ranks, dim=x.dim() - 1)

    def _by_columns(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = self._low(x, a)
        if self.of_experts:
            b = copy_to_tensor_model_parallel_region(b, group=self.group)
        elif self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        else:
            low = reduce_from_tensor_model_parallel_region(low, group=self.group)
        return F.linear(low * self.scale, b)


def _add_adapter(linear: torch.nn.Module, inputs: Any, outputs: Any) -> Any:
    """The forward hook of a layer with an adapter: Megatron's linear layers return the output and a bias.

    Transformer Engine's layer with its norm inside also returns the normalised input: behind a bias that it has left to
    the caller, else beside the output.
    """
    output, bias, *normed = outputs
    if isinstance(output, tuple):
        output, *normed = output
    x = normed[0] if normed else inputs[0]
    adapter: Any = linear.adapter
    return adapter(x, output, *inputs[1:2]), bias
