"""`batch/row.py` against a loop over tokens: what is scored, by which position, for which response."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch

from simpo_megatron.batch.row import BatchCounts, PreferenceBatch, RowFormat, pack_row
from simpo_megatron.data import CHOSEN_CUT, REJECTED_CUT, InMemoryPairs
from tests.support.pairs import make_pairs

# Unequal prompts and responses; prompts and responses of a single token among them.
LENGTHS = [(5, 3, 2), (1, 1, 4), (7, 2, 1), (2, 6, 3)]
COUNTS = BatchCounts(pairs=9, chosen_tokens=31, packed_rows=1)


@dataclass
class Naive:
    """A row that is built one token after the other.

    Attributes:
        tokens: of the row.
        positions: position of each token in its sequence.
        starts: where each sequence starts.
        scored: index in the row, target and response of each scored position.
        lengths: scored tokens of each response.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    scored: list[tuple[int, int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def add(self, prompt: Any, response: Any) -> None:
        """Appends a sequence."""
        self.starts.append(len(self.tokens))
        for position, token in enumerate([*prompt, *response]):
            if position >= len(prompt):
                self.scored.append((len(self.tokens) - 1, int(token), len(self.lengths)))
            self.tokens.append(int(token))
            self.positions.append(position)
        self.lengths.append(len(response))

    def pad(self, total: int) -> None:
        """Pads the row to `total` tokens."""
        if total > len(self.tokens):
            self.starts.append(len(self.tokens))
        for position in range(total - len(self.tokens)):
            self.tokens.append(0)
            self.positions.append(position)


def naive_row(pairs: InMemoryPairs, indices: list[int], responses: int, total: int) -> Naive:
    """The row of some pairs, padded to `total` tokens."""
    row = Naive()
    for i in indices:
        prompt, chosen, rejected = pairs.pair(i)
        for response in (chosen, rejected)[:responses]:
            row.add(prompt, response)
    row.pad(total)
    return row


def scored_here(batch: PreferenceBatch) -> list[tuple[int, int, int]]:
    """Index, target and response of every scored position of this rank."""
    scored = batch.scored
    return list(zip(scored.positions_R.tolist(), scored.targets_R.tolist(), scored.segments_R.tolist(), strict=True))


def check(batch: PreferenceBatch, row: Naive) -> None:
    """Everything in the batch is as in the row."""
    assert batch.tokens.tolist() == [row.tokens]
    assert batch.position_ids.tolist() == [row.positions]
    packed = batch.packed_seq_params
    for cu_seqlens in (packed.cu_seqlens_q, packed.cu_seqlens_kv):
        assert cu_seqlens.tolist() == [*row.starts, len(row.tokens)]
        assert cu_seqlens.dtype == torch.int32
    longest = max(end - start for start, end in zip(row.starts, [*row.starts[1:], len(row.tokens)], strict=True))
    assert packed.max_seqlen_q == packed.max_seqlen_kv >= longest
    assert (packed.max_seqlen_q == len(row.tokens)) == (longest == len(row.tokens))  # see `whole_row._max_seqlen`
    assert scored_here(batch) == row.scored
    assert batch.lengths.tolist() == row.lengths
    scored = batch.scored
    for tensor in (
        batch.tokens,
        batch.position_ids,
        scored.positions_R,
        scored.targets_R,
        scored.segments_R,
        batch.lengths,
    ):
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize("responses", [1, 2])
@pytest.mark.parametrize("indices", [[0], [3, 1], [0, 1, 2, 3]])
@pytest.mark.parametrize("padding", [{}, {"row_multiple": 8}, {"row_length": 61}], ids=str)
def test_row_equals_a_loop_over_tokens(responses: int, indices: list[int], padding: dict[str, int]) -> None:
    pairs = make_pairs(LENGTHS)
    used = sum(LENGTHS[i][0] * responses + sum(LENGTHS[i][1 : 1 + responses]) for i in indices)
    multiple = padding.get("row_multiple", 1)
    total = padding.get("row_length") or (used + multiple - 1) // multiple * multiple
    batch = pack_row(pairs, indices, COUNTS, RowFormat(responses, **padding))
    check(batch, naive_row(pairs, indices, responses, total))
    assert batch.responses == responses and batch.counts == COUNTS


def test_a_pair_written_out() -> None:
    """No loop, no helper: the row of the module's docstring."""
    pairs = make_pairs([(3, 2, 1)])
    pairs.tokens[:] = [10, 11, 12, 0, 21, 30]
    batch = pack_row(pairs, [0], COUNTS, RowFormat(row_length=12))
    assert batch.tokens.tolist() == [[10, 11, 12, 0, 21, 10, 11, 12, 30, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.packed_seq_params.cu_seqlens_q.tolist() == [0, 5, 9, 12]
    assert batch.scored.positions_R.tolist() == [2, 3, 7]
    assert batch.scored.targets_R.tolist() == [0, 21, 30]
    assert batch.scored.segments_R.tolist() == [0, 0, 1]
    assert batch.lengths.tolist() == [2, 1]


@pytest.mark.parametrize("responses", [1, 2])
@pytest.mark.parametrize("padding, total", [({}, 1), ({"row_multiple": 4}, 4), ({"row_length": 16}, 16)])
def test_an_empty_row_is_padding_alone(responses: int, padding: dict[str, int], total: int) -> None:
    batch = pack_row(make_pairs(LENGTHS), [], COUNTS, RowFormat(responses, **padding))
    check(batch, naive_row(make_pairs(LENGTHS), [], responses, total))
    assert batch.weight.shape == batch.margin.shape == batch.truncated.shape == (0,)
    sums = batch.segment_sums(torch.zeros(0, requires_grad=True))
    assert sums.shape == (0, responses) and sums.requires_grad


def test_what_belongs_to_a_pair_follows_it() -> None:
    pairs = make_pairs(
        LENGTHS,
        weight=[1, 2, 3, 4],
        margin=[float("nan"), 0.5, 0, -1],
        truncated=[0, CHOSEN_CUT, REJECTED_CUT, CHOSEN_CUT | REJECTED_CUT],
    )
    batch = pack_row(pairs, [3, 0, 2], COUNTS)
    assert batch.weight.tolist() == [4, 1, 3]
    torch.testing.assert_close(batch.margin, torch.tensor([-1, float("nan"), 0]), equal_nan=True)
    assert batch.truncated.tolist() == [True, True, False, False, False, True]
    assert batch.weight.dtype == batch.margin.dtype == torch.float32
    assert pack_row(pairs, [3, 1, 2], COUNTS, RowFormat(responses=1)).truncated.tolist() == [True, True, False]


def test_pairs_that_do_not_fit() -> None:
    pairs = make_pairs(LENGTHS)
    pack_row(pairs, [0, 1], COUNTS, RowFormat(row_length=22))
    with pytest.raises(ValueError, match=r"pairs \[0, 1\] need 22 tokens, the row has 21"):
        pack_row(pairs, [0, 1], COUNTS, RowFormat(row_length=21))


@pytest.mark.parametrize("responses", [1, 2])
def test_segment_sums_and_their_gradient(responses: int) -> None:
    batch = pack_row(make_pairs(LENGTHS), [2, 0, 3], COUNTS, RowFormat(responses))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(batch.scored.positions_R), dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.randn(3, responses, dtype=torch.float64, generator=generator)
    want = [0.0] * len(batch.lengths)
    for value, segment in zip(values.tolist(), batch.scored.segments_R.tolist(), strict=True):
        want[segment] += value
    sums = batch.segment_sums(values)
    torch.testing.assert_close(sums, torch.tensor(want, dtype=torch.float64).view(3, responses))
    [gradient] = torch.autograd.grad((weights * sums).sum(), values)
    assert gradient.tolist() == [weights.view(-1)[segment].item() for segment in batch.scored.segments_R]


@pytest.mark.parametrize("responses", [1, 2])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("padding", [{}, {"row_multiple": 8}, {"row_length": 192}], ids=str)
def test_context_parallel_slices_hold_the_row_once(responses: int, size: int, padding: dict[str, int]) -> None:
    """The slices of all ranks, put back in their places, are the row of a single rank with padded sequences."""
    pairs, indices = make_pairs(LENGTHS), [3, 0, 2]
    ranks = [
        pack_row(
            pairs,
            indices,
            COUNTS,
            RowFormat(responses, context_parallel_size=size, context_parallel_rank=rank, **padding),
        )
        for rank in range(size)
    ]
    row, starts = Naive(), []
    for i in indices:
        prompt, *both = pairs.pair(i)
        for response in both[:responses]:
            starts.append(len(row.tokens))
            row.add(prompt, response)
            row.pad(-(-len(row.tokens) // (2 * size)) * 2 * size)
    ends = ranks[0].packed_seq_params.cu_seqlens_q.tolist()
    assert ends[: len(starts)] == starts
    row.pad(ends[-1])

    tokens, positions, scored = [None] * ends[-1], [None] * ends[-1], []
    for rank, batch in enumerate(ranks):
        assert batch.packed_seq_params.cu_seqlens_q.tolist() == ends
        assert batch.tokens.shape == batch.padding_mask.shape == (1, ends[-1] // size)
        assert batch.tokens.shape[1] % padding.get("row_multiple", 1) == 0
        assert batch.lengths.tolist() == row.lengths
        places = []
        for start, end in pairwise(ends):
            slices = torch.arange(start, end).chunk(2 * size)
            places += [*slices[rank].tolist(), *slices[2 * size - 1 - rank].tolist()]
        for local, place in enumerate(places):
            tokens[place], positions[place] = batch.tokens[0, local].item(), batch.position_ids[0, local].item()
        scored += [(places[local], target, segment) for local, target, segment in scored_here(batch)]
    assert tokens == row.tokens
    assert sorted(scored) == sorted(row.scored)
    assert sum((~batch.padding_mask).sum().item() for batch in ranks) == sum(
        LENGTHS[i][0] * responses + sum(LENGTHS[i][1 : 1 + responses]) for i in indices
    )
    real = [
        place
        for start, (_, length) in zip(starts, _used(indices, responses), strict=True)
        for place in range(start, start + length)
    ]
    assert [positions[place] for place in real] == [i for _, length in _used(indices, responses) for i in range(length)]


def _used(indices: list[int], responses: int) -> list[tuple[int, int]]:
    """The pair and the number of tokens of every sequence, without padding."""
    return [(i, LENGTHS[i][0] + LENGTHS[i][1 + response]) for i in indices for response in range(responses)]


def test_padding_is_marked() -> None:
    batch = pack_row(make_pairs([(3, 2, 1)]), [0], COUNTS, RowFormat(row_length=12))
    assert batch.padding_mask.tolist() == [[False] * 9 + [True] * 3]


@pytest.mark.parametrize("size, piece", [(1, 128), (3, 126)])
def test_padding_is_in_short_sequences(size: int, piece: int) -> None:
    """Attention costs the square of a sequence, and the longest one is the bound of all."""
    row_format = RowFormat(row_length=606, context_parallel_size=size)
    packed = pack_row(make_pairs([(30, 12, 6)]), [0], COUNTS, row_format).packed_seq_params
    lengths = packed.cu_seqlens_q.diff().tolist()
    assert lengths == [42, 36, *[piece] * 4, 606 - 78 - 4 * piece]
    assert max(lengths) <= packed.max_seqlen_q < 606


def test_max_seqlen_takes_few_values() -> None:
    """Rows of different pairs have one bound, so that Transformer Engine does not choose its attention again."""
    pairs = make_pairs([(5 + i, 100 + 3 * i, 90 + i) for i in range(20)])
    found = [pack_row(pairs, [i, i + 1], COUNTS).packed_seq_params.max_seqlen_q for i in range(19)]
    assert set(found) == {256}
    row_format = RowFormat(context_parallel_size=3)
    found = [pack_row(pairs, [i, i + 1, i + 2], COUNTS, row_format).packed_seq_params.max_seqlen_q for i in range(18)]
    assert all(bound % 6 == 0 and bound >= 168 for bound in found) and max(found) <= 768


def test_a_shared_prompt_written_out() -> None:
    pairs = make_pairs([(3, 2, 2), (1, 1, 2)])
    pairs.tokens[:] = [10, 11, 12, 0, 21, 30, 31, 50, 60, 70, 71]
    batch = pack_row(pairs, [0, 1], COUNTS, RowFormat(share_prompts=True, row_length=14))
    assert batch.tokens.tolist() == [[10, 11, 12, 0, 21, 30, 31, 50, 60, 70, 71, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 0, 1, 1, 2, 0, 1, 2]]
    assert batch.padding_mask.tolist() == [[False] * 11 + [True] * 3]
    packed = batch.packed_seq_params
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 7, 11, 14]
    assert packed.splits == ((3, 2), (1, 1)) and packed.position_ids.tolist() == batch.position_ids[0].tolist()
    assert batch.scored.positions_R.tolist() == [2, 3, 2, 5, 7, 7, 9]
    assert batch.scored.targets_R.tolist() == [0, 21, 30, 31, 60, 70, 71]
    assert batch.scored.segments_R.tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert batch.lengths.tolist() == [2, 2, 1, 2]
    empty = pack_row(pairs, [], COUNTS, RowFormat(share_prompts=True, row_multiple=4))
    assert empty.tokens.shape == (1, 4) and empty.packed_seq_params.splits == ()
