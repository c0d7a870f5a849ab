"""`batch/packer.py`: the length of the rows under pipeline parallelism, and the thread that packs one row ahead."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from simpo_megatron.batch import packer as module
from simpo_megatron.batch.packer import RowPacker
from tests.support.distributed import WorkerPool
from tests.support.pairs import make_pairs

LENGTHS = [(4, 3, 5), (20, 40, 12), (6, 9, 1), (1, 2, 3), (16, 20, 12), (3, 1, 4), (8, 9, 4), (2, 7, 2)]
INDICES = np.arange(len(LENGTHS))


def row_lengths(sizes: dict[str, int], settings: dict[str, Any]) -> tuple[int | None, list[int], list[int]]:
    """On a rank: the length that the schedule is told, the tokens of its rows, and those that are no padding."""
    parallel_state.initialize_model_parallel(**sizes)
    packer = RowPacker(seq_length=96, responses=2, hidden_size=8, **settings)
    batch = packer.pack(make_pairs(LENGTHS), INDICES)
    rows = list(packer.microbatches(batch))
    return batch.row_length, [row.tokens.numel() for row in rows], [int((~row.padding_mask).sum()) for row in rows]


PP2 = {"pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("world", "sizes", "settings", "told"),
    [
        (1, {}, {}, None),
        (2, PP2, {}, 92),  # the longest row, and no shape is exchanged
        (4, {**PP2, "tensor_model_parallel_size": 2}, {"sequence_parallel": True}, 92),
        (4, {**PP2, "context_parallel_size": 2}, {}, 92),  # a multiple of 4
        (2, PP2, {"fixed_length": True}, 96),
        (1, {}, {"fixed_length": True}, 96),
    ],
    ids=str,
)
def test_rows_of_a_pipeline_are_as_long_as_the_longest(
    pool: WorkerPool, world: int, sizes: dict[str, int], settings: dict[str, Any], told: int | None
) -> None:
    ranks = pool.run(world, row_lengths, sizes, settings)
    for length, tokens, used in ranks:
        assert length == told
        context = sizes.get("context_parallel_size", 1)
        assert tokens == ([told // context] * len(tokens) if told else used)


def packed_ahead() -> list[str]:
    """On a rank: which rows were packed when the caller had its first one, and what a broken row does."""
    parallel_state.initialize_model_parallel()
    packer = RowPacker(seq_length=60, responses=1, hidden_size=8)
    batch = replace(packer.pack(make_pairs(LENGTHS), INDICES), microbatches=[[0], [1], [2], [3]])
    begun: list[Any] = []
    second = threading.Event()
    pack_row = module.pack_row

    def watched(pairs: Any, indices: Any, *rest: Any) -> Any:
        begun.append(list(indices))
        if list(indices) == [1]:
            second.set()
        if list(indices) == [2]:
            raise KeyError("broken row")
        return pack_row(pairs, indices, *rest)

    module.pack_row = watched  # type: ignore[assignment]
    found = []
    try:
        rows = packer.microbatches(batch)
        found.append(f"got {next(rows).pairs}")
        assert second.wait(30)  # packed while the caller uses the first
        found.append(f"begun {begun}")
        found.append(f"got {next(rows).pairs}")
        with pytest.raises(KeyError, match="broken row"):
            next(rows)
        found.append(f"threads {_threads()}")
        unfinished = packer.microbatches(batch)
        next(unfinished)
        unfinished.close()
        found.append(f"threads {_threads()}")
    finally:
        module.pack_row = pack_row  # type: ignore[assignment]
    complete = packer.microbatches(batch)
    found.append(f"rows {[next(complete).pairs for _ in range(4)]}")  # as the schedule does: never to the end
    found.append(f"threads {_threads()}")
    return found


def _threads() -> int:
    return sum(thread.name.startswith("microbatch") for thread in threading.enumerate())


def test_one_row_is_packed_ahead_and_no_thread_is_left(pool: WorkerPool) -> None:
    assert pool.run(1, packed_ahead) == [
        [
            "got (0,)",
            "begun [[0], [1]]",
            "got (1,)",
            "threads 0",
            "threads 0",
            "rows [(0,), (1,), (2,), (3,)]",
            "threads 0",
        ]
    ]


def test_what_is_sent_arrives_in_its_shape_and_dtype() -> None:
    from simpo_megatron.batch.transfer import send

    arrays = {
        "a": np.array([[True, False, True]]),
        "none": np.zeros((0, 2), np.float32),
        "b": np.array([1, -(2**40)]),
        "c": np.array([0.5, np.nan], np.float32),
        "d": np.array([7], np.int32),
    }
    sent = send(arrays, torch.device("cpu"))
    for name, array in arrays.items():
        np.testing.assert_array_equal(sent[name].numpy(), array)
        assert sent[name].numpy().dtype == array.dtype and sent[name].shape == array.shape
    assert len({tensor.untyped_storage().data_ptr() for tensor in sent.values()}) == 1
