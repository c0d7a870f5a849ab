"""Matrix products, norms, rotary embedding and the kernels of the optimizers.

Arguments and results are those of the functions of the same name in `transformer_engine_torch`. Sums are in fp32, as on
a GPU. Where a function cannot do what it is asked, it raises NotImplementedError.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

# The values of transformer_engine.h: Python compares them with its own.
DType = enum.IntEnum(
    "DType",
    {
        "kByte": 0,
        "kInt32": 2,
        "kFloat32": 4,
        "kFloat16": 5,
        "kBFloat16": 6,
        "kFloat8E4M3": 7,
        "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
)
TORCH = {0: torch.uint8, 2: torch.int32, 4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


def only(possible: bool, what: str) -> None:
    """Raises NotImplementedError where a kernel is asked for more than stands here."""
    if not possible:
        raise NotImplementedError(f"Transformer Engine on a CPU has no {what}")


def _product(A: Tensor, transa: bool, B: Tensor, transb: bool) -> Tensor:
    """op(B) @ op(A) of row-major tensors. An untransposed B keeps its leading dimensions."""
    A = A.reshape(-1, A.shape[-1])
    A = A.t() if transa else A
    return B.reshape(-1, B.shape[-1]).t() @ A if transb else B @ A


def _put(out: Tensor, value: Tensor, accumulate: bool) -> None:
    value = value.to(out.dtype).view_as(out)
    out.add_(value) if accumulate else out.copy_(value)


def generic_gemm(A: Tensor, transa: bool, B: Tensor, transb: bool, D: Any, *rest: Any, **more: Any) -> Any:
    """One matrix product, with a bias or the gradient of one."""
    quantizer, out_dtype, bias, _, gelu, _, grad, _, _, accumulate = rest[:10]
    plain = more.get("alpha", 1.0) == 1.0 and more.get("beta") in (None, 0.0, 1.0) and more.get("comm_overlap") is None
    only(quantizer is None and not gelu and plain, "generic_gemm with quantizer, gelu, scaling or userbuffers")
    value, bias_grad = _product(A, transa, B, transb), None
    if bias is not None and grad:
        bias_grad = B.reshape(-1, B.shape[-1]).sum(0, dtype=torch.float32).to(bias.dtype)
    elif bias is not None:
        value = value + bias
    if D is None:
        D = value.to(A.dtype if out_dtype is None else TORCH[int(out_dtype)])
    else:
        _put(D, value, accumulate)
    return D, bias_grad, None, None


def te_general_grouped_gemm(A: Any, transa: bool, B: Any, transb: bool, D: Any, *rest: Any) -> Any:
    """A matrix product for each expert. An expert may have no tokens."""
    _, _, bias, _, single_output, _, grad, _, _, accumulate = rest[:10]
    outs = D
    if single_output:
        outs = D[0].reshape(-1, D[0].shape[-1]).split([len(b) for b in B])
    for a, b, out, offset in zip(A, B, outs, bias, strict=True):
        value = _product(a, transa, b, transb)
        if offset.numel() and grad:
            offset.copy_(b.reshape(-1, b.shape[-1]).sum(0))
        elif offset.numel():
            value = value + offset
        _put(out, value, accumulate)
    return bias


def rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, out: Any, *rest: Any) -> Any:
    """Returns the normalised rows, None, and the inverse root mean squares."""
    quantizer, dtype, _, zero_centered = rest
    only(quantizer is None, "rmsnorm_fwd with quantizer")
    rows = x.float().reshape(-1, x.shape[-1])
    inverse = torch.rsqrt(rows.square().mean(-1) + eps)
    y = (rows * inverse[:, None] * (weight.float() + int(zero_centered))).to(TORCH[int(dtype)]).view(x.shape)
    return (y if out is None else out.copy_(y)), None, inverse


def rmsnorm_bwd(dy: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, margin: int, zero_centered: bool) -> Any:
    """The gradients of the rows and of the weight."""
    grad, rows = dy.float().reshape(-1, dy.shape[-1]), x.float().reshape(-1, x.shape[-1])
    normal, scaled = rows * inverse[:, None], grad * (weight.float() + int(zero_centered))
    dx = inverse[:, None] * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype).view(x.shape), (grad * normal).sum(0).to(weight.dtype)


def _positions(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """The position in its sequence of each token that a context-parallel rank holds; cu_seqlens are of whole rows."""
    found = []
    for length in cu_seqlens.diff().tolist():
        half = length // (2 * cp_size)
        starts = (0,) if cp_size == 1 else (cp_rank * half, (2 * cp_size - 1 - cp_rank) * half)
        found += [torch.arange(start, start + (length if cp_size == 1 else half)) for start in starts]
    return torch.cat(found)


def _rotated(x: Tensor, freqs: Tensor, start: Any, interleaved: bool, cu_seqlens: Tensor, cp: Any, sign: int) -> Tensor:
    only(start is None and not interleaved and cu_seqlens is not None, "rotary embedding but for packed rows")
    angles = freqs[_positions(cu_seqlens, *cp)].reshape(len(x), 1, -1).float()
    rotary, rest = x[..., : angles.shape[-1]].float(), x[..., angles.shape[-1] :]
    first, second = rotary.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return torch.cat(((rotary * angles.cos() + sign * turned * angles.sin()).to(x.dtype), rest), -1)


def fused_rope_forward(
    x: Tensor, freqs: Tensor, start: Any, layout: Any, interleaved: bool, cu: Any, *cp: int
) -> Tensor:
    """Rotary embedding of packed rows."""
    return _rotated(x, freqs, start, interleaved, cu, cp, 1)


def fused_rope_backward(
    grad: Tensor, freqs: Tensor, start: Any, layout: Any, interleaved: bool, cu: Any, *cp: int
) -> Tensor:
    """Its gradient: the rotation by the opposite angle."""
    return _rotated(grad, freqs, start, interleaved, cu, cp, -1)


def multi_tensor_scale(chunk: int, overflow: Tensor, lists: Any, scale: float) -> None:
    """Copies with a factor, and notes what is not finite."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)
        if not torch.isfinite(source).all():
            overflow.fill_(1)


def multi_tensor_l2norm(chunk: int, overflow: Tensor, lists: Any, per_tensor: bool = False) -> Any:
    """The norm of all tensors as one vector, and of each."""
    norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in lists[0]])
    return torch.linalg.vector_norm(norms)[None], norms if per_tensor else norms[:0]


def multi_tensor_adam(chunk: int, overflow: Tensor, lists: Any, *settings: Any) -> None:
    """A step of Adam (mode 0) or AdamW (mode 1), with fp32 copies of the parameters where they are given."""
    lr, beta1, beta2, eps, step, mode, bias_correction, decay = settings
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, parameter, mean, square, *master in zip(*lists, strict=True):
        value = (master[0] if master else parameter).float()
        slope = grad.float() + (decay * value if mode == 0 else 0)
        mean.copy_(beta1 * mean.float() + (1 - beta1) * slope)
        square.copy_(beta2 * square.float() + (1 - beta2) * slope.square())
        change = (mean.float() / first) / ((square.float() / second).sqrt() + eps)
        value = value - lr * (change + (decay * value if mode == 1 else 0))
        for target in (parameter, *master):
            target.copy_(value)


def multi_tensor_adam_param_remainder(chunk: int, overflow: Tensor, lists: Any, *settings: Any) -> None:
    """The same with fp32 weights as bf16 weights and the 16 bits that they lack.

    A bf16 weight is the upper half of the bits, and 1 more where the lower half is negative as an int16.
    """
    for *others, weight, mean, square, rest in zip(*lists, strict=True):
        bits = (weight.view(torch.int16).int() - (rest < 0).int()) * 2**16 + rest.int() % 2**16
        whole = bits.view(torch.float32)
        multi_tensor_adam(chunk, overflow, [[x] for x in (*others, whole, mean, square)], *settings)
        rest.copy_(bits.short())
        weight.view(torch.int16).copy_(((bits - rest.int()) // 2**16).short())


def get_num_cublas_streams() -> int:
    """How many streams a grouped product uses."""
    return 1


def get_cudnn_version() -> int:
    """A release of cuDNN with all features of attention."""
    return 91200


def get_cublasLt_version() -> int:
    """A release of cuBLAS with all features of products."""
    return 120000


def _fp8(quantizer: Any) -> torch.dtype:
    only(type(quantizer).__name__ == "Float8Quantizer", type(quantizer).__name__)
    return {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}[int(quantizer.dtype)]


def create_empty_quantized_tensor(quantizer: Any, shape: Any, dtype: Any, device: Any, pin: bool) -> Any:
    """A tensor of FP8 numbers with one scale, without the transposed copy that a Hopper needs for products."""
    _fp8(quantizer)
    return quantizer.create_tensor_from_data(torch.zeros(shape, dtype=torch.uint8), dtype)


def quantize(tensor: Tensor, quantizer: Any, output: Any, noop: Any) -> Any:
    """FP8 numbers of a tensor, by the scale of the quantizer, written into a tensor that is there."""
    only(noop is None, "quantize with noop")
    dtype = _fp8(quantizer)
    limit = torch.finfo(dtype).max
    output._data.copy_((tensor.float() * quantizer.scale).clamp(-limit, limit).to(dtype).view(torch.uint8))
    output._scale_inv.copy_(1 / quantizer.scale)
    return output
