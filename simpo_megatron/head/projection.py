"""The three GEMMs of the head: the logits of some positions, and from the logits' gradient the two gradients.

Both gradients are summed in fp32 over all slabs (in fp64 for fp64 weights), whatever the processor.

Where one GEMM cannot add a product of bf16 matrices to an fp32 gradient, the vocabulary is worked on in tiles, so that
neither a product nor a copy of the size of the whole weight is held:

* CUDA with torch 2.8 or 2.9: the product of a tile is made in fp32 and then added.
* CUDA with an older torch: a tile of each matrix is cast to fp32 first.
* A CPU with bf16 arithmetic: the product of a tile is rounded to bf16 and then added. torch has no GEMM from bf16 to
  fp32 there, and fp32 takes three times as long.
* A CPU without bf16 arithmetic: a tile of the weight is cast to fp32 first, and the logits are fp32. torch's emulation
  of bf16 is several times slower and less exact.

Shapes: N positions, R all scored positions of this rank, H hidden, V columns of this tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simpo_megatron.compat import fp32_products, have_native_bf16

_TILE_BYTES = 32 * 2**20  # of the weight in fp32


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of `dtype` are kept in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass
class Gradients:
    """Where one pass writes its gradients.

    Attributes:
        hidden_RH: gradient of the scored positions' hidden states; None if it is not needed.
        weight_VH: the pass adds the gradient of the weight to it; None if it is not needed.
        factor: both gradients are multiplied by this number.
    """

    hidden_RH: Tensor | None
    weight_VH: Tensor | None
    factor: float

    @classmethod
    def of(
        cls, hidden_RH: Tensor | None, weight_VH: Tensor | None, main_grad: Tensor | None, factor: float
    ) -> Gradients:
        """Allocates the gradients of a pass, in fp32 (fp64 for fp64).

        Args:
            hidden_RH: the hidden states; None if their gradient is not needed.
            weight_VH: the weight; None if its gradient is not needed.
            main_grad: Megatron's gradient buffer of the weight, which then is used; None to allocate one.
            factor: see the class.
        """
        hidden = weight = None
        if hidden_RH is not None:
            hidden = torch.empty(hidden_RH.shape, dtype=accumulator(hidden_RH.dtype), device=hidden_RH.device)
        if weight_VH is not None and main_grad is None:
            weight = torch.zeros(weight_VH.shape, dtype=accumulator(weight_VH.dtype), device=weight_VH.device)
        return cls(hidden, weight if main_grad is None else main_grad, factor)


class Projection:
    """The output layer's weight, and the GEMMs with it.

    Attributes:
        dtype: of the logits.
        way: how products are added to the gradients, from `_way`.
    """

    def __init__(self, weight_VH: Tensor, gradients: Gradients | None) -> None:
        """Chooses dtype and tiles.

        Args:
            weight_VH: the columns of the vocabulary that are real, without padding; V may be 0.
            gradients: where `add_gradients` writes; None if it is not called.
        """
        columns, hidden = weight_VH.shape
        self.way = _way(weight_VH)
        emulated = self.way == "emulate"
        self.weight_VH, self.gradients = weight_VH, gradients
        self.dtype = torch.float32 if emulated else weight_VH.dtype
        in_tiles = self.way not in ("same", "addmm")
        size = max(1, min(_TILE_BYTES // (4 * hidden), columns)) if in_tiles else max(1, columns)
        self.tiles = [slice(start, min(start + size, columns)) for start in range(0, columns, size)]
        self.cast = torch.empty(size if emulated else 0, hidden, dtype=self.dtype, device=weight_VH.device)

    def _tile(self, tile: slice) -> Tensor:
        """A tile of the weight, in the dtype of the logits."""
        weight = self.weight_VH[tile]
        return weight if weight.dtype == self.dtype else self.cast[: len(weight)].copy_(weight)

    def logits(self, hidden_NH: Tensor, out_NV: Tensor) -> None:
        """Writes the logits of some positions to `out_NV`."""
        hidden_NH = hidden_NH.to(self.dtype)
        for tile in self.tiles:
            torch.mm(hidden_NH, self._tile(tile).t(), out=out_NV[:, tile])

    def add_gradients(self, grad_NV: Tensor, hidden_RH: Tensor, part: slice) -> None:
        """Writes the gradient of some positions' hidden states, and adds their share in the gradient of the weight.

        Args:
            grad_NV: the gradient of the positions' logits.
            hidden_RH: the hidden states of all scored positions.
            part: which of them, N.
        """
        assert self.gradients is not None
        grad_hidden, grad_weight = self.gradients.hidden_RH, self.gradients.weight_VH
        hidden_NH = hidden_RH[part].to(self.dtype)
        if grad_hidden is not None and not self.tiles:
            grad_hidden[part] = 0
        for tile in self.tiles:
            if grad_hidden is not None:
                _multiply(grad_hidden[part], grad_NV[:, tile], self._tile(tile), add=tile.start > 0, way=self.way)
            if grad_weight is not None:
                _multiply(grad_weight[tile], grad_NV[:, tile].t(), hidden_NH, add=True, way=self.way)


def _way(weight_VH: Tensor) -> str:
    """How products with a weight are added to gradients.

    Returns:
        `same`: weight and gradients have one dtype. Else the weight is bf16, and it is `addmm`, `mm` or `cast` on a GPU
        (see `compat.fp32_products`), and `round` or `emulate` on a CPU with or without bf16 arithmetic.
    """
    if accumulator(weight_VH.dtype) == weight_VH.dtype:
        return "same"
    if weight_VH.is_cuda:
        return fp32_products(weight_VH.device)
    return "round" if have_native_bf16() else "emulate"


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool, way: str) -> None:
    """Computes out = a @ b, or out += a @ b, in the way that `_way` names."""
    if way == "addmm":
        torch.addmm(out, a, b, beta=int(add), out_dtype=out.dtype, out=out)
    elif way in ("mm", "round"):
        product = torch.mm(a, b, out_dtype=out.dtype) if way == "mm" else torch.mm(a, b)
        out.add_(product) if add else out.copy_(product)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)
