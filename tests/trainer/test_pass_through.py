"""Fields that are passed through to Megatron: their types, what is refused, and what they change."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from simpo_megatron.config import refused
from simpo_megatron.config.arguments import flat, parse
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError
from simpo_megatron.trainer import pass_through
from simpo_megatron.trainer.pass_through import fields_of
from tests.support.distributed import WorkerPool
from tests.support.runs import Inputs, flags, read_rows, run_and_read, train

ENOUGH = ["--hf-checkpoint", "m", "--train-data", "d.jsonl", "--train-iters", "1"]


def config_of(*more: str) -> Config:
    return parse([*ENOUGH, *more])


@pytest.mark.parametrize(
    "name, item, value",
    [
        ("transformer_config", "moe_router_fusion=true", True),
        ("transformer_config", "moe-router-dtype=fp64", "fp64"),
        ("ddp_config", "bucket_size=20", 20),
        ("ddp_config", "bucket_size=none", None),
    ],
)
def test_a_value_gets_the_type_of_its_field(name: str, item: str, value: Any) -> None:
    [found] = fields_of(config_of("--" + name.replace("_", "-"), item), name).values()
    assert found == value and type(found) is type(value)


def test_a_value_may_be_a_member_or_a_list_of_numbers() -> None:
    assert pass_through._convert("flash", AttnBackend) is AttnBackend.flash
    assert pass_through._convert("1,2", int | list[int]) == [1, 2]
    assert pass_through._convert("core_attn,mlp", list[str] | None) == ["core_attn", "mlp"]
    assert pass_through._convert("0.5", float) == 0.5
    assert pass_through._convert("bf16", torch.dtype) is torch.bfloat16


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--ddp-config", "bucket_size"], "--ddp-config bucket_size is not NAME=VALUE, such as bucket_size=40000000"),
        (["--ddp-config", "bucket_size=1", "bucket-size=2"], "--ddp-config sets bucket_size twice; keep one of them"),
        (
            ["--ddp-config", "bucketsize=1"],
            "--ddp-config bucketsize: DistributedDataParallelConfig has no such field; did you mean bucket_size?",
        ),
        (
            ["--ddp-config", "bucket_size=much"],
            "--ddp-config bucket_size=much: bucket_size is a whole number or none; give such a value",
        ),
        (
            ["--transformer-config", "no_sync_func=f"],
            "--transformer-config no_sync_func cannot be set: it is an object, which no text can be; drop it",
        ),
        (
            ["--transformer-config", "tp_comm_overlap=true"],
            "--transformer-config tp_comm_overlap cannot be set: its buffers have one size, and packed rows change",
        ),
        (["--transformer-config", "num_layers=2"], "num_layers cannot be set: it is a property of the model"),
        (["--optimizer-config", "lr=1"], "--optimizer-config lr cannot be set: this package sets it; use --lr"),
        (
            ["--transformer-config", "apply_rope_fusion=true"],
            "apply_rope_fusion cannot be set: this package sets it; use --rope-fusion",
        ),
        (["--ddp-config", "use_megatron_fsdp=true"], "the head adds to the buffers of Megatron's DDP"),
        (["--transformer-config", "moe_z_loss_coeff=1"], "only the loss of --moe-aux-loss-coeff is made a mean"),
        (["--transformer-config", "hidden_dropout=0.1"], "the two responses of a pair must not see different noise"),
        (["--transformer-config", "cpu_offloading=true"], "layers are not moved to the host as a whole (recompute"),
        (["--optimizer-config", "overlap_param_gather_with_optimizer_step=true"], "the step of the whole optimizer"),
        (["--optimizer-config", "log_num_zeros_in_grad=true"], "cannot be set: nothing here uses it; drop it"),
        (
            ["--transformer-config", "pipeline_model_parallel_layout=Et|tL"],
            "(--decoder-first-pipeline-num-layers); drop",
        ),
        (["--ddp-config", "bucket_size=-5"], "--ddp-config bucket_size=-5 must be greater than 0"),
        (["--ddp-config", "bucket_size=5"], "bucket_size needs --overlap-grad-reduce; drop it, or add that"),
        (["--transformer-config", "batch_p2p_sync=false"], "needs --pipeline-model-parallel-size of at least 2; drop"),
        (
            ["--transformer-config", "moe_router_dtype=fp64"],
            "needs a model with experts, and this one is dense; drop it",
        ),
    ],
)
def test_what_cannot_be_passed_is_one_sentence(argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        config = config_of(*argv)
        for name in pass_through.CLASSES:
            fields_of(config, name)
        pass_through.check_use(config, has_experts=False)
    assert message in str(raised.value)


def test_the_list_of_refused_fields_names_fields_of_megatron() -> None:
    """No pattern is without a field."""
    classes = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
    known = {field.name for cls in classes for field in dataclasses.fields(cls)}
    patterns = [pattern for _, names in refused._GROUPS for pattern in names] + list(refused._OWN_FLAGS)
    assert not [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in known)]
    assert set(refused.BREAKS) - known == {"use_torch_fsdp2"}  # an argument of Megatron-LM alone


def test_they_are_settings_like_the_others(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("ddp_config: [bucket_size=100, average_in_collective=true]\n")
    assert flat(config_of("--config", str(file)))["ddp_config"] == "bucket_size=100 average_in_collective=true"
    file.write_text("ddp_config: {bucket_size: 100}\n")
    with pytest.raises(UserError, match=r"ddp_config is .*; give a list such as \[bucket_size=40000000\]"):
        config_of("--config", str(file))


def _train_and_look(argv: list[str]) -> tuple[str | None, dict[str, Any]]:
    """On a rank: trains, and looks at the engine that trained."""
    from simpo_megatron.trainer import loop

    found: dict[str, Any] = {}
    build = loop.build_engine

    def looked(*args: Any) -> Any:
        engine = build(*args)
        step = engine.optimizer.step

        def stepped() -> Any:
            result = step()
            part = engine.optimizer.chained_optimizers[0]
            found["adam"] = type(part.optimizer).__name__
            found["buckets"] = sum(len(chunk.buffers[0].buckets) for chunk in engine.chunks)
            found["modules"] = engine.transformer.recompute_modules
            return result

        engine.optimizer.step = stepped
        return engine

    loop.build_engine = looked
    try:
        return train(argv), found
    finally:
        loop.build_engine = build


def test_what_is_passed_reaches_megatron(pool: WorkerPool, inputs: Inputs, tmp_path: Path) -> None:
    """Small buckets and another order of averaging leave the losses as they are; recomputed modules too."""
    base = flags(inputs.checkpoint, inputs.data, train_iters=2, global_batch_size=4)
    plain = run_and_read(pool, 2, base, tmp_path / "plain")
    argv = [*base, "--overlap-grad-reduce", "--recompute-granularity", "selective", "--save", str(tmp_path / "run")]
    argv += ["--ddp-config", "bucket_size=1000", "average_in_collective=true"]
    argv += ["--recompute-modules", "mlp", "--optimizer-config", "decoupled_weight_decay=false"]
    [(message, found), _] = pool.run(2, _train_and_look, argv)
    assert message is None and found["buckets"] > 1 and found["modules"] == ["mlp"]
    assert found["adam"] == "Adam", "not AdamW"
    losses = [row["loss"] for row in read_rows(tmp_path / "run")]
    assert losses == pytest.approx([row["loss"] for row in plain], abs=1e-6)


def test_an_assertion_without_text_shows_its_code() -> None:
    config = config_of("--ddp-config", "average_in_collective=true")
    with (
        pytest.raises(UserError, match=r"average_in_collective=true: Megatron refuses it: raise AssertionError$"),
        pass_through.refusals(config, "ddp_config"),
    ):
        raise AssertionError
    with pytest.raises(torch.OutOfMemoryError), pass_through.refusals(config, "ddp_config"):
        raise torch.OutOfMemoryError("no fault of a field")


def test_what_is_not_installed_is_one_sentence(pool: WorkerPool, inputs: Inputs) -> None:
    argv = flags(inputs.checkpoint, inputs.data, fp32=False, use_precision_aware_optimizer=True)
    [message] = pool.run(1, train, argv)
    assert message == (
        "--use-precision-aware-optimizer needs Transformer Engine's Adam, which is not installed here; install it, or "
        "drop the flag"
    )


def test_what_megatron_refuses_is_one_sentence() -> None:
    config = config_of("--ddp-config", "bucket_size=1")
    with (
        pytest.raises(UserError, match=r"^--ddp-config bucket_size=1: Megatron refuses it: too small a bucket$"),
        pass_through.refusals(config, "ddp_config"),
    ):
        raise AssertionError("too small\na bucket")
