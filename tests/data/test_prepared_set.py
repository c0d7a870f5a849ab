"""A prepared set holds the pairs of its source, byte for byte the same whoever made it, and says what is wrong with it."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from simpo_megatron.data import DataOptions, load_preferences
from simpo_megatron.data.prepare import prepare
from simpo_megatron.data.prepared_set import SUFFIXES, PreparedPairs, is_prepared, part
from simpo_megatron.data.tokenizer import fingerprint, load_tokenizer
from simpo_megatron.errors import UserError
from simpo_megatron.files import end_of_turn_ids
from tests.support.toy_tokenizers import toy

OPTIONS = DataOptions(max_length=60, max_prompt_length=30)


def rows(count=1203):
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
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    toy("llama3").save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 1]}')
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(scope="module")
def made(model, source, tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("made") / "set"
    prepare(source, model, prefix, OPTIONS)
    return prefix


@pytest.fixture
def copied(made, tmp_path) -> Path:
    for suffix in SUFFIXES:
        shutil.copy(part(made, suffix), part(tmp_path / "set", suffix))
    return tmp_path / "set"


def error_of(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_the_same_pairs_as_in_memory(made, source, model):
    store, report = load_preferences(source, load_tokenizer(model), OPTIONS, eos_token_ids=end_of_turn_ids(model))
    pairs = PreparedPairs(made)
    assert 0 < len(pairs) == len(store) < report.rows, "ties are dropped"
    assert pairs.report == report
    assert report.truncated_chosen and not report.truncated_rejected
    for name in ("prompt_length", "chosen_length", "rejected_length", "weight", "margin", "truncated"):
        found, wanted = getattr(pairs, name)[:], getattr(store, name)
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == wanted.dtype
    for i in range(len(store)):
        for found, wanted in zip(pairs.pair(i), store.pair(i), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert (pairs.fingerprint, pairs.largest_token) == (store.fingerprint, store.largest_token)
    assert (pairs.longest_sequence, pairs.pair_tokens.max()) == (60, store.pair_tokens.max())
    assert pairs.order(7, 9, seed=3).tolist() == store.order(7, 9, seed=3).tolist()
    scores = [row["score_rejected"] for row in rows() if row["score_rejected"] != 2]
    assert pairs.records["score_rejected"].tolist() == scores
    assert [rows()[row - 1]["weight"] for row in pairs.records["row"]] == pairs.weight.tolist()


def test_megatron_reads_the_documents(made):
    data, pairs = IndexedDataset(str(made)), PreparedPairs(made)
    assert np.diff(data.document_indices).tolist() == [3] * len(pairs)
    sequences = data[3:6]
    assert [sequence.tolist() for sequence in sequences] == [ids.tolist() for ids in pairs.pair(1)]


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_files(made, source, model, tmp_path, workers):
    prepare(source, model, tmp_path / "set", OPTIONS, workers=workers)
    for suffix in SUFFIXES:
        assert part(tmp_path / "set", suffix).read_bytes() == part(made, suffix).read_bytes(), suffix
    assert len(list(tmp_path.iterdir())) == len(SUFFIXES), "nothing is left beside them"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_the_set_that_was_there(copied, source, model, workers):
    before = {suffix: part(copied, suffix).read_bytes() for suffix in SUFFIXES}
    broken = copied.parent / "broken.jsonl"
    broken.write_text(source.read_text() + '{"prompt": "p"}\n')
    message = error_of(lambda: prepare(broken, model, copied, OPTIONS, workers=workers))
    assert message.startswith(f"{broken}:1204: no `chosen`")
    broken.unlink()
    assert {suffix: part(copied, suffix).read_bytes() for suffix in SUFFIXES} == before
    assert len(list(copied.parent.iterdir())) == len(SUFFIXES)


def test_a_set_is_replaced_under_a_reader(copied, source, model):
    reader = PreparedPairs(copied)
    wanted = [ids.tolist() for ids in reader.pair(0)]
    short = copied.parent / "short.jsonl.gz"
    short.write_bytes(gzip.compress(source.read_bytes().splitlines(keepends=True)[3]))
    prepare(short, model, copied, OPTIONS)
    assert len(PreparedPairs(copied)) == 1
    assert [ids.tolist() for ids in reader.pair(0)] == wanted


def test_files_of_something_else_are_left_alone(tmp_path, source, model):
    part(tmp_path / "text", ".bin").write_bytes(b"tokens of a pretraining set")
    message = error_of(lambda: prepare(source, model, tmp_path / "text", OPTIONS))
    assert "--output-prefix" in message and "choose another" in message


def test_no_pair_left(tmp_path, model):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"prompt": "p", "chosen": "", "rejected": "a"}\n')
    assert "no pair is left of 1 rows" in error_of(lambda: prepare(path, model, tmp_path / "set", OPTIONS))
    assert not is_prepared(tmp_path / "set")


def test_duplicates_across_chunks(tmp_path, model, source):
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
def test_damaged_files_are_named(copied, suffix, how):
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
def test_a_broken_sidecar(copied, text, words):
    part(copied, ".json").write_text(text)
    assert words in error_of(lambda: PreparedPairs(copied))


def test_an_unfinished_set(copied):
    part(copied, ".json").unlink()
    assert is_prepared(copied)
    assert "no set.json, so it is no prepared set" in error_of(lambda: PreparedPairs(copied))


def test_another_tokenizer_or_template_or_option(made, model):
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


def test_the_fingerprint_ignores_how_a_tokenizer_was_called():
    tokenizer = toy("qwen")
    before = fingerprint(tokenizer, [3])
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=2)
    assert fingerprint(tokenizer, [3]) == before
