"""The rotary embedding of a built model: its frequencies and factor. The layers with a window may have their own.

set_rotary(model, architecture.rope, additions.window_rope_theta)
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from simpo_megatron.models.rope import Rope, inverse_frequencies
from simpo_megatron.models.shared_prompts import PairRotary


class WindowRopeAttention(SelfAttention):
    """Megatron's self attention in a model whose layers with a window have a rotary embedding of their own.

    The model computes the angles of both (`PairRotary.windowed`), and each layer takes its own.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any,
        *args: Any,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As Megatron's, with the angles [2, ...] of layers without and with a window."""
        angles = rotary_pos_emb[int(has_window(self.config, self.layer_number))]
        return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=angles, **kwargs)


def has_window(config: TransformerConfig, layer_number: int) -> bool:
    """Whether a layer has the window of the model; layers count from 1."""
    return is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)  # type: ignore[arg-type]


def set_rotary(model: GPTModel, rope: Rope, window_theta: float | None) -> None:
    """Gives a model the frequencies of its rope. Megatron can express few of the scalings, and fixes values of theirs.

    Args:
        model: as Megatron builds it.
        rope: of the model.
        window_theta: the base of the unscaled frequencies of the layers with a window; None where they have those of
            the others. The layers are `WindowRopeAttention` otherwise.
    """
    rotary: Any = model.rotary_pos_emb
    factor = _set_frequencies(rotary, rope, model.config)
    if window_theta is not None:
        rotary.windowed = RotaryEmbedding(model.config.kv_channels or 0, 1.0, cp_group=rotary.cp_group)
        _set_frequencies(rotary.windowed, Rope(window_theta), model.config)
    layers: Any = model.decoder.layers
    for layer in layers:
        if window_theta is None or not has_window(model.config, layer.layer_number):
            set_attention_factor(layer.self_attention, factor)


def _set_frequencies(rotary: Any, rope: Rope, config: TransformerConfig) -> float:
    """Replaces the frequencies; returns the factor of cosine and sine."""
    frequencies, factor = inverse_frequencies(rope, config.kv_channels or 0)
    replace_frequencies(rotary, frequencies)
    return factor


def replace_frequencies(rotary: Any, frequencies: Tensor) -> None:
    """Replaces the frequencies of a rotary embedding of Megatron, which then can read positions from the row too."""
    rotary.__class__, rotary.windowed = PairRotary, None  # the same buffers
    rotary.inv_freq = frequencies.to(torch.cuda.current_device())


def set_attention_factor(attention: Any, factor: float) -> None:
    """Lets an attention of Megatron multiply cosine and sine of its rotary embedding by a factor.

    It computes the factor from three fields of its config that are YaRN's
    (`yarn_rotary_pos_embedding.py`, `_yarn_get_concentration_factor_from_config`): 0.1 * mscale * log(scaling) + 1,
    over the same with `mscale_all_dim`. The values here make any factor of it. From 0.19 on it is computed when the
    attention is built.

    Args:
        attention: of one layer.
        factor: 1 leaves it as it is.
    """
    if factor != 1.0:
        attention.config = copy(attention.config)
        attention.config.yarn_rotary_scaling_factor = math.exp(10)
        attention.config.yarn_mscale, attention.config.yarn_mscale_all_dim = factor - 1, 0.0
        attention._yarn_concentration_factor = factor
