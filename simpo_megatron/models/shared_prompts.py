"""Packed rows in which the prompt of a pair stands, and is computed, once: what attention and rotary embedding need.

Prompt, chosen response and rejected response stand back to back as one sequence of the row. P: tokens of the prompt.

    row        prompt chosen rejected | prompt chosen rejected | padding
    position   0 ..   P ..   P ..       0 ..   P ..   P ..       0 ..

Both responses see the prompt, and neither sees the other. `batch/row.py` lays out such rows and passes a
`SharedPromptParams` to the model. There `PairRotary` reads the positions, and `attention.PackedAttention` the splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class SharedPromptParams(PackedSeqParams):
    """Megatron's description of a packed row, in which every sequence is a pair. T: tokens of the row.

    Attributes:
        splits: tokens of the prompt and of the chosen response, of every pair. The padding, where there is some, is a
            last sequence without an entry.
        position_ids: [T] int64, the position of every token.
    """

    splits: tuple[tuple[int, int], ...] = ()
    position_ids: Tensor | None = None


class PairRotary(RotaryEmbedding):
    """Megatron's rotary embedding, for rows whose positions do not run from 0 to the end of every sequence.

    Where a frequency tensor has exactly `cu_seqlens[-1]` rows, Megatron takes its row i for the token i of the packed
    row (`rope_utils.py`, `_apply_rotary_pos_emb_thd`). So arbitrary positions need one row of frequencies for every
    token.

    Attributes:
        windowed: the embedding of the layers with a window, where they have another one.
    """

    windowed: PairRotary | None

    def get_rotary_seq_len(self, inference_context: Any, transformer: Any, *args: Any, **kwargs: Any) -> Any:
        """What Megatron then passes to `forward`.

        Returns:
            The positions [T] of a row with shared prompts; else the length of the longest sequence.
        """
        found = next((x for x in (*args, *kwargs.values()) if isinstance(x, SharedPromptParams)), None)
        if found is not None:
            return found.position_ids
        return super().get_rotary_seq_len(inference_context, transformer, *args, **kwargs)

    def forward(self, max_seq_len: int | Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """The angles of positions.

        Args:
            max_seq_len: a number of positions that begin at 0, or the positions themselves, [T] int64.
            *args: passed on to Megatron for a number of positions.
            **kwargs: the same.

        Returns:
            [max_seq_len, 1, 1, D] or [T, 1, 1, D], in radians. Where the layers with a window have another embedding,
            [2, ..., D]: those of the other layers, then theirs.
        """
        angles = self._angles(max_seq_len, *args, **kwargs)
        if self.windowed is None:
            return angles
        return torch.stack((angles, self.windowed(max_seq_len, *args, **kwargs)))

    def _angles(self, max_seq_len: int | Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(max_seq_len, Tensor):
            return super().forward(max_seq_len, *args, **kwargs)
        inverse = self.inv_freq.to(max_seq_len.device)
        frequencies = torch.outer(max_seq_len.to(inverse.dtype), inverse)
        if self.rotary_interleaved:
            return frequencies.repeat_interleave(2, dim=-1)[:, None, None, :]
        return torch.cat((frequencies, frequencies), dim=-1)[:, None, None, :]
