"""Blends: what the flag says, and pairs of several sources as one set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simpo_megatron.data import BlendedPairs
from simpo_megatron.data.blend import Blend, parse_blend
from simpo_megatron.data.prepared_format import part
from simpo_megatron.errors import UserError
from tests.support.pairs import make_pairs

PARTS = [make_pairs([(2, 3, 4)] * 3, seed=1), make_pairs([(1, 5, 2)] * 2, seed=2, weight=[2, 3], margin=[0.5, 1])]


@pytest.mark.parametrize(
    ("values", "blend"),
    [
        (["a"], Blend(["a"])),
        (["a", "b"], Blend(["a", "b"])),
        (["0.7", "a", "0.3", "b"], Blend(["a", "b"], [0.7, 0.3])),
        (["0.7 a 0.3 b"], Blend(["a", "b"], [0.7, 0.3])),
        (["2", "a"], Blend(["a"], [2.0])),
    ],
)
def test_what_the_flag_says(values: list[str], blend: Blend) -> None:
    assert parse_blend(values, "--train-data") == blend


def test_files_with_spaces_or_numbers_for_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my pairs.jsonl", "7"):
        (tmp_path / name).touch()
    assert parse_blend(["my pairs.jsonl"], "--train-data") == Blend(["my pairs.jsonl"])
    assert parse_blend(["7", "a"], "--train-data") == Blend(["7", "a"])


def test_prepared_sets_and_folders_with_spaces_or_numbers_for_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for prefix in ("two words", "0.5 a", "3"):
        part(prefix, ".json").touch()
    Path("saved set").mkdir()
    for name in ("two words", "0.5 a", "saved set", "saved set:test"):
        assert parse_blend([name], "--train-data") == Blend([name])
    assert parse_blend(["3", "two words"], "--train-data") == Blend(["3", "two words"])


@pytest.mark.parametrize(
    ("value", "sources"),
    [
        ("missing words.jsonl", ["missing words.jsonl"]),  # one path, which the error will name whole
        ("W/two words", ["W/two words"]),
        ("a.jsonl b.parquet", ["a.jsonl", "b.parquet"]),
        ("owner/name owner/other:test", ["owner/name", "owner/other:test"]),
    ],
)
def test_one_string_is_a_blend_where_every_part_can_be_a_source(value: str, sources: list[str]) -> None:
    assert parse_blend([value], "--train-data") == Blend(sources)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["0.7", "a", "b"], "3 values are not pairs of weight and source"),
        (["0.7", "a", "x", "b"], "the weight 'x' of b is not a number above 0"),
        (["0.7", "a", "0", "b"], "the weight '0' of b"),
        (["-1", "a", "1", "b"], "the weight '-1' of a"),
        (["nan", "a", "1", "b"], "the weight 'nan' of a"),
        (["inf", "a", "1", "b"], "the weight 'inf' of a"),
        (["0.7", "a", "0.3", "0.2"], "expected a source after the weight 0.3, got another number: '0.2'"),
    ],
)
def test_weights_that_do_not_parse(values: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_blend(values, "--train-data")
    assert words in str(caught.value) and "0.7 a 0.3 b" in str(caught.value) and "--train-data" in str(caught.value)


def test_pairs_and_columns_one_after_the_other() -> None:
    blend = BlendedPairs(PARTS)
    assert len(blend) == 5
    for i, (source, j) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        for found, wanted in zip(blend.pair(i), PARTS[source].pair(j), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert blend.columns["weight"][np.array([4, 0, 3])].tolist() == [3, 1, 2]
    assert blend.chosen_length[:].tolist() == [3, 3, 3, 5, 5]
    assert blend.columns["margin"][np.array([3])].dtype == np.float32
    assert blend.pair_tokens.tolist() == [11, 11, 11, 9, 9]
    assert blend.largest_token == max(part.largest_token for part in PARTS)
    assert blend.longest_sequence == 6


def test_without_weights_an_epoch_is_every_pair_once() -> None:
    blend = BlendedPairs(PARTS)
    assert sorted(blend.order(0, 5, seed=3)) == sorted(blend.order(5, 5, seed=3)) == [0, 1, 2, 3, 4]
    assert blend.order(0, 5, seed=0, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_weights_are_shares_of_an_epoch() -> None:
    blend = BlendedPairs(PARTS, [1, 4])
    assert blend.counts.tolist() == [1, 4]
    order = blend.order(0, 15, seed=5)
    assert (order < 3).sum() == 3 and len(set(order[order < 3])) == 3, "three epochs see every pair of the first once"
    with pytest.raises(UserError, match="leave a source no pair of an epoch of 5"):
        Blend(["a", "b"], [1, 1e-9]).join(PARTS)


def test_fingerprints_of_blends_differ() -> None:
    blends = [BlendedPairs(PARTS), BlendedPairs(PARTS, [1, 4]), BlendedPairs(PARTS[::-1]), PARTS[0]]
    assert len({blend.fingerprint for blend in blends}) == 4
    assert BlendedPairs(PARTS).fingerprint == blends[0].fingerprint
