"""Saving and resuming.

A resumed run is the uninterrupted one: bit for bit in the same layout, up to rounding in another. A failure leaves the
last checkpoint intact.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpo_megatron.checkpoint.folder import TRACKER, latest_step
from simpo_megatron.errors import UserError
from simpo_megatron.trainer.folders import check_writable
from tests.support.distributed import BOTH, LOCAL, NEWEST, Pools, WorkerPool
from tests.support.families import GEMMA3
from tests.support.runs import flags, read_rows, run_and_read, run_main, train
from tests.support.tiny import EXPERTS, make_checkpoint, make_rows, write_rows

MEASURED = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "learning_rate")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return make_checkpoint(folder / "model"), write_rows(folder / "pairs.jsonl", make_rows(30))


def numbers(rows: list[dict[str, float]]) -> list[list[float]]:
    return [[row[name] for name in MEASURED] for row in rows]


BF16 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "fp32": False, "bf16": True}


@pytest.mark.parametrize(
    "pool, world, layout",
    [
        (LOCAL, 1, {"no_use_distributed_optimizer": True}),
        (LOCAL, 4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (LOCAL, 4, BF16),
        pytest.param(NEWEST, 4, BF16, marks=pytest.mark.te),
    ],
    indirect=["pool"],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path, world: int, layout: dict
) -> None:
    argv = [str(x) for x in flags(*inputs, train_iters=4, save_interval=2, **layout) if x != "False"]
    argv = [x for x in argv if not (x == "--fp32" and "bf16" in layout)]
    whole = run_and_read(pool, world, argv, tmp_path / "whole")
    # What a kill after step 3 leaves behind: the checkpoint of step 2, and a log that is already further.
    killed = shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (killed / TRACKER).write_text("2")
    resumed = run_and_read(pool, world, [*argv, "--load", str(killed)], killed)
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    assert numbers(resumed) == numbers(whole)


@pytest.mark.parametrize(
    "pool, before, after, settings",
    [
        pytest.param(LOCAL, 1, 2, [], id="DP 1 to 2"),
        pytest.param(LOCAL, 2, 1, ["--bf16", "--context-parallel-size", "1"], id="CP 2 to 1"),
        pytest.param(LOCAL, 2, 2, ["--pipeline-model-parallel-size", "2"], id="DP 2 to PP 2"),
        pytest.param(LOCAL, 1, 2, ["--tensor-model-parallel-size", "2"], id="TP 1 to 2"),
        pytest.param(NEWEST, 1, 2, ["--tensor-model-parallel-size", "2"], id="te, TP 1 to 2", marks=pytest.mark.te),
    ],
    indirect=["pool"],
)
def test_resume_in_another_layout(
    pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path, before: int, after: int, settings: list[str]
) -> None:
    """At another DP or CP size by default, and at another TP or PP with the flag, which a refusal names."""
    argv, layout = flags(*inputs, train_iters=4, save_interval=2), [] if "--bf16" in settings else settings
    if "--bf16" in settings:
        argv = [*(word for word in argv if word != "--fp32"), "--bf16", "--context-parallel-size", str(before)]
    if layout:
        run_and_read(pool, before, argv, tmp_path / "default")
        refused = [*argv, *layout, "--load", str(tmp_path / "default"), "--save", str(tmp_path / "refused")]
        for message in pool.run(after, train, refused):
            assert f"was saved with {layout[0]} 1, not {layout[0]} 2" in message
            assert "save once with --dist-ckpt-optim-fully-reshardable" in message
        argv.append("--dist-ckpt-optim-fully-reshardable")
    whole = run_and_read(pool, before, argv, tmp_path / "run")
    (tmp_path / "run" / TRACKER).write_text("2")
    resumed = run_and_read(pool, after, [*argv, *settings, "--load", str(tmp_path / "run")], tmp_path / "other")
    assert [row["step"] for row in resumed] == [3, 4]
    tolerance = 2e-2 if "--bf16" in settings else 1e-4
    for ours, theirs in zip(numbers(resumed), numbers(whole[2:]), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance / 100)


@pytest.mark.parametrize("pool", BOTH, indirect=True)
def test_experts_and_context_parallelism_resume_too(pool: WorkerPool, tmp_path: Path) -> None:
    """Saved with experts over 2 ranks, resumed with experts split over tensor-parallel ranks and sequences over two."""
    inputs = (
        make_checkpoint(tmp_path / "model", "Mixtral", **EXPERTS),
        write_rows(tmp_path / "pairs.jsonl", make_rows(30)),
    )
    argv = flags(*inputs, train_iters=4, save_interval=2, export_hf=tmp_path / "export")
    argv.append("--dist-ckpt-optim-fully-reshardable")
    layout = ["--expert-model-parallel-size", "2", "--context-parallel-size", "2"]
    whole = run_and_read(pool, 2, [*argv, *layout], tmp_path / "run")
    (tmp_path / "run" / TRACKER).write_text("2")
    other = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2"]
    argv[argv.index(str(tmp_path / "export"))] = str(tmp_path / "export of the resumed run")
    resumed = run_and_read(pool, 4, [*argv, *other, "--load", str(tmp_path / "run")], tmp_path / "other")
    assert [row["step"] for row in resumed] == [3, 4]
    for ours, theirs in zip(numbers(resumed), numbers(whole[2:]), strict=True):
        assert all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in zip(ours, theirs, strict=True))
    exported = [load_tensors(tmp_path / name) for name in ("export", "export of the resumed run")]
    assert exported[0].keys() == exported[1].keys() == load_tensors(inputs[0]).keys()
    for name, tensor in exported[0].items():
        torch.testing.assert_close(tensor, exported[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.te
@pytest.mark.parametrize("architecture, settings", [("Gemma3", GEMMA3), ("Mixtral", EXPERTS)], ids=["dense", "experts"])
@pytest.mark.parametrize("first, second", [(LOCAL, NEWEST), (NEWEST, LOCAL)], ids=["to te", "to local"])
def test_a_run_resumes_with_the_other_layers(
    pools: Pools, tmp_path: Path, architecture: str, settings: dict[str, Any], first: str, second: str
) -> None:
    """Installing Transformer Engine, or removing it, between two parts of a run changes nothing but rounding."""
    model = make_checkpoint(tmp_path / "model", architecture, **settings)
    data = write_rows(tmp_path / "pairs.jsonl", make_rows(30))
    argv = flags(model, data, train_iters=4, save_interval=2, tensor_model_parallel_size=2, sequence_parallel=True)
    argv.append("--dist-ckpt-optim-fully-reshardable")
    whole = run_and_read(pools[first], 2, argv, tmp_path / "run")
    (tmp_path / "run" / TRACKER).write_text("2")
    [(code, out, err), _] = pools[second].run(
        2, run_main, [*argv, "--load", str(tmp_path / "run"), "--save", str(tmp_path / "other")]
    )
    assert code == 0, err
    names = {LOCAL: "local", NEWEST: "transformer_engine"}
    assert f"resumed with transformer_impl {names[second]}, was {names[first]}" in out
    resumed = read_rows(tmp_path / "other")
    for ours, theirs in zip(numbers(resumed), numbers(whole[2:]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.te
@pytest.mark.parametrize("form", [[], ["--dist-ckpt-optim-fully-reshardable"]], ids=["default", "fully reshardable"])
@pytest.mark.parametrize("first, second", [(LOCAL, NEWEST), (NEWEST, LOCAL)], ids=["to te", "to torch"])
def test_a_run_resumes_with_the_other_adam(
    pools: Pools, inputs: tuple[Path, Path], tmp_path: Path, form: list[str], first: str, second: str
) -> None:
    """The layers are the same, so the default form of the optimizer state fits: torch's Adam and FusedAdam share it."""
    argv = [*flags(*inputs, train_iters=4, save_interval=2, transformer_impl="local"), *form]
    whole = run_and_read(pools[first], 1, argv, tmp_path / "run")
    (tmp_path / "run" / TRACKER).write_text("2")
    resumed = run_and_read(pools[second], 1, [*argv, "--load", str(tmp_path / "run")], tmp_path / "other")
    for ours, theirs in zip(numbers(resumed), numbers(whole[2:]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.te
def test_other_layers_are_refused_in_the_default_form(pools: Pools, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Transformer Engine's layers hold the same parameters in another order, so equal sizes prove nothing."""
    run_and_read(pools[LOCAL], 1, flags(*inputs, train_iters=1), tmp_path / "run")
    [message] = pools[NEWEST].run(1, train, [*flags(*inputs, train_iters=2), "--load", str(tmp_path / "run")])
    assert "does not fit the parameters" in message and "--dist-ckpt-optim-fully-reshardable" in message


def with_the_old_name(argv: list[str]) -> str | None:
    """On a rank: trains with the name that the norm before experts had in checkpoints of 0.1."""
    from simpo_megatron.models import spec

    make = spec.get_gpt_layer_local_spec

    class Kept(dict[str, str]):
        def __delitem__(self, key: str) -> None: ...

    def local_spec(**settings: Any) -> Any:
        made: Any = make(**settings)
        made.submodules.sharded_state_dict_keys_map = Kept(made.submodules.sharded_state_dict_keys_map)
        return made

    spec.get_gpt_layer_local_spec = local_spec
    try:
        return train(argv)
    finally:
        spec.get_gpt_layer_local_spec = make


def test_experts_of_an_older_release_resume(pool: WorkerPool, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "Mixtral", **EXPERTS)
    argv = flags(model, write_rows(tmp_path / "pairs.jsonl", make_rows(30)), train_iters=4, save_interval=2)
    assert pool.run(1, with_the_old_name, [*argv, "--save", str(tmp_path / "run")]) == [None]
    whole = read_rows(tmp_path / "run")
    (tmp_path / "run" / TRACKER).write_text("2")
    resumed = run_and_read(pool, 1, [*argv, "--load", str(tmp_path / "run")], tmp_path / "other")
    assert numbers(resumed) == numbers(whole[2:])


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def train_on_a_full_disk(argv: list[str]) -> str | None:
    """The checkpoint writer meets ENOSPC from step 4 on, as its own process reports it."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original = filesystem_async._write_item

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    from simpo_megatron.trainer.checkpointing import CheckpointWriter

    save = CheckpointWriter.save

    def save_then_fill(writer: Any, root: Path, progress: Any) -> None:
        if progress.step > 3:
            filesystem_async._write_item = full
        save(writer, root, progress)

    CheckpointWriter.save = save_then_fill
    try:
        return train(argv)
    finally:
        filesystem_async._write_item = original
        CheckpointWriter.save = save


@pytest.mark.parametrize("more", [{}, {"async_save": True}], ids=["waiting", "async"])
def test_a_full_disk_leaves_the_last_checkpoint(
    pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path, more: dict[str, Any]
) -> None:
    argv = flags(*inputs, train_iters=6, save_interval=3, save=tmp_path / "run", tensor_model_parallel_size=2, **more)
    messages = pool.run(2, train_on_a_full_disk, argv)
    assert None not in messages
    assert "No space left" in messages[0] and "iter_0000003 is still complete" in messages[0]
    assert latest_step(tmp_path / "run") == 3
    folders = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert folders == ["iter_0000003", "tensorboard"]
    assert pool.run(2, train, [*argv, "--load", str(tmp_path / "run")]) == [None, None]
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_resuming_on_other_data_is_refused(pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    argv = flags(*inputs, train_iters=2)
    run_and_read(pool, 1, argv, tmp_path / "run")
    other = write_rows(tmp_path / "other.jsonl", make_rows(31))
    [message] = pool.run(1, train, [*flags(inputs[0], other, train_iters=4), "--load", str(tmp_path / "run")])
    assert "the number of training pairs was 30" in message and "31 now" in message


def test_resuming_another_model_is_refused(pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run_and_read(pool, 1, flags(*inputs, train_iters=1), tmp_path / "run")
    wider = make_checkpoint(tmp_path / "wider", num_hidden_layers=6)
    [message] = pool.run(1, train, [*flags(wider, inputs[1]), "--load", str(tmp_path / "run")])
    assert "does not fit this model" in message


def test_load_needs_a_checkpoint_unless_it_is_the_save_folder(
    pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    argv = flags(*inputs, train_iters=1)
    [message] = pool.run(1, train, [*argv, "--load", str(tmp_path / "nowhere")])
    assert TRACKER in message and "drop --load" in message
    assert pool.run(1, train, [*argv, "--load", str(tmp_path / "new"), "--save", str(tmp_path / "new")]) == [None]


@pytest.mark.parametrize(
    "text, complete, words", [("abc", True, "neither a step nor"), ("7", False, "not a complete checkpoint")]
)
def test_a_wrong_tracker(tmp_path: Path, text: str, complete: bool, words: str) -> None:
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(UserError, match=words):
        latest_step(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--save .* cannot be written"):
        check_writable("--save", tmp_path / "file" / "run")
    check_writable("--save", tmp_path / "new" / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"], "the check must leave nothing behind"
