"""Training starts from a converted checkpoint as from its source, at any layout, and refuses one of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from simpo_megatron.models.hf_checkpoint import read_hf_config
from tests.support.checkpoints import same_bits, tensors, to_hf, to_megatron
from tests.support.distributed import LOCAL, NEWEST, WorkerPool
from tests.support.runs import flags, read_rows, run_and_read, train, without_speed
from tests.support.tiny import EXPERTS, make_checkpoint, make_rows, write_rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    model = make_checkpoint(folder / "model")
    return model, write_rows(folder / "pairs.jsonl", make_rows(20)), to_megatron(model, folder / "megatron")


@pytest.fixture(scope="module")
def experts(inputs: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("experts")
    model = make_checkpoint(folder / "model", "Mixtral", **EXPERTS)
    return model, inputs[1], to_megatron(model, folder / "megatron")


@pytest.mark.parametrize(
    "pool, which",
    [(LOCAL, "inputs"), (LOCAL, "experts"), pytest.param(NEWEST, "experts", marks=pytest.mark.te)],
    indirect=["pool"],
)
def test_the_same_run_as_from_the_source(
    request: pytest.FixtureRequest, which: str, pool: WorkerPool, tmp_path: Path
) -> None:
    model, data, converted = request.getfixturevalue(which)
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    argv = flags(model, data, train_iters=2, **layout)
    direct = run_and_read(pool, 4, argv, tmp_path / "direct")
    loaded = run_and_read(pool, 4, [*argv, "--load", str(converted)], tmp_path / "loaded")
    assert without_speed(loaded) == without_speed(direct)
    # its own checkpoints resume as any run's
    more = [*argv, "--load", str(tmp_path / "loaded"), "--save", str(tmp_path / "loaded"), "--train-iters", "3"]
    assert pool.run(4, train, more) == [None] * 4
    assert [row["step"] for row in read_rows(tmp_path / "loaded")] == [1, 2, 3]


def test_another_model_is_refused(inputs: tuple[Path, Path, Path], pool: WorkerPool, tmp_path: Path) -> None:
    model, data, converted = inputs
    other = make_checkpoint(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    [message] = pool.run(1, train, [*flags(other, data), "--load", str(converted)])
    assert "layernorm_epsilon" in message and "--hf-checkpoint" in message
    assert model != other


@pytest.mark.parametrize(
    "pool, which, optimizer",
    [
        (LOCAL, "inputs", "use_distributed_optimizer"),
        (LOCAL, "inputs", "no_use_distributed_optimizer"),
        (LOCAL, "experts", "use_distributed_optimizer"),
        pytest.param(NEWEST, "inputs", "no_use_distributed_optimizer", marks=pytest.mark.te),
        pytest.param(NEWEST, "experts", "use_distributed_optimizer", marks=pytest.mark.te),
    ],
    indirect=["pool"],
)
def test_a_run_with_optimizer_state_converts_to_its_export(
    request: pytest.FixtureRequest, which: str, optimizer: str, pool: WorkerPool, tmp_path: Path
) -> None:
    model, data, _ = request.getfixturevalue(which)
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
    layout |= {optimizer: True}
    argv = flags(model, data, train_iters=2, **layout)
    more = ["--save", str(tmp_path / "run"), "--export-hf", str(tmp_path / "export")]
    assert pool.run(4, train, [*argv, *more]) == [None] * 4
    back = to_hf(tmp_path / "run", tmp_path / "back", hf_reference=model)
    assert same_bits(tensors(back), tensors(tmp_path / "export"))
    assert not same_bits(tensors(back), tensors(model))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("Llama", {"rope_theta": 50000.0, "rope_scaling": LLAMA3}),
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("Mistral", {"sliding_window": 24}),
    ],
    ids=["llama3 rope", "linear rope", "window"],
)
def test_a_run_converts_without_a_reference(
    architecture: str, settings: dict[str, Any], inputs: tuple[Path, Path, Path], pool: Any, tmp_path: Path
) -> None:
    """Rope scaling and window are in the arguments that the trainer saves, and in the config.json made from them."""
    model = make_checkpoint(tmp_path / "model", architecture, **settings)
    argv = flags(model, inputs[1], train_iters=1)
    assert pool.run(1, train, [*argv, "--save", str(tmp_path / "run")]) == [None]
    source = read_hf_config(model)
    back = to_hf(tmp_path / "run", tmp_path / "back", vocab_size=source.architecture.vocab_size)
    found = read_hf_config(back)
    assert found.architecture.rope == source.architecture.rope
    assert found.architecture.transformer == source.architecture.transformer
    assert found.config.get("sliding_window") == settings.get("sliding_window")
    assert ("rope_scaling" in found.config) == ("rope_scaling" in settings)
    with_reference = to_hf(tmp_path / "run", tmp_path / "with reference", hf_reference=model)
    assert same_bits(tensors(back), tensors(with_reference))
    ids = torch.randint(source.architecture.vocab_size, (1, 96), generator=torch.Generator().manual_seed(3))
    logits = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits.detach()
        for folder in (back, with_reference)
    ]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
