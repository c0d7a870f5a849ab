"""Pairs whose prompt stands, and is computed, once: prompt, chosen, rejected back to back as one sequence of the row.

    row        prompt chosen rejected | prompt chosen rejected | padding
    position   0 ..   P ..   P ..       0 ..   P ..   P ..       0 ..

Both responses see the prompt and not each other. Three places know of it: `row.py` lays the row out, `PairRotary`
reads the positions, `models.attention.PackedAttention` attends. T tokens of the row.
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
    """`cu_seqlens` are those of the pairs. Padding, the last sequence where there is some, has no split."""

    splits: tuple[tuple[int, int], ...] = ()  # of each pair its tokens of prompt and chosen response
    position_ids: Tensor | None = None  # [T] int64


class PairRotary(RotaryEmbedding):
    """Megatron's rotary embedding, for rows whose positions do not run from 0 to the end of every sequence.

    Megatron reads a frequency tensor with exactly `cu_seqlens[-1]` rows by place in the row (`rope_utils.py`,
    `_apply_rotary_pos_emb_thd`), so one row of frequencies a token is all that arbitrary positions take.
    """

    def get_rotary_seq_len(self, inference_context: Any, transformer: Any, *args: Any, **kwargs: Any) -> Any:
        """The length of the longest sequence; of shared prompts the positions, which `forward` then gets."""
        found = next((x for x in (*args, *kwargs.values()) if isinstance(x, SharedPromptParams)), None)
        if found is not None:
            return found.position_ids
        return super().get_rotary_seq_len(inference_context, transformer, *args, **kwargs)

    def forward(self, max_seq_len: int | Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Frequencies [max_seq_len, 1, 1, D], or [T, 1, 1, D] of the positions given."""
        if not isinstance(max_seq_len, Tensor):
            return super().forward(max_seq_len, *args, **kwargs)
        inverse = self.inv_freq.to(max_seq_len.device)
        frequencies = torch.outer(max_seq_len.to(inverse.dtype), inverse)
        return torch.cat((frequencies, frequencies), dim=-1)[:, None, None, :]
