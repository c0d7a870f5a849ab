"""Runs on prepared sets and blends: trained as the raw file, the same pairs at any DP size, clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.config.arguments import parse
from simpo_megatron.config.data import DataConfig
from simpo_megatron.data.prepare import prepare
from simpo_megatron.data.tokenizer import load_tokenizer
from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from simpo_megatron.trainer.data import open_prepared
from tests.support.distributed import WorkerPool
from tests.support.runs import flags, run_and_read, train
from tests.support.tiny import make_checkpoint, make_rows, make_tokenizer, write_rows

OPTIONS = DataConfig(seq_length=512).options


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, a raw file and the same file prepared."""
    folder = tmp_path_factory.mktemp("inputs")
    checkpoint = make_checkpoint(folder / "model")
    raw = write_rows(folder / "pairs.jsonl", make_rows(20))
    prepare(raw, checkpoint, folder / "prepared", OPTIONS)
    return checkpoint, raw, folder / "prepared"


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def test_a_prepared_set_trains_as_its_source_does(
    pool: WorkerPool, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    checkpoint, raw, prepared = inputs
    wanted = run_and_read(pool, 2, flags(checkpoint, raw, valid_data=raw), tmp_path / "raw")
    run = tmp_path / "run"
    found = run_and_read(pool, 2, flags(checkpoint, prepared, valid_data=prepared), run)
    assert losses(found) == losses(wanted) and len(losses(found)) == 4
    assert [row.get("eval/loss") for row in found] == [row.get("eval/loss") for row in wanted]
    # A checkpoint does not mind which of the two it is resumed on: the ids are the same.
    run_and_read(pool, 2, flags(checkpoint, raw, load=run, train_iters=5), run)


def recorded(argv: list[str]) -> list[list[int]]:
    """On a rank: the pairs of its rows of every step of a run."""
    from simpo_megatron.trainer.engine import Engine

    seen: list[list[int]] = []
    original = Engine.train_step

    def train_step(self: Any, batch: Any) -> dict[str, float]:
        seen.append([pair for row in batch.microbatches for pair in row])
        return original(self, batch)

    Engine.train_step = train_step  # type: ignore[method-assign]
    try:
        message = train(argv)
    finally:
        Engine.train_step = original  # type: ignore[method-assign]
    assert message is None, message
    return seen


def batches(ranks: list[list[list[int]]]) -> list[list[int]]:
    """The pairs of every global batch, whichever rank had them."""
    return [sorted(pair for rank in step for pair in rank) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("blend", [False, True], ids=["one set", "blend"])
def test_another_number_of_ranks_takes_the_same_pairs_to_every_step(
    pool: WorkerPool, inputs: tuple[Path, Path, Path], tmp_path: Path, blend: bool
) -> None:
    checkpoint, raw, prepared = inputs
    sources = ["0.75", str(prepared), "0.25", str(raw)] if blend else [str(prepared)]
    argv = flags(checkpoint, prepared, train_iters=6)
    at = argv.index("--train-data")
    argv[at + 1 : at + 2] = sources
    whole = batches(pool.run(1, recorded, argv))
    assert [len(pairs) for pairs in whole] == [8] * 6
    if not blend:
        assert set(whole[0] + whole[1]) | set(whole[2]) == set(range(20)), "an epoch is every pair"
        assert len(set(whole[0] + whole[1])) == 16, "and none of them twice"
    stopped = [*argv, "--save", str(tmp_path), "--load", str(tmp_path)]
    first = argv.index("--train-iters") + 1
    begun = [*stopped[:first], "2", *stopped[first + 1 :]]
    assert batches(pool.run(2, recorded, begun)) == whole[:2]
    assert batches(pool.run(4, recorded, [*stopped[:first], "5", *stopped[first + 1 :]])) == whole[2:5]
    assert batches(pool.run(1, recorded, stopped)) == whole[5:]


def refused(pool: Any, argv: list[str], world: int = 1) -> str:
    messages = pool.run(world, train, argv)
    assert len(set(messages)) == 1 and messages[0] is not None
    assert "\n" not in messages[0]
    return messages[0]


def test_what_was_prepared_for_another_model(pool: WorkerPool, inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, raw, prepared = inputs
    other = make_checkpoint(tmp_path / "other")
    tokenizer = make_tokenizer("{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|eot|>{% endfor %}")
    for path in (*other.glob("tokenizer*"), *other.glob("chat_template*")):
        path.unlink()
    tokenizer.save_pretrained(other)
    message = refused(pool, flags(other, prepared), world=2)
    assert f"{prepared}: prepared with another template" in message and "preprocess_preferences.py" in message
    message = refused(pool, flags(checkpoint, prepared, assistant_header="response"))
    assert "prepared with --assistant-header prompt, not response" in message
    message = refused(pool, flags(checkpoint, prepared, seq_length=60, max_length=30, max_prompt_length=15))
    assert "not 30" in message
    message = refused(pool, flags(checkpoint, prepared, seq_length=60))
    assert "holds a sequence of" in message and "--seq-length" in message
    message = refused(pool, [*flags(checkpoint, prepared), "--train-data", "x", str(prepared), "1", str(raw)])
    assert "the weight 'x' of" in message


def test_an_option_that_is_given_is_compared_though_it_is_the_default(
    pool: WorkerPool, inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    checkpoint, raw, _ = inputs
    prefix, config = tmp_path / "set", tmp_path / "run.yaml"
    prepare(raw, checkpoint, prefix, replace(OPTIONS, tie_policy="zero-margin"))
    words = f"{prefix}: prepared with --tie-policy zero-margin, not drop; drop the flag, or prepare it again"
    argv = flags(checkpoint, prefix)
    assert words in refused(pool, [*argv, "--tie-policy", "drop"])
    config.write_text("tie_policy: drop\n")
    assert words in refused(pool, [*argv, "--config", str(config)])
    config.write_text("tie_policy: zero-margin\n")
    for given in ([], ["--config", str(config)]):
        data, hf = parse([*argv, *given]).data, read_hf_checkpoint(checkpoint)
        assert len(open_prepared(str(prefix), data, hf, load_tokenizer(checkpoint))) == 20
    assert DataConfig(seq_length=512, tie_policy="zero-margin").given_options == {"tie_policy": "zero-margin"}


def test_a_damaged_set(pool: WorkerPool, inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    checkpoint, raw, _ = inputs
    prepare(raw, checkpoint, tmp_path / "set", OPTIONS)
    binary = tmp_path / "set.bin"
    binary.write_bytes(binary.read_bytes()[:-4])
    assert f"{binary} is damaged" in refused(pool, flags(checkpoint, tmp_path / "set"), world=2)
    about = json.loads((tmp_path / "set.json").read_text())
    assert about["pairs"] == 20


def test_shared_prompts_where_they_cannot_be(pool: WorkerPool, inputs: tuple[Path, Path, Path]) -> None:
    checkpoint, raw, _ = inputs
    message = refused(pool, flags(checkpoint, raw, share_prompts=True, context_parallel_size=2))
    assert "--share-prompts: there is no attention for it under --context-parallel-size 2" in message
    message = refused(pool, flags(checkpoint, raw, share_prompts=True, objective="sft"))
    assert "--share-prompts: the objective scores the chosen response alone" in message


def pretend_transformer_engine(argv: list[str]) -> str | None:
    """On a rank: trains where Transformer Engine seems to be installed."""
    from simpo_megatron.models import spec

    original = spec.have_transformer_engine
    spec.have_transformer_engine = lambda: True
    try:
        return train(argv)
    finally:
        spec.have_transformer_engine = original


def test_shared_prompts_under_transformer_engine(pool: WorkerPool, inputs: tuple[Path, Path, Path]) -> None:
    [message] = pool.run(1, pretend_transformer_engine, flags(inputs[0], inputs[1], share_prompts=True))
    assert "--share-prompts: Transformer Engine's attention cannot" in message and "--transformer-impl local" in message
