"""`megatron_lm.py` inside Megatron-LM's own pretrain(): needs an unmodified checkout, core_v0.16.1.

    MEGATRON_LM_PATH=MEGATRON_LM bash tests/run.sh -k megatron_lm

Megatron-LM's own requirements must be there too: `pip install six pybind11 triton`, make and g++.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from examples.megatron_lm.pretrain_simpo import require_weights
from simpo_megatron import compat, megatron_lm
from simpo_megatron.data.options import DataOptions
from simpo_megatron.data.prepare import prepare
from simpo_megatron.errors import UserError
from simpo_megatron.settings import flag
from tests.support.distributed import BOTH, LOCAL, WorkerError, WorkerPool, free_environment
from tests.support.runs import flags, megatron_lm_args, run_and_read
from tests.support.tiny import make_checkpoint, make_rows, write_rows

ROOT = Path(__file__).parent.parent
MEGATRON_LM = os.environ.get("MEGATRON_LM_PATH")
MISSING = [what for what in compat.missing_for_megatron_lm() if not what.startswith("Megatron-LM itself")]
STEPS = 10
SIMPO: dict[str, Any] = {"simpo_beta": 2.5, "simpo_gamma_beta_ratio": 0.55, "simpo_sft_weight": 0.1}
DPO: dict[str, Any] = {"objective": "dpo", "dpo_beta": 0.2}
KTO: dict[str, Any] = {"objective": "kto", "kto_beta": 0.05}
# The architecture of tests/support/tiny.py, a constant learning rate, and what a machine without a GPU or Apex needs.
ARGUMENTS = """
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --kv-channels 8 --position-embedding-type rope --rotary-base 10000 --normalization RMSNorm
    --norm-epsilon 1e-6 --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --max-position-embeddings 512 --seq-length 256
    --attention-dropout 0 --hidden-dropout 0 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
    --global-batch-size 8 --lr 1e-3 --lr-decay-style constant --lr-warmup-fraction 0 --weight-decay 0 --adam-beta2 0.999
    --clip-grad 1 --seed 1234 --eval-iters 1 --eval-interval 5 --log-interval 1 --tensorboard-log-interval 1
    --ckpt-format torch_dist
    --distributed-backend gloo --transformer-impl local --attention-backend unfused --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
    --no-rope-fusion
""".split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_checkpoint(folder / "model", rms_norm_eps=1e-6), write_rows(folder / "pairs.jsonl", make_rows(30))


def pretrain(argv: list[str], kind: str) -> subprocess.CompletedProcess:
    environment = free_environment()
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (MEGATRON_LM, str(ROOT), environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    script = [str(ROOT / "examples" / "megatron_lm" / "pretrain_simpo.py")]
    arguments = ARGUMENTS
    if kind != LOCAL:
        script = ["-m", "tests.te_on_cpu", kind, *script]
        layers = {"local": "transformer_engine", "unfused": "auto"}
        arguments = [layers.get(word, word) for word in ARGUMENTS]
    return subprocess.run(
        [*command, *script, *arguments, *argv],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
        check=False,
    )


def scalars(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.mark.parametrize(
    "given, refused",
    [
        ({"load": "typo", "finetune": True}, "--load typo "),
        ({"load": "typo"}, "--load typo "),
        ({"load": "typo", "save": "run"}, "--load typo "),
        ({"load": "run", "save": "run", "finetune": True}, "--load run "),
        ({"load": "run", "save": "run", "pretrained_checkpoint": "typo"}, "--pretrained-checkpoint typo "),
        ({"load": "there", "save": "there", "pretrained_checkpoint": "typo"}, None),
        ({"load": "run", "save": "run", "pretrained_checkpoint": "there"}, None),
        ({"load": "run", "save": "run"}, None),
        ({"load": "there", "finetune": True}, None),
        ({}, None),
    ],
)
def test_a_run_does_not_start_from_random_weights_by_mistake(given: dict[str, Any], refused: str | None) -> None:
    nothing = {"load": None, "save": None, "finetune": False, "pretrained_checkpoint": None}
    args = SimpleNamespace(**nothing | given)
    if refused is None:
        require_weights(args, lambda folder: folder == "there")
    else:
        with pytest.raises(UserError, match=f"^{refused}holds no latest_checkpointed_iteration.txt"):
            require_weights(args, lambda folder: folder == "there")


def test_all_that_megatron_lm_lacks_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    everything = (
        r"lacks six and pybind11 and triton \(pip install six pybind11 triton\); make and g\+\+ on PATH, .*; "
        "Megatron-LM itself .*PYTHONPATH=MEGATRON_LM"
    )
    with pytest.raises(UserError, match=everything):
        compat.check_megatron_lm()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "six" else object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert compat.missing_for_megatron_lm() == ["six (pip install six)"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    compat.check_megatron_lm()


def test_without_megatron_lm_the_script_ends_with_one_sentence() -> None:
    script = ROOT / "examples" / "megatron_lm" / "pretrain_simpo.py"
    environment = {**free_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pretrain_simpo.py: Megatron-LM cannot start") and done.stderr.count("\n") == 1


needs_megatron_lm = pytest.mark.skipif(
    not MEGATRON_LM or bool(MISSING), reason=f"MEGATRON_LM_PATH is not set, or lacks {MISSING}"
)


def convert(model: Path, save: Path) -> None:
    command = [sys.executable, "tools/hf_to_megatron.py", "--hf-checkpoint", str(model), "--save", str(save)]
    environment = {**free_environment(), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)


def common(model: Path, data: Path, save: Path, steps: int, objective: dict[str, Any]) -> list[str]:
    """Flags of every run of `pretrain`."""
    argv = ["--tokenizer-model", str(model), "--train-data-path", str(data), "--valid-data-path", str(data)]
    argv += ["--train-iters", str(steps), "--save", str(save), "--save-interval", "5"]
    return argv + [word for name, value in objective.items() for word in (flag(name), str(value))]


def our_run(
    pool: WorkerPool, inputs: tuple[Path, Path], save: Path, steps: int, objective: dict[str, Any]
) -> list[dict[str, float]]:
    """The rows of our trainer with the settings of `ARGUMENTS`."""
    settings = {"seq_length": 256, "train_iters": steps, "seed": 1234}
    settings |= {"lr_decay_style": "constant", "lr_warmup_fraction": 0}
    return run_and_read(pool, 1, flags(*inputs, **settings, **objective), save)


@needs_megatron_lm
@pytest.mark.parametrize("pool", BOTH, indirect=True)
def test_megatron_lm_trains_as_our_trainer_does(pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Ten steps from a converted checkpoint, saved at the fifth; then the last five again, resumed."""
    convert(inputs[0], tmp_path / "converted")
    argv = common(*inputs, tmp_path / "run", STEPS, SIMPO)
    start = ["--load", str(tmp_path / "converted"), "--finetune", "--tensorboard-dir", str(tmp_path / "first")]
    done = pretrain([*argv, *start], pool.kind)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "validation loss at iteration 5" in done.stdout and "rewards/accuracies" in done.stdout
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("5")
    again = ["--load", str(tmp_path / "run"), "--tensorboard-dir", str(tmp_path / "second")]
    resumed = pretrain([*argv, *again], pool.kind)
    assert resumed.returncode == 0, resumed.stderr[-3000:]

    rows = our_run(pool, inputs, tmp_path / "ours", STEPS, SIMPO)
    for ours, theirs in (("loss", "loss"), ("rewards/margins", "rewards/margins"), ("grad_norm", "grad-norm")):
        found = scalars(tmp_path / "first", theirs)
        again = scalars(tmp_path / "second", theirs)
        assert sorted(found) == list(range(1, STEPS + 1)) and sorted(again) == list(range(6, STEPS + 1))
        for row in rows:
            assert found[row["step"]] == pytest.approx(row[ours], rel=1e-5, abs=1e-5)
        for step, value in again.items():
            assert value == found[step]


@pytest.fixture(scope="module")
def scored(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model, and a prepared set with columns of reference log-probs."""
    folder = tmp_path_factory.mktemp("scored")
    rows = [
        {**row, "ref_chosen_logps": -159.5 - number, "ref_rejected_logps": -154.0 - number / 2}
        for number, row in enumerate(make_rows(30))
    ]
    prefix = folder / "set"
    prepare(
        write_rows(folder / "rows.jsonl", rows), inputs[0], prefix, DataOptions(max_length=256, max_prompt_length=128)
    )
    return inputs[0], prefix


@needs_megatron_lm
@pytest.mark.parametrize("objective", [DPO, KTO], ids=lambda objective: objective["objective"])
def test_megatron_lm_trains_with_a_reference(
    pool: WorkerPool, scored: tuple[Path, Path], tmp_path: Path, objective: dict[str, Any]
) -> None:
    convert(scored[0], tmp_path / "converted")
    start = ["--load", str(tmp_path / "converted"), "--finetune", "--tensorboard-dir", str(tmp_path / "logs")]
    done = pretrain([*common(*scored, tmp_path / "run", 3, objective), *start], pool.kind)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in our_run(pool, scored, tmp_path / "ours", 3, objective):
        for name in ("loss", "rewards/chosen", "rewards/rejected"):
            assert scalars(tmp_path / "logs", name)[row["step"]] == pytest.approx(row[name], rel=1e-5, abs=1e-5)


@contextlib.contextmanager
def inside_megatron_lm(given: Any) -> Iterator[None]:
    """Arguments and timers as `pretrain()` makes them, without a checkout."""
    patch = pytest.MonkeyPatch()
    timers = SimpleNamespace(start=lambda: None, stop=lambda: None)
    training = SimpleNamespace(get_args=lambda: given, get_timers=lambda: lambda *names, **levels: timers)
    patch.setitem(sys.modules, "megatron.training", training)
    patch.setattr(megatron_lm, "_loaded", [])
    try:
        yield
    finally:
        patch.undo()


def first_batch(model: Path, data: Path, settings: dict[str, Any]) -> dict[str, float]:
    """On a rank: the metrics of the first global batch of 8 pairs, by the functions that `pretrain()` calls."""
    from megatron.core import num_microbatches_calculator as calculator

    from tests.support.families import build

    given = megatron_lm_args(model, data, **settings, bf16=False, seed=1234, consumed_train_samples=0)
    given.check_for_nan_in_loss_and_grad = False
    _, _, models = build(model)
    calculator.init_num_microbatches_calculator(0, None, 8, 1, 1)
    try:
        with inside_megatron_lm(given):
            whole = megatron_lm.with_logprob_head(lambda: models[0])()
            train, _, _ = megatron_lm.train_valid_test_datasets_provider(None)
            sums = Counter[str]()
            for _ in range(calculator.get_num_microbatches()):
                output, loss_func = megatron_lm.forward_step(train, whole)
                _, found = loss_func(output)
                for name, (total, divisor) in found.items():
                    sums.update({name: total.item(), f"{name}, divisor": divisor.item()})
    finally:
        calculator.unset_num_microbatches_calculator()
    return {name: sums[name] / sums[f"{name}, divisor"] for name in found}


def test_the_loss_with_a_reference_is_that_of_our_trainer(
    pool: WorkerPool, scored: tuple[Path, Path], tmp_path: Path
) -> None:
    found, *_ = pool.run(1, first_batch, *scored, DPO)
    row, *_ = our_run(pool, scored, tmp_path, 1, DPO)
    assert {"loss", "rewards/margins"} < found.keys() and abs(row["rewards/margins"]) > 0.1
    assert found == pytest.approx({name: row[name] for name in found}, rel=1e-5, abs=1e-6)


def test_an_objective_with_a_reference_needs_one_in_the_data(pool: WorkerPool, inputs: tuple[Path, Path]) -> None:
    with pytest.raises(WorkerError, match="--objective dpo compares with a reference model, and the data has no"):
        pool.run(1, first_batch, *inputs, DPO)


class Extended(torch.nn.Module):
    """A user's model: a GPTModel and something beside it."""

    def __init__(self, gpt: Any) -> None:
        super().__init__()
        self.language_model, self.extra = gpt, torch.nn.Linear(4, 4)


def provide(model: Path, data: Path, layout: dict[str, Any], wrapped: bool) -> tuple[bool, bool, int]:
    """On a rank: whether the provider's model has a head, whether `find_head` sees it, and packed attentions."""
    from simpo_megatron.head.layer import LogProbHead, find_head
    from simpo_megatron.models.attention import PackedAttention
    from tests.support.families import build

    _, _, models = build(model, **layout)
    with inside_megatron_lm(megatron_lm_args(model, data)):
        found = megatron_lm.with_logprob_head(lambda: Extended(models[0]) if wrapped else models[0])()
    heads = [module for module in found.modules() if isinstance(module, LogProbHead)]
    return bool(heads), find_head(found) is not None, sum(isinstance(m, PackedAttention) for m in found.modules())


@pytest.mark.parametrize("wrapped", [False, True])
def test_any_provider_gets_a_head_on_its_last_stage(pool: WorkerPool, inputs: tuple[Path, Path], wrapped: bool) -> None:
    layout = {"pipeline_model_parallel_size": 2}
    assert pool.run(2, provide, *inputs, layout, wrapped) == [(False, False, 2), (True, True, 2)]
