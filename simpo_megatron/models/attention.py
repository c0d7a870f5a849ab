"""Causal attention within each sequence of a packed row, on plain torch, also under context parallelism.

It replaces Megatron's `DotProductAttention`, which refuses packed sequences and context parallelism. Under context
parallelism every rank gathers all keys and values of the row and attends with the queries of its own slices
(`parallel/context.py`).

Collectives of one layer under context parallelism: one all-gather in the forward pass, one reduce-scatter in the
backward pass.

Shapes: T tokens of this rank; n tokens of one sequence; S positions and B sequences where nothing is packed; H query
heads and G key heads of this rank; D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from simpo_megatron.errors import UserError
from simpo_megatron.models import attention_blocks
from simpo_megatron.models.attention_blocks import BlockAttention, Scores, blocks_of
from simpo_megatron.models.rotary import has_window
from simpo_megatron.models.shared_prompts import SharedPromptParams
from simpo_megatron.parallel.context import positions, zigzag_slices


class PackedAttention(torch.nn.Module):
    """Attention with the signature of Megatron's DotProductAttention.

    Torch's scaled dot-product attention is called once for every sequence, so the cost grows with the lengths of the
    sequences, not with the length of the row. With `softcap` scores are bounded by `softcap * tanh(score / softcap)`
    before the mask. With `softmax_type` "learnable" every query head has a sink. A layer has the window of `config`
    unless `window_attn_skip_freq` leaves it out. The attention mask is ignored, as Transformer Engine ignores it for
    causal attention: it, `attn_mask_type` and `cp_comm_type` change nothing. Any other keyword is an error, because
    ignoring it could change what is computed.

    Raises:
        UserError: when built, for attention dropout or cross attention, which this attention does not have.
    """

    def __init__(  # noqa: PLR0913 (Megatron's arguments, and one of ours)
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise UserError(f"attention_dropout {config.attention_dropout} needs Transformer Engine; set it to 0")
        if attention_type != "self":
            raise UserError(f"attention_type {attention_type!r} is not supported; only self attention runs here")
        self.scale, self.softcap = softmax_scale, softcap
        self.window = config.window_size[0] + 1 if config.window_size and has_window(config, layer_number) else None
        # The name of the sinks in Megatron's attention and in Transformer Engine's.
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            sinks = torch.empty(heads, dtype=config.params_dtype, device=torch.cuda.current_device())
            self.softmax_offset = torch.nn.Parameter(sinks)
        self.cp_group: Any = None
        if config.context_parallel_size > 1:
            self.cp_group = parallel_state.get_context_parallel_group() if pg_collection is None else pg_collection.cp

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """What a checkpoint has of it: the sinks, split over the tensor-parallel ranks."""
        del metadata
        state, axes = self.state_dict(keep_vars=True), {"softmax_offset": 0}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Every query attends to the keys before it in its own sequence.

        Args:
            query: [T, H, D] packed, [S, B, H, D] otherwise, any float dtype.
            key: the same with G heads.
            value: the same with G heads; of any width.
            attention_mask: ignored.
            attn_mask_type: ignored.
            attention_bias: ignored.
            packed_seq_params: where the sequences of the whole row start. Padded offsets win, as they do for the rotary
                embedding.

        Returns:
            [T, H * D] packed, [S, B, H * D] otherwise, in the dtype of query.

        Raises:
            ValueError: the offsets do not fit the row, or there is no packed row under context parallelism.
        """
        size, rank = (1, 0) if self.cp_group is None else (self.cp_group.size(), self.cp_group.rank())
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            if size > 1:
                raise ValueError("context parallelism needs a packed row: pass packed_seq_params of the format thd")
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            out_BHSD = self._attend(q, k, v, 0)
            return out_BHSD.permute(2, 0, 1, 3).flatten(2)
        offsets, order = _row_layout(packed_seq_params, size)
        if offsets[-1] != size * query.shape[0]:
            raise ValueError(f"cu_seqlens end at {offsets[-1]}, but the row has {size * query.shape[0]} tokens")
        if order is not None:
            widths = (key.shape[-1], value.shape[-1])
            gathered: Any = gather_from_sequence_parallel_region(torch.cat((key, value), -1), group=self.cp_group)
            key, value = gathered.index_select(0, order).split(widths, -1)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, H, tokens, D]
        if isinstance(packed_seq_params, SharedPromptParams):
            outs = self._attend_pairs(q, k, v, offsets, packed_seq_params.splits)
        else:
            outs = [
                self._attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], at).transpose(1, 2)
                for queries, keys, at in _pieces(offsets, size, rank)
            ]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return out.squeeze(0).flatten(1)

    def _attend_pairs(
        self, q: Tensor, k: Tensor, v: Tensor, offsets: list[int], splits: tuple[tuple[int, int], ...]
    ) -> list[Tensor]:
        """Attention in rows with shared prompts.

        For every pair, prompt and chosen response are one sequence. Then the rejected response attends to the same
        prompt.

        Args:
            q: [1, H, T, D].
            k: [1, G, T, D].
            v: [1, G, T, D].
            offsets: where the pairs start, and the end of the last.
            splits: as in `SharedPromptParams`.

        Returns:
            Pieces [1, n, H, D] of the output, in the order of the row.
        """
        outs = []
        for i, (start, stop) in enumerate(pairwise(offsets)):
            prompt, chosen = splits[i] if i < len(splits) else (0, stop - start)
            answered, rejected = slice(start, start + prompt + chosen), slice(start + prompt + chosen, stop)
            outs.append(self._attend(q[:, :, answered], k[:, :, answered], v[:, :, answered], 0))
            if rejected.start < stop:
                key, value = (torch.cat((x[:, :, start : start + prompt], x[:, :, rejected]), dim=2) for x in (k, v))
                outs.append(self._attend(q[:, :, rejected], key, value, prompt))
        return [out.transpose(1, 2) for out in outs]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, at: int) -> Tensor:
        """Causal attention of n queries at the positions from `at` on to the at + n keys from position 0 on.

        Args:
            q: [B, H, n, D].
            k: [B, G, at + n, D].
            v: [B, G, at + n, D].
            at: position of the first query.

        Returns:
            [B, H, n, D].
        """
        n, window = q.shape[2], self.window
        if self.softcap is not None or self.softmax_offset is not None:
            scale = q.shape[3] ** -0.5 if self.scale is None else self.scale
            how = Scores(at, window, scale, self.softcap)
            return BlockAttention.apply(q, k, v, self.softmax_offset, how)  # type: ignore[no-any-return]
        gqa = q.shape[1] != k.shape[1]
        if at == 0 and (window is None or n <= window):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=gqa)
        blocks = [
            F.scaled_dot_product_attention(
                q[:, :, block.queries],
                k[:, :, block.keys],
                v[:, :, block.keys],
                attn_mask=block.mask,
                scale=self.scale,
                enable_gqa=gqa,
            )
            for block in blocks_of(n, at, window, window or attention_blocks.BLOCK, q.device)
        ]
        return torch.cat(blocks, dim=2)


def _pieces(offsets: list[int], size: int, rank: int) -> Iterator[tuple[slice, slice, int]]:
    """Which of a rank's queries attend to which keys.

    Args:
        offsets: where the sequences of the row start, and the end of the last.
        size: context-parallel ranks.
        rank: this one.

    Yields:
        A slice of the rank's own tokens, the slice of the row with the keys up to the last of these tokens, and the
        position of the first of them in its sequence.
    """
    done = 0
    for start, stop in pairwise(offsets):
        if stop == start:
            continue
        for piece in zigzag_slices(start, stop, size, rank) if size > 1 else (slice(start, stop),):
            length = piece.stop - piece.start
            yield slice(done, done + length), slice(start, piece.stop), piece.start - start
            done += length


_rows = WeakTensorKeyDictionary()


def note_row_layout(cu_seqlens: Tensor, size: int, offsets: list[int], order: Tensor | None) -> None:
    """Saves the attention from reading `cu_seqlens` on the host, where its values are known: reading waits for a GPU.

    Args:
        cu_seqlens: of a row. It is read again after it is changed.
        size: context-parallel ranks.
        offsets: its values: where the sequences of the row start, and the end of the last.
        order: for every token of the row its index in the concatenated slices of all ranks; None for one rank.
    """
    _rows[cu_seqlens] = ((cu_seqlens._version, size), offsets, order)


def _row_layout(packed: PackedSeqParams, size: int) -> tuple[list[int], Tensor | None]:
    """What `note_row_layout` says of a row, computed once for all layers of a microbatch where it was not called."""
    cu_seqlens = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    version, *layout = _rows.get(cu_seqlens) or (None,)
    if version != (cu_seqlens._version, size):
        offsets, order = cu_seqlens.tolist(), None
        if size > 1:
            multiple = 2 * size
            if any((stop - start) % multiple for start, stop in pairwise(offsets)):
                raise ValueError(
                    f"every sequence must be a multiple of {multiple} tokens, but cu_seqlens are {offsets}"
                )
            gathered = np.concatenate([positions(offsets, size, rank) for rank in range(size)])
            order = torch.from_numpy(np.argsort(gathered)).to(cu_seqlens.device)
        note_row_layout(cu_seqlens, size, offsets, order)
        layout = [offsets, order]
    return layout[0], layout[1]
