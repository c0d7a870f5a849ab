"""`megatron_lm.py` inside Megatron-LM's own pretrain(): needs an unmodified checkout, core_v0.16.1.

    MEGATRON_LM_PATH=MEGATRON_LM bash tests/run.sh -k megatron_lm

Megatron-LM's own requirements must be there too: `pip install six pybind11 triton`, make and g++.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from examples.megatron_lm.pretrain_simpo import require_weights
from simpo_megatron import compat, megatron_lm
from simpo_megatron.config.megatron_lm import notes
from simpo_megatron.errors import UserError
from tests.support.distributed import BOTH, LOCAL, WorkerPool, free_environment
from tests.support.runs import flags, run_and_read
from tests.support.tiny import EXPERTS, make_checkpoint, make_rows, write_rows

ROOT = Path(__file__).parent.parent
MEGATRON_LM = os.environ.get("MEGATRON_LM_PATH")
MISSING = [what for what in compat.missing_for_megatron_lm() if not what.startswith("Megatron-LM itself")]
STEPS = 10
# The architecture of tests/support/tiny.py, a constant learning rate, and what a machine without a GPU or Apex needs.
ARGUMENTS = """
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --kv-channels 8 --position-embedding-type rope --rotary-base 10000 --normalization RMSNorm
    --norm-epsilon 1e-6 --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --max-position-embeddings 512 --seq-length 256
    --attention-dropout 0 --hidden-dropout 0 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
    --global-batch-size 8 --lr 1e-3 --lr-decay-style constant --lr-warmup-fraction 0 --weight-decay 0 --adam-beta2 0.999
    --clip-grad 1 --seed 1234 --eval-iters 1 --eval-interval 5 --log-interval 1 --tensorboard-log-interval 1
    --ckpt-format torch_dist --simpo-beta 2.5 --simpo-gamma-beta-ratio 0.55 --simpo-sft-weight 0.1
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


@pytest.mark.skipif(not MEGATRON_LM or bool(MISSING), reason=f"MEGATRON_LM_PATH is not set, or lacks {MISSING}")
@pytest.mark.parametrize("pool", BOTH, indirect=True)
def test_megatron_lm_trains_as_our_trainer_does(pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Ten steps from a converted checkpoint, saved at the fifth; then the last five again, resumed."""
    model, data = inputs
    convert = [
        sys.executable,
        "tools/hf_to_megatron.py",
        "--hf-checkpoint",
        str(model),
        "--save",
        str(tmp_path / "converted"),
    ]
    subprocess.run(
        convert, cwd=ROOT, env={**free_environment(), "PYTHONPATH": str(ROOT)}, check=True, capture_output=True
    )
    common = ["--tokenizer-model", str(model), "--train-data-path", str(data), "--valid-data-path", str(data)]
    common += ["--train-iters", str(STEPS), "--save", str(tmp_path / "run"), "--save-interval", "5"]
    start = ["--load", str(tmp_path / "converted"), "--finetune", "--tensorboard-dir", str(tmp_path / "first")]
    done = pretrain([*common, *start], pool.kind)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "validation loss at iteration 5" in done.stdout and "rewards/accuracies" in done.stdout
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("5")
    again = ["--load", str(tmp_path / "run"), "--tensorboard-dir", str(tmp_path / "second")]
    resumed = pretrain([*common, *again], pool.kind)
    assert resumed.returncode == 0, resumed.stderr[-3000:]

    settings: dict[str, Any] = {
        "simpo_beta": 2.5,
        "simpo_gamma_beta_ratio": 0.55,
        "simpo_sft_weight": 0.1,
        "seq_length": 256,
    }
    settings |= {"train_iters": STEPS, "seed": 1234, "lr_decay_style": "constant", "lr_warmup_fraction": 0}
    rows = run_and_read(pool, 1, flags(model, data, **settings), tmp_path / "ours")
    for ours, theirs in (("loss", "loss"), ("rewards/margins", "rewards/margins"), ("grad_norm", "grad-norm")):
        found = scalars(tmp_path / "first", theirs)
        again = scalars(tmp_path / "second", theirs)
        assert sorted(found) == list(range(1, STEPS + 1)) and sorted(again) == list(range(6, STEPS + 1))
        for row in rows:
            assert found[row["step"]] == pytest.approx(row[ours], rel=1e-5, abs=1e-5)
        for step, value in again.items():
            assert value == found[step]


def args(model: Path, data: Path, **changes: Any) -> Any:
    """Those of Megatron-LM's arguments that are read."""
    import argparse

    own = vars(megatron_lm.add_simpo_args(argparse.ArgumentParser()).parse_args([]))
    megatron = {
        "micro_batch_size": 1,
        "dataloader_type": "external",
        "calculate_per_token_loss": False,
        "fp16": False,
        "sft": False,
        "mtp_num_layers": None,
        "num_experts": None,
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "allgather",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(model),
        "train_data_path": [str(data)],
        "valid_data_path": None,
        "transformer_impl": "local",
        "context_parallel_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "sequence_parallel": False,
        "bf16": True,
        "accumulate_allreduce_grads_in_fp32": True,
        "seq_length": 256,
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 8,
    }
    return SimpleNamespace(**{**own, **megatron, **changes})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"micro_batch_size": 2}, "--micro-batch-size 2 cannot be used with SimPO: .* set it to 1"),
        ({"calculate_per_token_loss": True}, "--calculate-per-token-loss True .* drop it"),
        ({"fp16": True}, "--fp16 True .* use --bf16"),
        ({"dataloader_type": "cyclic"}, "--dataloader-type cyclic .* set it to external"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1"),
        ({"hidden_dropout": 0.1}, "--hidden-dropout must be 0"),
        ({"tokenizer_type": "NullTokenizer"}, "--tokenizer-type NullTokenizer has no chat template"),
        ({"tokenizer_model": None}, "--tokenizer-model is missing"),
        ({"train_data_path": None}, "--train-data-path is missing"),
        ({"num_layers": 8}, "--num-layers 8, but .* has 4"),
        ({"group_query_attention": False}, "--num-query-groups 4, but .* has 2"),
        (
            {"num_experts": 4, "moe_token_dispatcher_type": "allgather"},
            "--moe-token-dispatcher-type allgather .* use alltoall",
        ),
        (
            {"share_prompts": True, "context_parallel_size": 2},
            "no attention for it under --context-parallel-size 2",
        ),
        ({"objective": "dpo", "simpo_beta": 3.0}, "--simpo-beta belongs to --objective simpo and has no effect"),
        ({"simpo_gamma": 1.0, "simpo_gamma_beta_ratio": 0.5}, "give one of them"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp cannot be used with SimPO: .* --use-distributed-optimizer"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 cannot be used"),
        ({"defer_embedding_wgrad_compute": True}, "--defer-embedding-wgrad-compute cannot .* drop it"),
        ({"tp_comm_overlap": True}, "--tp-comm-overlap cannot .* change in length"),
        ({"fp8": "hybrid"}, "--fp8-format hybrid cannot .* multiple of 16 tokens"),
        ({"fp4": "e2m1"}, "--fp4-format e2m1 cannot"),
        ({"overlap_moe_expert_parallel_comm": True}, "--overlap-moe-expert-parallel-comm cannot"),
        ({"delay_wgrad_compute": True}, "--delay-wgrad-compute cannot"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local cannot .* set it to none"),
        ({"hybrid_context_parallel": True}, "--hybrid-context-parallel cannot"),
        ({"share_prompts": True, "apply_rope_fusion": True}, "--share-prompts: .* give --no-rope-fusion"),
        (
            {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 3, "sequence_parallel": True},
            "--seq-length 256 must be a multiple of 3",
        ),
    ],
    ids=str,
)
def test_what_the_loss_cannot_serve_is_refused(inputs: tuple[Path, Path], changes: dict[str, Any], words: str) -> None:
    megatron_lm.check_args(args(*inputs))
    with pytest.raises(UserError, match=words):
        megatron_lm.check_args(args(*inputs, **changes))


def test_what_is_off_and_what_costs_more_is_not_refused(inputs: tuple[Path, Path]) -> None:
    """Values that Megatron-LM gives to what is off; then what works, with a line that says what it costs."""
    off = {"use_megatron_fsdp": False, "fp8": None, "cuda_graph_impl": "none", "apply_rope_fusion": True}
    given = args(*inputs, **off)
    megatron_lm.check_args(given)
    assert notes(given) == []
    given = args(*inputs, accumulate_allreduce_grads_in_fp32=False, pipeline_model_parallel_size=2)
    megatron_lm.check_args(given)
    bf16, rows = notes(given)
    assert "an fp32 copy of the output layer's gradient" in bf16
    assert "--seq-length 256" in rows and "--variable-seq-lengths" in rows
    assert notes(args(*inputs, simpo_variable_seq_lengths=True, pipeline_model_parallel_size=2)) == []


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
    megatron_lm._args = lambda: args(model, data)
    found = megatron_lm.with_logprob_head(lambda: Extended(models[0]) if wrapped else models[0])()
    heads = [module for module in found.modules() if isinstance(module, LogProbHead)]
    return bool(heads), find_head(found) is not None, sum(isinstance(m, PackedAttention) for m in found.modules())


@pytest.mark.parametrize("wrapped", [False, True])
def test_any_provider_gets_a_head_on_its_last_stage(pool: WorkerPool, inputs: tuple[Path, Path], wrapped: bool) -> None:
    layout = {"pipeline_model_parallel_size": 2}
    assert pool.run(2, provide, *inputs, layout, wrapped) == [(False, False, 2), (True, True, 2)]


def test_experts_need_the_dispatcher_that_takes_rows_of_any_length(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "Mixtral", **EXPERTS)
    data = write_rows(tmp_path / "pairs.jsonl", make_rows(3))
    megatron_lm.check_args(args(model, data, num_experts=4, moe_token_dispatcher_type="alltoall"))
