"""A prepared set holds the pairs of its source, the same bytes for any number of workers, and names its damage."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from simpo_megatron.data import BlendedPairs, DataOptions, InMemoryPairs, load_preferences
from simpo_megatron.data import pairs as pairs_module
from simpo_megatron.data.prepare import prepare
from simpo_megatron.data.prepared_format import SUFFIXES, VERSION, is_prepared, part, record_type
from simpo_megatron.data.prepared_set import PreparedPairs
from simpo_megatron.data.prepared_writer import Writer
from simpo_megatron.data.tokenizer import fingerprint, load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.files import end_of_turn_ids
from tests.support.toy_tokenizers import toy

OPTIONS = DataOptions(max_length=60, max_prompt_length=30)


def rows(count: int = 1203) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": "What color is the sky? " * (i % 4 + 1)}],
            "chosen": [{"role": "assistant", "content": f"It is blue {i}." + " the sky" * (i % 31)}],
            "rejected": [{"role": "assistant", "content": f"No {i}."}],
            "weight": i % 3,
            "margin": None if i % 2 else 0.5,
            "score_chosen": 2.0,
            "score_rejected": i % 5 / 2,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    toy("llama3").save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 1]}')
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(scope="module")
def made(model: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("made") / "set"
    prepare(source, model, prefix, OPTIONS)
    return prefix


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    for suffix in SUFFIXES:
        shutil.copy(part(made, suffix), part(tmp_path / "set", suffix))
    return tmp_path / "set"


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_the_same_pairs_as_in_memory(made: Path, source: Path, model: Path) -> None:
    in_memory, report = load_preferences(source, load_tokenizer(model), OPTIONS, eos_token_ids=end_of_turn_ids(model))
    pairs = PreparedPairs(made)
    assert 0 < len(pairs) == len(in_memory) < report.rows, "ties are dropped"
    assert pairs.report == report
    assert report.truncated_chosen and not report.truncated_rejected
    lengths = ("prompt_length", "chosen_length", "rejected_length")
    numbers = [(getattr(pairs, name)[:], getattr(in_memory, name)) for name in lengths]
    numbers += [(pairs.columns[name][:], in_memory.columns[name]) for name in pairs.columns]
    for found, wanted in numbers:
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == wanted.dtype
    for i in range(len(in_memory)):
        for found, wanted in zip(pairs.pair(i), in_memory.pair(i), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert (pairs.fingerprint, pairs.largest_token) == (in_memory.fingerprint, in_memory.largest_token)
    assert (pairs.longest_sequence, pairs.pair_tokens.max()) == (60, in_memory.pair_tokens.max())
    assert pairs.order(7, 9, seed=3).tolist() == in_memory.order(7, 9, seed=3).tolist()
    scores = [row["score_rejected"] for row in rows() if row["score_rejected"] != 2]
    assert pairs.columns["score_rejected"].tolist() == scores
    assert [rows()[row - 1]["weight"] for row in pairs.columns["row"]] == pairs.columns["weight"].tolist()


def test_the_records_are_those_of_version_1() -> None:
    """The format on disk: another descr needs another VERSION, unless columns are appended."""
    assert VERSION == 1
    assert record_type().descr == [
        ("row", "<i8"),
        ("weight", "<f4"),
        ("margin", "<f4"),
        ("score_chosen", "<f4"),
        ("score_rejected", "<f4"),
        ("truncated", "|u1"),
        ("prompt_cut", "|u1"),
        ("ref_chosen_logps", "<f4"),
        ("ref_rejected_logps", "<f4"),
    ]
    assert record_type().itemsize == 34


def test_a_new_column_is_one_line_and_its_numbers(
    made: Path, source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once declared, it is in memory, in blends, on other ranks and on disk. Sets made before it read its default."""
    new = pairs_module.Column("reference", "<f4", -1.5, "any number")
    monkeypatch.setattr(pairs_module, "COLUMNS", (*pairs_module.COLUMNS, new))
    tokenizer = load_tokenizer(model)
    empty, report = load_preferences(source, tokenizer, OPTIONS)
    assert empty.columns["reference"].tolist() == [-1.5] * len(empty)
    numbers = np.arange(len(empty), dtype=np.float32)
    filled = dataclasses.replace(empty, columns={**empty.columns, "reference": numbers})
    with Writer(tmp_path / "set") as writer:
        writer.add(filled)
        writer.finish("source", OPTIONS, fingerprint(tokenizer, []), report)
    for copy in (
        PreparedPairs(tmp_path / "set"),
        InMemoryPairs.from_arrays(filled.arrays()),
        filled.take(np.ones(len(filled), bool)),
        pairs_module.concatenate([filled]),
    ):
        assert copy.columns["reference"][:].tolist() == numbers.tolist()
        assert copy.columns["reference"][np.array([2])].dtype == np.float32
    before = PreparedPairs(made)
    assert before.columns["reference"].tolist() == [-1.5] * len(before)
    blend = BlendedPairs([before, PreparedPairs(tmp_path / "set")])
    assert blend.columns["reference"][np.array([len(before) + 7, 0])].tolist() == [7, -1.5]


def test_records_of_other_columns_are_refused(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *others = pairs_module.COLUMNS
    monkeypatch.setattr(pairs_module, "COLUMNS", (second, first, *others))
    assert "or other columns" in error_of(lambda: PreparedPairs(copied))


def test_megatron_reads_the_documents(made: Path) -> None:
    data, pairs = IndexedDataset(str(made)), PreparedPairs(made)
    assert np.diff(data.document_indices).tolist() == [3] * len(pairs)
    sequences = data[3:6]
    assert [sequence.tolist() for sequence in sequences] == [ids.tolist() for ids in pairs.pair(1)]


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_files(
    made: Path, source: Path, model: Path, tmp_path: Path, workers: int
) -> None:
    prepare(source, model, tmp_path / "set", OPTIONS, workers=workers)
    for suffix in SUFFIXES:
        assert part(tmp_path / "set", suffix).read_bytes() == part(made, suffix).read_bytes(), suffix
    assert len(list(tmp_path.iterdir())) == len(SUFFIXES), "nothing is left beside them"


def test_a_small_source_starts_no_process(
    source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoPool:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise AssertionError("a process was started")

    monkeypatch.setattr("simpo_megatron.data.prepare.ProcessPoolExecutor", NoPool)
    small = tmp_path / "small.jsonl"
    small.write_text("".join(source.read_text().splitlines(keepends=True)[:499]))
    assert prepare(small, model, tmp_path / "set", OPTIONS, workers=8).rows == 499
    with pytest.raises(AssertionError):
        prepare(source, model, tmp_path / "set", OPTIONS, workers=8)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_the_set_that_was_there(copied: Path, source: Path, model: Path, workers: int) -> None:
    before = {suffix: part(copied, suffix).read_bytes() for suffix in SUFFIXES}
    broken = copied.parent / "broken.jsonl"
    broken.write_text(source.read_text() + '{"prompt": "p"}\n')
    message = error_of(lambda: prepare(broken, model, copied, OPTIONS, workers=workers))
    assert message.startswith(f"{broken}:1204: no `chosen`")
    broken.unlink()
    assert {suffix: part(copied, suffix).read_bytes() for suffix in SUFFIXES} == before
    assert len(list(copied.parent.iterdir())) == len(SUFFIXES)


def test_a_set_is_replaced_under_a_reader(copied: Path, source: Path, model: Path) -> None:
    reader = PreparedPairs(copied)
    wanted = [ids.tolist() for ids in reader.pair(0)]
    short = copied.parent / "short.jsonl.gz"
    short.write_bytes(gzip.compress(source.read_bytes().splitlines(keepends=True)[3]))
    prepare(short, model, copied, OPTIONS)
    assert len(PreparedPairs(copied)) == 1
    assert [ids.tolist() for ids in reader.pair(0)] == wanted


def test_files_of_something_else_are_left_alone(tmp_path: Path, source: Path, model: Path) -> None:
    part(tmp_path / "text", ".bin").write_bytes(b"tokens of a pretraining set")
    message = error_of(lambda: prepare(source, model, tmp_path / "text", OPTIONS))
    assert "--output-prefix" in message and "choose another" in message


def test_no_pair_left(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"prompt": "p", "chosen": "", "rejected": "a"}\n')
    assert "no pair is left of 1 rows" in error_of(lambda: prepare(path, model, tmp_path / "set", OPTIONS))
    assert not is_prepared(tmp_path / "set")


def test_duplicates_across_blocks(tmp_path: Path, model: Path, source: Path) -> None:
    twice = tmp_path / "twice.jsonl"
    twice.write_text(source.read_text() * 2)
    options = DataOptions(max_length=60, max_prompt_length=30, duplicates="drop")
    report = prepare(twice, model, tmp_path / "set", options, workers=2)
    once = load_preferences(source, load_tokenizer(model), OPTIONS)[1]
    assert (report.pairs, report.dropped["duplicate"]) == (once.pairs, once.pairs)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".pairs.npy"])
@pytest.mark.parametrize("how", ["cut", "flipped", "flipped header", "absent", "empty"])
def test_damaged_files_are_named(copied: Path, suffix: str, how: str) -> None:
    path = part(copied, suffix)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "absent":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        flip(path, 3 if how == "flipped header" else path.stat().st_size // 2)
    message = error_of(lambda: PreparedPairs(copied))
    assert str(copied) in message and "is damaged" in message and "prepare it again" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is damaged"),
        ('{"version": 2}', "version 2 is not 1; prepare it again"),
        ('{"version": 1, "pairs": 3}', "is damaged: KeyError"),
    ],
)
def test_a_broken_sidecar(copied: Path, text: str, words: str) -> None:
    part(copied, ".json").write_text(text)
    assert words in error_of(lambda: PreparedPairs(copied))


def test_an_unfinished_set(copied: Path) -> None:
    part(copied, ".json").unlink()
    assert is_prepared(copied)
    assert "set.json is missing" in error_of(lambda: PreparedPairs(copied))


def test_another_tokenizer_or_template_or_option(made: Path, model: Path) -> None:
    tokenizer, eos = toy("llama3"), end_of_turn_ids(model)
    pairs = PreparedPairs(made)
    pairs.check(fingerprint(tokenizer, eos), {"max_length": 60}, model)
    other = fingerprint(toy("qwen"), eos)
    assert "prepared with another tokenizer" in error_of(lambda: pairs.check(other, {}, model))
    template = {**fingerprint(tokenizer, eos), "template": other["template"]}
    assert "prepared with another template" in error_of(lambda: pairs.check(template, {}, model))
    assert "another tokenizer" in error_of(lambda: pairs.check(fingerprint(tokenizer, [2]), {}, model)), "ends differ"
    message = error_of(lambda: pairs.check(fingerprint(tokenizer, eos), {"max_length": 50}, model))
    assert "prepared with --max-length 60, not 50; drop the flag" in message


def test_the_fingerprint_ignores_how_a_tokenizer_was_called() -> None:
    tokenizer = toy("qwen")
    before = fingerprint(tokenizer, [3])
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=2)
    assert fingerprint(tokenizer, [3]) == before
