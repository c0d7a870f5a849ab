"""The computed size of a checkpoint against the bytes of a real one, and disks that are too small for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simpo_megatron.config.arguments import parse
from simpo_megatron.disk import human
from simpo_megatron.errors import UserError
from simpo_megatron.models.hf_checkpoint import read_hf_config
from simpo_megatron.planning.checkpoint_size import check_disk, checkpoint_size, disk_use
from tests.support.disks import fill, small_disk
from tests.support.distributed import WorkerPool
from tests.support.runs import flags, run_main, train
from tests.support.tiny import EXPERTS, make_checkpoint, make_rows, write_rows

BOUND = 0.03  # of the bytes: 1 to 2 KiB for every tensor that a rank writes, and .metadata
WIDE = {"hidden_size": 192, "intermediate_size": 384}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sizes")
    return make_checkpoint(folder / "model", **WIDE), write_rows(folder / "pairs.jsonl", make_rows(4))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "iter_0000001").iterdir())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_a_real_checkpoint(
    pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path, precision: str, distributed: bool
) -> None:
    settings: dict[str, Any] = {"fp32": False, precision: True, "tensor_model_parallel_size": 2}
    settings["use_distributed_optimizer" if distributed else "no_use_distributed_optimizer"] = True
    argv = flags(*inputs, train_iters=1, global_batch_size=2, save=tmp_path / "run", **settings)
    assert pool.run(2, train, argv) == [None, None]
    size = checkpoint_size(
        read_hf_config(inputs[0]).architecture,
        bf16=precision == "bf16",
        distributed_optimizer=distributed,
        vocabulary_multiple=256,
    )
    assert size.total <= size_of(tmp_path / "run") <= (1 + BOUND) * size.total


def test_a_real_checkpoint_with_experts(pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "Mixtral", **EXPERTS, **WIDE)
    argv = flags(model, inputs[1], train_iters=1, global_batch_size=2, save=tmp_path / "run")
    assert pool.run(1, train, argv) == [None]
    size = checkpoint_size(read_hf_config(model).architecture, bf16=False)
    assert size.total <= size_of(tmp_path / "run") <= (1 + BOUND) * size.total


def test_a_run_says_the_size_and_is_refused_where_it_does_not_fit(
    pool: WorkerPool, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = {"global_batch_size": 2, "train_iters": 1}
    size = checkpoint_size(read_hf_config(inputs[0]).architecture, bf16=False)
    with small_disk(tmp_path / "disk", "40m") as disk:
        argv = flags(*inputs, **settings, save=disk / "run")
        [(code, out, err)] = pool.run(1, run_main, [*argv, "--dry-run"])
        assert (code, err) == (0, "")
        assert f"a checkpoint takes {size}; this run writes 1" in out and f"free in {disk}/run" in out
        [(code, out, err)] = pool.run(1, run_main, [*argv, "--train-iters", "4", "--save-interval", "1", "--dry-run"])
        assert code == 0 and "this run writes 4" in out
        assert f"warning: the disk of --save {disk}/run has room for 1 of the 4 checkpoints" in out
        fill(disk, size.total // 2)
        [(code, out, err)] = pool.run(1, run_main, argv)
        [line] = err.splitlines()
        assert code == 2 and f"--save {disk}/run: a checkpoint takes" in line and "free space there" in line
        assert "step 1" not in out and [path.name for path in disk.iterdir()] == ["filler"]
        [(code, out, err)] = pool.run(1, run_main, [*argv, "--dry-run"])
        assert (code, err) == (0, ""), "the machine of the dry run may be another one"
        assert (
            f"warning: --save {disk}/run: a checkpoint takes" in out and "a run on this machine would end here" in out
        )
        assert out.endswith("dry run: nothing is wrong with flags, layout, data and checkpoint\n")


def test_the_folders_on_one_disk_are_counted_together(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    architecture = read_hf_config(inputs[0]).architecture
    size, model = checkpoint_size(architecture, bf16=False).total, architecture.num_parameters * 4
    with small_disk(tmp_path / "disk", "60m") as disk:
        both = parse(flags(*inputs, save=disk / "run", export_hf=disk / "hf", save_interval=2))
        apart = parse(flags(*inputs, save=disk / "run", export_hf=tmp_path / "hf", save_interval=2))
        fill(disk, size + model // 2)
        assert not disk_use(apart, architecture, 2).missing
        [sentence] = disk_use(both, architecture, 2).missing
        assert f"--save {disk}/run and --export-hf {disk}/hf are on one disk: a checkpoint and the exported" in sentence
        assert human(size + model) in sentence
        with pytest.raises(UserError, match="are on one disk"):
            check_disk(both, architecture, 2)
        fill(disk, 2 * size + model // 2)
        assert not disk_use(apart, architecture, 4).warnings
        [warning] = disk_use(both, architecture, 4).warnings
        assert "has room for 1 of the 2 checkpoints of this run beside the exported model" in warning
        assert f"warning: {warning}" in check_disk(both, architecture, 4)
        fill(disk, model // 2)
        [sentence] = disk_use(parse(flags(*inputs, export_hf=disk / "hf")), architecture, 1).missing
        assert f"--export-hf {disk}/hf: the exported model takes" in sentence
