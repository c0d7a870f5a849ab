"""The count of floating-point operations against what torch counts in Megatron's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simpo_megatron.models.hf_checkpoint import read_hf_config
from simpo_megatron.planning.flops import attended_keys, forward_flops, step_flops
from tests.support import families as tiny
from tests.support.distributed import WorkerPool

LENGTHS = [5, 9, 1, 17]


def counted(path: Path) -> tuple[dict[str, int], dict[str, int], int]:
    """On a rank: operations of a forward pass over a packed row, and of forward and backward, by operator of torch.

    The third number are the columns of the output layer.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    custom: Any = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    _, _, [model] = tiny.build(path)
    ids = torch.arange(sum(LENGTHS)).unsqueeze(0)
    found = []
    for backward in (False, True):
        with FlopCounterMode(display=False, custom_mapping=custom) as counter:
            logits = model(ids, ids, None, packed_seq_params=tiny.pack(LENGTHS))
            if backward:
                logits.sum().backward()
        found.append({str(name): count for name, count in counter.get_flop_counts()["Global"].items()})
    return found[0], found[1], model.vocab_size


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "qwen3_moe_plain"])
def test_the_count_is_that_of_torch(pool: WorkerPool, tmp_path: Path, name: str) -> None:
    """Torch counts whole squares of attention, and the padding of the vocabulary."""
    tiny.make(name, tmp_path / "model")
    architecture = read_hf_config(tmp_path / "model").architecture
    [(forward, both, columns)] = pool.run(1, counted, tmp_path / "model")
    tokens = sum(LENGTHS)
    squares = architecture.num_layers * sum(length * length for length in LENGTHS)
    padding = 2 * tokens * architecture.transformer["hidden_size"] * (columns - architecture.vocab_size)
    assert sum(forward.values()) == forward_flops(architecture, tokens, squares, tokens) + padding
    products = forward_flops(architecture, tokens, 0, tokens) + padding
    backward = sum(count for operator, count in both.items() if "attention" not in operator)
    assert backward == 3 * products


def test_attention_counts_the_keys_of_each_query() -> None:
    lengths = np.array(LENGTHS)
    for window in (None, 1, 4, 100):
        expected = [sum(min(i + 1, window or i + 1) for i in range(length)) for length in LENGTHS]
        assert attended_keys(lengths, window).tolist() == expected


def test_a_shared_prompt_is_counted_once(tmp_path: Path) -> None:
    """The second response of a pair attends to the prompt, whose own operations are left out."""
    tiny.make("llama", tmp_path / "model")
    architecture = read_hf_config(tmp_path / "model").architecture
    prompt, chosen, rejected = np.array([7]), np.array([3]), np.array([5])
    whole = step_flops(architecture, prompt, [chosen, rejected])
    shared = step_flops(architecture, prompt, [chosen, rejected], share_prompts=True)
    assert whole - shared == 3 * forward_flops(architecture, 7, architecture.num_layers * 7 * 8 // 2, 0)
