"""Runs that train adapters: the same one on every layout, checkpoints, exports, the reference, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from simpo_megatron.adapters.lora import Lora, check_lora
from simpo_megatron.errors import UserError
from simpo_megatron.models.families.registry import family_of
from simpo_megatron.trainer.adapter import check_adapters_of
from tests.support import families
from tests.support.adapters import gather_factors, random_adapter
from tests.support.distributed import WorkerPool
from tests.support.runs import flags, run_main
from tests.support.steps import build_engine, command_line
from tests.support.tiny import EXPERTS, make_checkpoint, make_rows, write_rows
from tools import adapters, hf_to_megatron, megatron_to_hf

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
RANK = 4


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", make_rows(40))


def run(pool: WorkerPool, world: int, argv: list[str]) -> str:
    """What rank 0 prints."""
    outcomes = pool.run(world, run_main, argv)
    assert [code for code, _, _ in outcomes] == [0] * world, outcomes[0]
    return outcomes[0][1]


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_resumed_runs_end_with_the_same_adapter(pool: WorkerPool, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Bit for bit in the same layout, and up to rounding in another; PEFT and transformers read what is exported."""
    save, early = tmp_path / "run", tmp_path / "early"
    settings = {"lora_rank": RANK, "save_interval": 2, "dist_ckpt_optim_fully_reshardable": True}
    exports = {"export_adapter": tmp_path / "whole", "export_hf": tmp_path / "merged"}
    said = run(pool, 2, flags(checkpoint, data, **settings, **TP2, save=save, **exports))
    assert "7,424 parameters are trained, 50,848 are frozen" in said
    whole = read(tmp_path / "whole")
    sizes = [file.stat().st_size for file in (save / "iter_0000004").glob("*.distcp")]
    assert sum(sizes) < 10**6
    shutil.copytree(save, early)
    shutil.rmtree(early / "iter_0000004")
    (early / "latest_checkpointed_iteration.txt").write_text("2")
    for name, world, layout in (("same", 2, TP2), ("other", 1, {})):
        folder = shutil.copytree(early, tmp_path / f"run-{name}")
        argv = flags(checkpoint, data, **settings, **layout, save=folder, load=folder, export_adapter=tmp_path / name)
        assert "resumed from" in run(pool, world, argv)
        found = read(tmp_path / name)
        assert found.keys() == whole.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, whole[key], rtol=0, atol=0 if name == "same" else 1e-6)
    assert "nothing is left to do" in run(
        pool, 2, flags(checkpoint, data, **settings, **TP2, save=save, load=save, **exports)
    )

    compare_with_tools(checkpoint, tmp_path)
    ids = torch.arange(3, 40)[None]
    adapted: Any = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "whole")
    with torch.no_grad():
        wanted = adapted(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5)

    other = make_checkpoint(tmp_path / "other-model", tie_word_embeddings=False)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    [(code, _, error)] = pool.run(1, run_main, flags(other, data, **settings, save=folder, load=folder))
    assert code == 2 and "holds adapters for other weights than those of --hf-checkpoint" in error
    check_new_runs(pool, checkpoint, other, data, save)


def check_new_runs(pool: WorkerPool, checkpoint: Path, other: Path, data: Path, save: Path) -> None:
    """--finetune starts from adapters of the same shape and base alone."""
    start = {"load": save, "finetune": True}
    dry, lora = {**start, "dry_run": True}, {"lora_rank": RANK}
    commands = [
        flags(checkpoint, data, **dry),
        flags(checkpoint, data, **dry, lora_rank=2 * RANK),
        flags(checkpoint, data, **dry, **lora, lora_alpha=64),
        flags(other, data, **start, **lora),
        flags(checkpoint, data, **dry, **lora),
    ]
    [outcomes] = pool.run(1, run_each, commands)
    for (code, _, error), sentence in zip(
        outcomes,
        (
            "holds adapters alone, of rank 4, scale 2, on q_proj, k_proj",
            "up_proj, down_proj, and this run has rank 8, scale 2,",
            "this run has rank 4, scale 16,",
            "holds adapters for other weights than those of this run; give its base",
        ),
        strict=False,
    ):
        assert code == 2 and sentence in error, error
    assert outcomes[-1][0] == 0 and f"with the adapters of {save}" in " ".join(outcomes[-1][1].split())


def test_adapters_do_not_start_from_a_run_without_them(tmp_path: Path) -> None:
    torch.save({"progress": {"step": 4}}, tmp_path / "common.pt")
    check_adapters_of(tmp_path, None)
    with pytest.raises(UserError, match="is of a run without adapters, and adapters need a base: convert it"):
        check_adapters_of(tmp_path, Lora(RANK, 8.0))


def compare_with_tools(checkpoint: Path, folder: Path) -> None:
    """The programs without a GPU write what the run exported."""
    base = ["--hf-checkpoint", str(checkpoint)]
    assert adapters.main(["convert", "--load", str(folder / "run"), *base, "--save", str(folder / "converted")]) == 0
    whole, converted = read(folder / "whole"), read(folder / "converted")
    assert whole.keys() == converted.keys() and all(torch.equal(whole[key], converted[key]) for key in whole)
    configs = [(folder / name / "adapter_config.json").read_text() for name in ("whole", "converted")]
    assert configs[0] == configs[1]
    (folder / "again").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "again")
        assert adapters.main(["merge", "--adapter", str(folder / "converted"), *base, "--save", "."]) == 0
    merged, again = (load_file(folder / name / "model.safetensors") for name in ("merged", "again"))
    assert merged.keys() == again.keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(again[key], tensor, rtol=0, atol=1e-7)
    assert adapters.main(["compare", str(folder / "whole"), str(folder / "other"), *base, "--tolerance", "1e-3"]) == 0
    assert adapters.main(["compare", str(folder / "whole"), str(folder / "other"), *base, "--tolerance", "0"]) == 1
    assert megatron_to_hf.main(["--load", str(folder / "run"), *base, "--save", str(folder / "not")]) == 2


def test_a_checkpoint_of_experts_is_converted_and_resumed(pool: WorkerPool, data: Path, tmp_path: Path) -> None:
    checkpoint, save = make_checkpoint(tmp_path / "model", "Mixtral", torch.float32, **EXPERTS), tmp_path / "run"
    settings = {"lora_rank": RANK, "train_iters": 2, "save_interval": 1, "expert_model_parallel_size": 2, "save": save}
    settings["lora_dropout"] = 0.2  # the second step has its masks again when the run is resumed
    run(pool, 2, flags(checkpoint, data, **settings, export_adapter=tmp_path / "whole"))
    argv = ["convert", "--load", str(save), "--hf-checkpoint", str(checkpoint), "--save", str(tmp_path / "converted")]
    assert adapters.main(argv) == 0
    whole, converted = read(tmp_path / "whole"), read(tmp_path / "converted")
    assert whole.keys() == converted.keys() and all(torch.equal(whole[key], converted[key]) for key in whole)
    (save / "latest_checkpointed_iteration.txt").write_text("1")
    run(pool, 2, flags(checkpoint, data, **settings, load=save, export_adapter=tmp_path / "resumed"))
    resumed = read(tmp_path / "resumed")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_base_may_be_a_converted_checkpoint(pool: WorkerPool, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """The run and its rest are bit for bit those on the Hugging Face checkpoint, whose weights they do not need."""
    converted, config, save = tmp_path / "converted", tmp_path / "config", tmp_path / "run"
    assert hf_to_megatron.main(["--hf-checkpoint", str(checkpoint), "--save", str(converted)]) == 0
    shutil.copytree(checkpoint, config, ignore=shutil.ignore_patterns("*.safetensors"))
    shared = {"lora_rank": RANK, "lora_dropout": 0.1, "objective": "dpo", "train_iters": 2}
    run(pool, 1, flags(checkpoint, data, **shared, export_adapter=tmp_path / "of-hf"))
    exports = {"save": save, "save_interval": 1, "export_adapter": tmp_path / "whole"}
    said = run(pool, 1, flags(config, data, **shared, **exports, load=converted))
    assert f"starting from the weights of {converted / 'release'}" in said
    (save / "latest_checkpointed_iteration.txt").write_text("1")
    again = flags(config, data, **shared, save=save, load=save, export_adapter=tmp_path / "resumed")
    assert "resumed from" in run(pool, 1, again)
    wanted = read(tmp_path / "of-hf")
    for name in ("whole", "resumed"):
        found = read(tmp_path / name)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)

    outcomes = []
    for change in ("changed", "gone"):
        if change == "changed":
            file = max((converted / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
            file.write_bytes(file.read_bytes() + b" ")
        else:
            converted.rename(tmp_path / "elsewhere")
        [(code, _, error)] = pool.run(1, run_main, again)
        outcomes.append((code, error))
    [(changed, first), (gone, second)] = outcomes
    assert (changed, gone) == (2, 2)
    assert "holds adapters for other weights than those of" in first and "put it back" in second


def fresh(checkpoint: Path, layout: dict[str, Any]) -> dict[str, Tensor]:
    """On a rank: the factors as training starts."""
    engine, _ = build_engine(command_line(checkpoint, {"lora_rank": RANK, **layout}))
    return gather_factors(engine, "data")


def fresh_by_shard(checkpoint: Path, layout: dict[str, Any]) -> dict[str, Tensor]:
    """On a rank: the same where the bound of A follows from the columns of the shard (Megatron-Bridge issue 5840)."""
    from simpo_megatron.adapters import install

    def fill(models: Any, whole: Any) -> None:
        for place in (place for model in models for place in install.factors(model)):
            cut = place.parameter.shape[1] / place.entry.shapes[0][1]
            place.parameter.data.copy_(whole(place)[tuple(map(slice, place.parameter.shape))] / cut**0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(install, "fill_factors", fill)
        return fresh(checkpoint, layout)


def install_again(checkpoint: Path, layout: dict[str, Any]) -> str:
    """On a rank: what is said where a model that has an adapter gets one more."""
    from simpo_megatron.adapters.install import install

    engine, hf = build_engine(command_line(checkpoint, {"lora_rank": RANK, **layout}))
    before = [name for name, _ in engine.models[0].named_parameters()]
    with pytest.raises(ValueError) as raised:
        install(engine.models, hf, Lora(RANK, 8.0), 0)
    assert [name for name, _ in engine.models[0].named_parameters()] == before
    return str(raised.value)


def test_a_model_gets_one_adapter_alone(pool: WorkerPool, checkpoint: Path) -> None:
    [said] = pool.run(1, install_again, checkpoint, {})
    assert said == "the model has an adapter already, and would get two; build it again from its base"


def test_a_fresh_adapter_is_the_same_on_every_layout(pool: WorkerPool, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "Mixtral", torch.float32, **EXPERTS)
    [alone] = pool.run(1, fresh, checkpoint, {})
    for layout in ({**TP2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, TP2):
        ranks = pool.run(2, fresh, checkpoint, layout)
        assert set().union(*ranks) == alone.keys()
        assert all(torch.equal(tensor, alone[name]) for rank in ranks for name, tensor in rank.items())
    planted = pool.run(2, fresh_by_shard, checkpoint, TP2)[0]
    assert not all(torch.equal(tensor, alone[name]) for name, tensor in planted.items())
    for name, tensor in alone.items():
        bound = tensor.shape[1] ** -0.5
        assert (tensor == 0).all() if ".lora_B." in name else 0.8 * bound < tensor.abs().max() <= bound


def test_the_reference_is_the_base(pool: WorkerPool, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Bit for bit before the first step; with an adapter that is loaded the two differ."""
    random_adapter(checkpoint, tmp_path / "adapter")
    margins = {}
    for name, settings in {"fresh": {"lora_rank": RANK}, "loaded": {"load_adapter": tmp_path / "adapter"}}.items():
        save = tmp_path / name
        argv = flags(checkpoint, data, **settings, objective="dpo", train_iters=1, save=save, no_save_optim=True)
        assert "computed with the base" in run(pool, 1, argv)
        [row, *_] = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
        margins[name] = row["rewards/margins"]
    assert margins["fresh"] == 0 and abs(margins["loaded"]) > 1e-3


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"lora_rank": 4, "lora_targets": "q_prj"}, "--lora-targets q_prj is not a projection of the model; use q_proj"),
    ({"lora_rank": 4, "lora_targets": "lm_head"}, "--lora-targets lm_head is not supported: adapters go on"),
    ({"lora_rank": 4, "lora_targets": "up_proj"}, "--lora-targets has up_proj alone: the model has experts"),
    ({"lora_rank": 64}, "--lora-rank 64 exceeds the hidden size 32 of the model; lower it"),
    ({"lora_rank": 0}, "--lora-rank 0 must be greater than 0"),
    ({"lora_alpha": 8}, "--lora-alpha needs --lora-rank: without it all weights are trained"),
    ({"export_adapter": "out"}, "--export-adapter out needs adapters; give --lora-rank"),
    ({"lora_rank": 4, "moe_aux_loss_coeff": 0.1}, "--moe-aux-loss-coeff 0.1 has no use with adapters"),
    ({"load_adapter": "absent"}, "absent has no adapter_config.json; give the folder of a PEFT adapter"),
    ({"load_adapter": "absent", "lora_rank": 4}, "--load-adapter absent gives the rank of the adapters; drop"),
)
SAID = (
    "LoRA: rank 4, scale 2, on q_proj, k_proj",
    "parameters are trained",
    "--lr 1e-07 is a learning rate for training all weights",
)


def test_the_advice_of_a_refusal_is_accepted() -> None:
    """PEFT with transformers 5 adapts the routed experts, and drops the adapters of dense layers and shared experts."""
    advice = {}
    for name, (prefix, own) in families.MODELS.items():
        config = getattr(transformers, f"{prefix}ForCausalLM").config_class(**{**families.SIZES, **own}).to_dict()
        architecture = family_of(config).architecture(config)
        try:
            check_lora(Lora(4, 8.0), architecture)
        except UserError as error:
            advice[name] = str(error).rpartition("give --lora-targets ")[2]
            check_lora(Lora(4, 8.0, targets=tuple(advice[name].split())), architecture)
    attention = "q_proj k_proj v_proj o_proj"
    assert advice["qwen3_moe"] == advice["glm4_moe"] == advice["gpt_oss"] == attention
    assert advice["deepseek_v2"] == advice["deepseek_v3"] == "o_proj"
    assert advice["phi3"] == "o_proj down_proj" and advice["glm"] == f"{attention} down_proj"


def run_each(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """On a rank: `run_main` of every command line."""
    return [run_main(argv) for argv in commands]


def test_what_cannot_be_is_refused_and_the_dry_run_counts(pool: WorkerPool, data: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "Mixtral", torch.float32, **EXPERTS)
    right: dict[str, Any] = {"lora_rank": 4, "lr": 1e-7}
    settings = [*(settings for settings, _ in REFUSED), right]
    [outcomes] = pool.run(1, run_each, [flags(checkpoint, data, **{**one, "dry_run": True}) for one in settings])
    for (_, sentence), (code, _, error) in zip(REFUSED, outcomes, strict=False):
        assert code == 2 and sentence in error
    code, out, error = outcomes[-1]
    assert code == 0, error
    assert all(text in " ".join(out.split()) for text in SAID)
