"""Fused attention of packed rows (thd), forward and backward: what bf16 training and ring attention run on a GPU.

The two releases call it with different arguments; `_FORWARD` and `_BACKWARD` name them in order. Rows of padding
between sequences stay zero.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.kernels import only

_COMMON = "cu_q cu_kv q k v"
_FORWARD = {
    False: f"max_q max_kv training scale dropout fill layout bias_type mask softmax window {_COMMON} dtype padded_q "
    "padded_kv page_k page_v s o bias",
    True: "max_q max_kv training scale dropout fill layout out_format scale_format bias_type mask softmax window "
    f"bottom_right {_COMMON} dtype padded_q padded_kv page_k page_v s o bias",
}
_BACKWARD = {
    False: f"max_q max_kv scale dropout fill layout bias_type mask softmax window deterministic {_COMMON} o do dtype "
    "out_dtype aux padded_q padded_kv",
    True: "max_q max_kv scale dropout fill layout out_format do_format d_layout scale_format do_scale_format bias_type "
    f"mask softmax window bottom_right deterministic {_COMMON} o do dtype aux padded_q padded_kv",
}


class NVTE_Mask_Type(enum.IntEnum):
    """Which keys a query sees. The values are of this package."""

    NVTE_NO_MASK = 0
    NVTE_PADDING_MASK = 1
    NVTE_CAUSAL_MASK = 2
    NVTE_PADDING_CAUSAL_MASK = 3
    NVTE_CAUSAL_BOTTOM_RIGHT_MASK = 4
    NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK = 5


def functions(new: bool, thd: Any) -> dict[str, Any]:
    """The functions and types of attention.

    Args:
        new: whether the release is newer than 2.15.
        thd: the layout of separate packed q, k and v, in the extension's own enum.
    """
    names = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    backends = enum.IntEnum("NVTE_Fused_Attn_Backend", names if new else {**names, "NVTE_F16_max512_seqlen": 0})

    def get_fused_attn_backend(*asked: Any) -> Any:
        layout, dropout = (asked[0].qkv_layout, asked[0].dropout) if new else (asked[3], asked[7])
        possible = layout == thd and not dropout
        found = backends(1 if possible else -1)
        return (found, "" if possible else "only packed rows without dropout") if new else found

    def fused_attn_fwd(*args: Any) -> list[Tensor]:
        return _forward(_named(_FORWARD[new], args, thd))

    def fused_attn_bwd(*args: Any) -> list[Any]:
        return _backward(_named(_BACKWARD[new], args, thd))

    return {
        "NVTE_Mask_Type": NVTE_Mask_Type,
        "NVTE_Fused_Attn_Backend": backends,
        "get_fused_attn_backend": get_fused_attn_backend,
        "fused_attn_fwd": fused_attn_fwd,
        "fused_attn_bwd": fused_attn_bwd,
    }


def _named(names: str, args: Any, thd: Any) -> SimpleNamespace:
    call = SimpleNamespace(**{"bottom_right": False, "bias": None, **dict(zip(names.split(), args, strict=False))})
    only(call.layout == thd and not call.dropout and call.bias is None, "fused attention but for packed rows")
    return call


def _heads(x: Tensor, heads: int) -> Tensor:
    """[t, groups, d] -> [heads, t, d] in fp32: each key or value once for each query head of its group."""
    return x.float().transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)


def _sequences(call: SimpleNamespace) -> Iterator[tuple[slice, slice]]:
    """The rows of the queries and of the keys of each sequence."""
    starts_q = (call.cu_q if call.padded_q is None else call.padded_q).tolist()
    starts_kv = (call.cu_kv if call.padded_kv is None else call.padded_kv).tolist()
    for i, (n, m) in enumerate(zip(call.cu_q.diff().tolist(), call.cu_kv.diff().tolist(), strict=True)):
        if n:
            yield slice(starts_q[i], starts_q[i] + n), slice(starts_kv[i], starts_kv[i] + m)


def _scores(call: SimpleNamespace, rows: slice, keys: slice) -> Tensor:
    """Scaled scores [heads, queries, keys]; -inf where a query does not see a key."""
    heads = call.q.shape[1]
    scores = _heads(call.q[rows], heads) @ _heads(call.k[keys], heads).transpose(1, 2) * call.scale
    n, m = scores.shape[1:]
    aligned = call.mask >= NVTE_Mask_Type.NVTE_CAUSAL_BOTTOM_RIGHT_MASK
    distance = torch.arange(n)[:, None] + (m - n if aligned or call.bottom_right else 0) - torch.arange(m)
    left, right = call.window
    if call.mask >= NVTE_Mask_Type.NVTE_CAUSAL_MASK:
        right = 0
    hidden = ((distance > left) if left >= 0 else False) | ((distance < -right) if right >= 0 else False)
    return scores.masked_fill(hidden, float("-inf")) if isinstance(hidden, Tensor) else scores


def _forward(call: SimpleNamespace) -> list[Tensor]:
    heads = call.q.shape[1]
    out = call.q.new_zeros(*call.q.shape[:-1], call.v.shape[-1])
    stats = call.q.new_zeros(len(call.q), heads, 1, dtype=torch.float32)
    for rows, keys in _sequences(call):
        scores = _scores(call, rows, keys)
        lse = scores.logsumexp(-1, keepdim=True)
        out[rows] = ((scores - lse).exp() @ _heads(call.v[keys], heads)).transpose(0, 1).to(out.dtype)
        stats[rows] = lse.transpose(0, 1)
    return [out, stats, torch.zeros(2, dtype=torch.int64)]


def _backward(call: SimpleNamespace) -> list[Any]:
    heads, groups, stats = call.q.shape[1], call.k.shape[1], call.aux[0]
    o, do = (x.reshape(*call.q.shape[:-1], -1) for x in (call.o, call.do))
    grads = [torch.zeros_like(x) for x in (call.q, call.k, call.v)]
    for rows, keys in _sequences(call):
        q, o_, do_ = (_heads(x[rows], heads) for x in (call.q, o, do))
        k, v = (_heads(x[keys], heads) for x in (call.k, call.v))
        p = (_scores(call, rows, keys) - stats[rows].transpose(0, 1)).exp()
        ds = p * (do_ @ v.transpose(1, 2) - (do_ * o_).sum(-1, keepdim=True)) * call.scale
        found = (ds @ k, *(x.unflatten(0, (groups, -1)).sum(1) for x in (ds.mT @ q, p.mT @ do_)))
        for grad, span, value in zip(grads, (rows, keys, keys), found, strict=True):
            grad[span] = value.transpose(0, 1).to(grad.dtype)
    return [*grads, None, None]
