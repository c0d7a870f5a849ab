"""The verification of layouts: right layouts pass, planted mistakes do not, and its reference is transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from simpo_megatron.verify.reference import Reference
from simpo_megatron.verify.report import TOLERANCE
from tests.support import families
from tests.support.distributed import BOTH, LOCAL, NEWEST, WorkerPool
from tests.support.pairs import make_pairs
from tests.support.planted import PLANTED, planted
from tests.support.runs import flags
from tests.support.steps import CASES, oracle
from tests.support.tiny import EXPERTS, make_checkpoint, make_rows, write_rows
from tests.test_layouts import CP2, EP2, SP, VPP, WHOLE, check_layout
from tools import verify_layout

SEQ_LENGTH = 256


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "llama": make_checkpoint(folder / "llama"),
        "mixtral": make_checkpoint(folder / "mixtral", "Mixtral", **EXPERTS),
        "bf16": make_checkpoint(folder / "bf16", dtype=torch.bfloat16),
        "data": write_rows(folder / "pairs.jsonl", make_rows(9)),
    }


def run_verify(argv: list[str], mistake: str | None = None) -> int:
    """On a rank: the program's exit code."""
    if mistake is None:
        return verify_layout.main(argv)
    with planted(mistake):
        return verify_layout.main(argv)


def command_line(inputs: dict[str, Path], model: str, settings: dict[str, Any]) -> list[str]:
    of_training = {"train_iters": False, "lr": False}  # left out
    return flags(inputs[model], inputs["data"], **{"seq_length": SEQ_LENGTH, **of_training, **settings})


@pytest.mark.parametrize("pool", BOTH, indirect=True)
@pytest.mark.parametrize(
    "model, world, settings",
    [
        ("llama", 2, VPP),
        ("llama", 4, {**CP2, **SP, "simpo_sft_weight": 0.5}),
        ("llama", 2, {"objective": "sft"}),
        ("mixtral", 4, {**SP, **EP2, **WHOLE, "pipeline_model_parallel_size": 2}),
        ("llama", 2, {"head": "plain", "tensor_model_parallel_size": 2, "objective": "dpo"}),
        ("bf16", 2, {**CP2, "fp32": False}),
    ],
    ids=str,
)
def test_a_right_layout_passes(
    pool: WorkerPool, inputs: dict[str, Path], tmp_path: Path, model: str, world: int, settings: dict[str, Any]
) -> None:
    report = tmp_path / "report.json"
    argv = [*command_line(inputs, model, settings), "--json", str(report)]
    assert pool.run(world, run_verify, argv) == [0] * world
    found = json.loads(report.read_text())
    names = set(read_hf_checkpoint(inputs[model]).tensors)
    assert found["passed"] and {entry["name"] for entry in found["gradients"]} == names
    assert len(found["pairs"]) == 8 and all(pair["found"] for pair in found["pairs"])
    assert found["microbatches"] >= 2 and not found["uncompared"]
    assert 0 < max(entry["error"] for entry in found["gradients"]) < (1e-5 if model != "bf16" else 0.1)


# With Transformer Engine: those behind its parallel linears and its ring attention.
@pytest.mark.parametrize(
    "pool, mistake",
    [
        *((LOCAL, mistake) for mistake in PLANTED),
        pytest.param(NEWEST, "hidden gradient not reduced", marks=pytest.mark.te),
        pytest.param(NEWEST, "labels shifted after slicing", marks=pytest.mark.te),
        pytest.param(NEWEST, "context factor dropped", marks=pytest.mark.te),
    ],
    indirect=["pool"],
)
def test_a_planted_mistake_does_not(
    pool: WorkerPool, inputs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], mistake: str
) -> None:
    world, layout = PLANTED[mistake]
    report = tmp_path / "report.json"
    argv = [*command_line(inputs, "llama", layout), "--json", str(report)]
    assert pool.run(world, run_verify, argv, mistake) == [1] * world
    found = json.loads(report.read_text())
    assert not found["passed"]
    assert found["gradients"][0]["error"] > 100 * found["gradients"][0]["allowed"]
    values = {entry["name"]: entry["error"] <= entry["allowed"] for entry in found["values"]}
    right_forward = mistake in ("plain all-reduce", "hidden gradient not reduced", "context factor dropped")
    assert values["summed log-probs"] == (mistake != "labels shifted after slicing")
    assert values["loss"] == right_forward and not values["all gradients"]


def test_a_tensor_that_nobody_compares_does_not_pass(pool: WorkerPool, inputs: dict[str, Path], tmp_path: Path) -> None:
    assert pool.run(1, run_without_a_tensor, command_line(inputs, "llama", {})) == [1]


def run_without_a_tensor(argv: list[str]) -> int:
    """On a rank: the reference gives a gradient another name."""
    from simpo_megatron.verify.reference import Reference as Whole

    gradients = Whole.gradients
    Whole.gradients = lambda self, slopes: ((n.replace("norm", "rms", 1), g) for n, g in gradients(self, slopes))  # type: ignore[method-assign]
    try:
        return verify_layout.main(argv)
    finally:
        Whole.gradients = gradients  # type: ignore[method-assign]


def test_the_users_guide_has_these_tolerances() -> None:
    guide = Path(__file__).parents[2] / "simpo_megatron" / "verify" / "README.md"
    lines = guide.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| compared |"))
    rows = [line.strip("|").split("|")[1:] for line in lines[start + 2 : start + 2 + len(TOLERANCE)]]
    assert [tuple(map(float, row)) for row in rows] == list(TOLERANCE.values())


def test_experts_are_verified_in_fp32(
    pool: WorkerPool, inputs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert pool.run(1, run_verify, command_line(inputs, "mixtral", {"fp32": False})) == [2]


def run_planted_case(checkpoint: Path, layout: dict[str, Any], mistake: str, names: list[str]) -> Any:
    from tests.support.steps import run_cases

    with planted(mistake):
        return run_cases(checkpoint, layout, names)


@pytest.mark.parametrize("mistake", PLANTED)
def test_the_grid_sees_it_too(
    pool: WorkerPool, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    """`test_layouts.py` fails where the mistake is planted."""
    world, layout = PLANTED[mistake]
    model = AutoModelForCausalLM.from_pretrained(inputs["llama"], dtype=torch.float32)
    wanted = {"columns": oracle(model, CASES["columns"])}
    run = pool.run
    monkeypatch.setattr(
        pool, "run", lambda w, f, path, what, names: run(w, run_planted_case, path, what, mistake, names)
    )
    with pytest.raises(AssertionError, match="columns"):
        check_layout(pool, inputs["llama"], wanted, world, layout)


@pytest.mark.parametrize("name", ["llama_tied", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "qwen3_moe_plain"])
def test_the_reference_is_the_whole_model(name: str, tmp_path: Path) -> None:
    """Layer by layer or at once: the same sums and gradients, under the names of the checkpoint."""
    model = families.make(name, tmp_path, pad_token_id=None)  # transformers leaves the row of padding without gradient
    pairs = make_pairs([(5, 12, 4), (1, 3, 20)], vocab_size=families.VOCAB)
    reference = Reference(read_hf_checkpoint(tmp_path), torch.float32, "cpu")
    sums = reference.forward(pairs, [1, 0], 2)
    slopes = torch.tensor([[0.3, -2.0], [1.0, 0.5]], dtype=torch.float64)

    expected = []
    for prompt, *responses in (pairs.pair(i) for i in (1, 0)):
        for response in responses:
            ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            expected.append(logps[len(prompt) - 1 :].sum())
    whole = torch.stack(expected).view(2, 2)
    (whole * slopes).sum().backward()
    torch.testing.assert_close(sums, whole.double(), rtol=1e-6, atol=1e-5)
    found = dict(reference.gradients(slopes))
    wanted = families.on_disk(model, {key: parameter.grad for key, parameter in model.named_parameters()})
    assert found.keys() == wanted.keys() == read_hf_checkpoint(tmp_path).tensors.keys()
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-5 * gradient.norm(), key
