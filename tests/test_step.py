"""The loss of a global batch and the gradient of every parameter, in every layout, against transformers on one process.

The oracle runs each sequence alone, unpadded, through LlamaForCausalLM in fp32 and writes the formula out in plain torch.
The batch is cut into three rows of very unequal pair counts, so that ranks and microbatches see different numbers of
pairs, and some see none.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from simpo_megatron.data import PairStore, pack_rows
from simpo_megatron.errors import UserError
from tests.pairs import make_store
from tests.tiny import make_checkpoint
from tests.trainer.runs import flags

SEQ_LENGTH = 96
# prompt, chosen, rejected: one pair fills a row, two more make the second, the five short ones the third.
LENGTHS = [(4, 3, 5), (20, 40, 12), (6, 9, 1), (1, 2, 3), (16, 20, 12), (3, 1, 4), (8, 9, 4), (2, 7, 2)]
NAN = float("nan")
PLAIN = {"truncated": [0, 1, 2, 3, 0, 0, 1, 0], "vocab_size": 270}
COLUMNS = {
    **PLAIN,
    "weight": [1, 0.5, 2, 0, 3, 1, 0.25, 1],
    "margin": [NAN, 0, 2.5, NAN, -1, NAN, 0.3, NAN],
}


@dataclass(frozen=True)
class Case:
    """A loss and the pairs of one global batch; `loss` holds fields of LossConfig."""

    loss: dict[str, Any]
    store: dict[str, Any] = field(default_factory=lambda: PLAIN)
    pairs: tuple[int, ...] = (5, 0, 7, 1, 3, 6, 2, 4)

    @property
    def pair_store(self) -> PairStore:
        return make_store(LENGTHS, **self.store)


CASES = {
    "sigmoid": Case({"simpo_beta": 2.5, "simpo_gamma": 1.375}),
    "hinge": Case({"simpo_beta": 10.0, "simpo_gamma": 1.0, "simpo_loss_type": "hinge", "simpo_sft_weight": 0.7}),
    "columns": Case({"simpo_beta": 2.0, "simpo_label_smoothing": 0.1}, COLUMNS),
    "partial": Case({"simpo_beta": 2.5, "simpo_sft_weight": 0.3}, COLUMNS, pairs=(6, 1, 4)),
    "sft": Case({"objective": "sft"}, COLUMNS),
}

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
VPP = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
FIXED = {"no_variable_seq_lengths": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "one, fixed": (1, FIXED),
    "one, recompute": (1, FULL),
    "tp2": (2, TP2),
    "tp2 sp": (2, SP),
    "tp2 sp, plain head": (2, {**SP, "head": "plain"}),
    "tp2 sp, slabs smaller than most pairs": (2, {**SP, "head_slab_bytes": "16KiB"}),
    "pp2": (2, PP2),
    "pp2, fixed": (2, {**PP2, **FIXED}),
    "pp2, uneven": (2, {**PP2, "decoder_first_pipeline_num_layers": 1}),
    "vpp2": (2, VPP),
    "dp2": (2, {}),
    "dp4": (4, {}),  # three rows: one rank has an empty pack and nothing else
    "tp2 pp2": (4, {**TP2, **PP2}),
    "tp2 sp pp2": (4, {**SP, **PP2}),
    "tp2 sp dp2, fixed": (4, {**SP, **FIXED}),
    "vpp2 dp2": (4, VPP),
}
TIED = {
    "one": (1, {}),
    "tp2 sp": (2, SP),
    "pp2": (2, PP2),
    "tp2 pp2": (4, {**TP2, **PP2}),
    "vpp2 dp2": (4, VPP),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The tiny model by whether its embeddings are tied."""
    folder = tmp_path_factory.mktemp("models")
    return {tied: make_checkpoint(folder / f"tied_{tied}", tie_word_embeddings=tied) for tied in (False, True)}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """On matrices this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def member_logps(model: Any, prompt: Any, response: Any) -> torch.Tensor:
    """log p of each response token, from the sequence alone: [response], fp64."""
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    logps = model(ids).logits[0, :-1].double().log_softmax(-1)
    return torch.stack([logps[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1])])


def oracle_metrics(model: Any, case: Case) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss, with its graph, and every metric."""
    store, loss = case.pair_store, case.loss
    sft = loss.get("objective") == "sft"
    beta = loss.get("simpo_beta", 2.0)
    total, nll, tokens, found = torch.zeros((), dtype=torch.float64), 0, 0, {}

    def count(name: str, value: Any) -> None:
        value = value.item() if isinstance(value, torch.Tensor) else value
        found[name] = found.get(name, 0.0) + value / len(case.pairs)

    for i in case.pairs:
        prompt, *responses = store.pair(i)
        logps = [member_logps(model, prompt, response) for response in responses[: 1 if sft else 2]]
        nll, tokens = nll - logps[0].sum(), tokens + len(logps[0])
        for bit, name, values in zip((1, 2), ("chosen", "rejected"), logps, strict=False):
            count(f"logps/{name}", values.mean())
            count(f"response_length/{name}", len(values))
            count(f"truncated/{name}", bool(store.truncated[i] & bit))
        if sft:
            continue
        chosen, rejected = beta * logps[0].mean(), beta * logps[1].mean()
        gamma = loss.get("simpo_gamma", beta / 2) if math.isnan(store.margin[i]) else float(store.margin[i])
        logit = chosen - rejected - gamma
        if loss.get("simpo_loss_type") == "hinge":
            pair_loss = torch.clamp(1 - logit, min=0)
        else:
            swapped = loss.get("simpo_label_smoothing", 0.0)
            pair_loss = (1 - swapped) * F.softplus(-logit) + swapped * F.softplus(logit)
        total = total + float(store.weight[i]) * pair_loss / len(case.pairs)
        for name, value in {
            "chosen": chosen,
            "rejected": rejected,
            "margins": chosen - rejected,
            "accuracies": chosen > rejected,
            "above_gamma": logit > 0,
            "ties": chosen == rejected,
        }.items():
            count(f"rewards/{name}", value)
    total = total + (1.0 if sft else loss.get("simpo_sft_weight", 0.0)) * nll / tokens
    return total, {"loss": total.item(), "nll_loss": (nll / tokens).item(), **found}


def oracle(model: Any, case: Case) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics with the gradient norm, and the gradient of every parameter by its name."""
    model.zero_grad()
    loss, metrics = oracle_metrics(model, case)
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    return {**metrics, "grad_norm": norm}, gradients


@pytest.fixture(scope="module")
def oracles(checkpoints: dict[bool, Path]) -> dict[bool, dict[str, Any]]:
    """What `oracle` says of every case."""
    models = {tied: LlamaForCausalLM.from_pretrained(path, dtype=torch.float32) for tied, path in checkpoints.items()}
    with one_thread():
        return {tied: {name: oracle(model, case) for name, case in CASES.items()} for tied, model in models.items()}


def command_line(checkpoint: Path, settings: dict[str, Any]) -> list[str]:
    return flags(checkpoint, Path("unused.jsonl"), **{"seq_length": SEQ_LENGTH, "clip_grad": 0, **settings})


def build_engine(argv: list[str]) -> tuple[Any, Any]:
    """On a rank: the engine of a run of this command line, as `trainer.loop.Run` builds it, and its HFModel."""
    from megatron.core import parallel_state

    from simpo_megatron.arguments import parse
    from simpo_megatron.models.build import build_model
    from simpo_megatron.models.hf import read_hf_checkpoint
    from simpo_megatron.models.load import load_hf_weights
    from simpo_megatron.trainer.distributed import initialize
    from simpo_megatron.trainer.engine import Engine
    from simpo_megatron.trainer.loop import layout_config

    config = parse(argv)
    hf = read_hf_checkpoint(config.model.hf_checkpoint)
    transformer = layout_config(config, hf)
    if not parallel_state.model_parallel_is_initialized():
        initialize(transformer, 1, "cpu", 0)
    models = build_model(hf, transformer)
    load_hf_weights(models, hf)
    return Engine(config, models, transformer, hf.vocab_size, config.train.train_iters), hf


def gather_gradients(engine: Any, hf: Any) -> dict[str, torch.Tensor]:
    """On a rank: `main_grad` of this pipeline stage's parameters, whole and by Hugging Face name."""
    from megatron.core import parallel_state

    from simpo_megatron.models.layout import from_megatron
    from simpo_megatron.models.place import place_parameters

    group = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for place in (place for model in engine.models for place in place_parameters(model, hf)):
        weight, mine = place.weight, place.parameter.main_grad
        shards = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(shards, mine, group=group)
        parts = [from_megatron(weight, shard, group.size()) for shard in shards]
        for name, shape, *slices in zip(place.hf, weight.shapes, *parts, strict=True):
            whole = slices[group.rank()] if weight.tp_dim is None else torch.cat(slices, dim=weight.tp_dim)
            found[name] = whole[: shape[0]].clone()
    return found


def run_cases(checkpoint: Path, layout: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """On a rank: of each case the metrics of evaluation and of a step, and the step's gradients."""
    found = {}
    for name in names:
        case = CASES[name]
        settings = {**layout, **case.loss, "no_use_distributed_optimizer": True}
        engine, hf = build_engine(command_line(checkpoint, settings))
        batch = engine.plan(case.pair_store, np.array(case.pairs))
        evaluated = engine.evaluate(batch)
        trained = engine.train_step(batch)
        found[name] = (evaluated, trained, gather_gradients(engine, hf))
    return found


def check_layout(
    pool: Any, checkpoint: Path, oracles: dict[str, Any], world: int, layout: dict[str, Any], tolerance: float = 1e-5
) -> None:
    """Every number of every rank against the oracle; together the ranks know every parameter."""
    ranks = pool.run(world, run_cases, checkpoint, layout, list(oracles))
    for name, (wanted, wanted_gradients) in oracles.items():
        for evaluated, trained, gradients in (found[name] for found in ranks):
            del trained["learning_rate"]
            metrics = {**trained, **{f"eval/{key}": value for key, value in evaluated.items()}}
            expected = {**wanted, **{f"eval/{key}": value for key, value in wanted.items() if key != "grad_norm"}}
            assert metrics == pytest.approx(expected, rel=tolerance, abs=2 * tolerance), name
            for key, gradient in gradients.items():
                error = (gradient - wanted_gradients[key]).norm() / wanted_gradients[key].norm()
                assert error < tolerance, (name, key)
        assert set().union(*(found[name][2] for found in ranks)) == wanted_gradients.keys()


@pytest.mark.parametrize("world, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_loss_and_gradients(pool, checkpoints, oracles, world: int, layout: dict[str, Any]) -> None:
    check_layout(pool, checkpoints[False], oracles[False], world, layout)


@pytest.mark.parametrize("world, layout", TIED.values(), ids=TIED)
def test_loss_and_gradients_of_tied_embeddings(pool, checkpoints, oracles, world: int, layout: dict[str, Any]) -> None:
    check_layout(pool, checkpoints[True], {name: oracles[True][name] for name in ("columns", "sft")}, world, layout)


def test_the_cases_are_what_they_say(oracles) -> None:
    """Rows of unequal pair counts, hinges on both sides, and losses that differ: else the tests above say little."""
    case = CASES["sigmoid"]
    rows = pack_rows(case.pair_store.pair_tokens[list(case.pairs)], SEQ_LENGTH)
    assert sorted(map(len, rows)) == [1, 2, 5]
    losses = [metrics["loss"] for metrics, _ in oracles[False].values()]
    assert len({round(loss, 3) for loss in losses}) == len(CASES)
    assert 0 < oracles[False]["hinge"][0]["rewards/above_gamma"] < 1


TRAINING = {"lr": 1e-2, "lr_decay_style": "constant", "lr_warmup_fraction": 0, "weight_decay": 0.1, "clip_grad": 0.5}
DISTRIBUTED: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp4, overlap": (4, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "tp2 pp2": (4, {**TP2, **PP2}),
    "tp2 sp dp2": (4, SP),
    "vpp2 dp2, overlap": (4, {**VPP, "overlap_grad_reduce": True, "overlap_param_gather": True}),
}


def two_steps(checkpoint: Path, layout: dict[str, Any]) -> list[dict[str, float]]:
    """On a rank: metrics of two optimizer steps, and of the evaluation after them."""
    case = CASES["columns"]
    engine, _ = build_engine(command_line(checkpoint, {**TRAINING, **layout, **case.loss}))
    batch = engine.plan(case.pair_store, np.array(case.pairs))
    found = [engine.train_step(batch), engine.train_step(batch)]
    engine.sync_parameters()
    return [*found, engine.evaluate(batch)]


@pytest.fixture(scope="module")
def two_oracle_steps(checkpoints) -> list[dict[str, float]]:
    """The same with torch's clipping and AdamW, and no weight decay of norms."""
    model, case = LlamaForCausalLM.from_pretrained(checkpoints[False], dtype=torch.float32), CASES["columns"]
    norms, matrices = [], []
    for parameter in model.parameters():
        (norms if parameter.ndim == 1 else matrices).append(parameter)
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": TRAINING["weight_decay"]}, {"params": norms, "weight_decay": 0.0}],
        lr=TRAINING["lr"],
    )
    found = []
    with one_thread():
        for _ in range(2):
            metrics, _ = oracle(model, case)
            torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING["clip_grad"])
            adam.step()
            found.append({**metrics, "learning_rate": TRAINING["lr"]})
        found.append(oracle_metrics(model, case)[1])
    return found


@pytest.mark.parametrize("world, layout", DISTRIBUTED.values(), ids=DISTRIBUTED)
def test_steps_of_the_distributed_optimizer(
    pool, checkpoints, two_oracle_steps, world: int, layout: dict[str, Any]
) -> None:
    first, second, after = two_oracle_steps
    assert after["loss"] < second["loss"] < first["loss"] and first["grad_norm"] > TRAINING["clip_grad"]
    for found in pool.run(world, two_steps, checkpoints[False], layout):
        assert found[0] == pytest.approx(first, rel=1e-5, abs=2e-5)
        assert found[1] == pytest.approx(second, rel=1e-4, abs=1e-4)
        assert found[2] == pytest.approx(after, rel=1e-4, abs=1e-4)


def fail_step(checkpoint: Path, layout: dict[str, Any], weight: float) -> tuple[str, bool]:
    """On a rank: the error of a step on pairs of this weight, and whether every parameter kept its bits."""
    engine, _ = build_engine(command_line(checkpoint, layout))
    before = [parameter.detach().clone() for model in engine.models for parameter in model.parameters()]
    store = make_store(LENGTHS, vocab_size=270, weight=[1, 1, 1, weight, 1, 1, 1, 1])
    with pytest.raises(UserError) as raised:
        engine.train_step(engine.plan(store, np.arange(len(LENGTHS))))
    after = [parameter for model in engine.models for parameter in model.parameters()]
    return str(raised.value), all(map(torch.equal, before, after))


@pytest.mark.parametrize("world, layout", [(1, {"clip_grad": 1.0}), (4, {**TP2, **PP2})], ids=str)
@pytest.mark.parametrize(
    "weight, words", [(NAN, "the loss is nan"), (math.inf, "the loss is inf"), (1e38, "the gradient norm is")]
)
def test_a_number_that_is_not_finite_changes_nothing(
    pool, checkpoints, world: int, layout: dict[str, Any], weight: float, words: str
) -> None:
    for message, unchanged in pool.run(world, fail_step, checkpoints[False], layout, weight):
        assert words in message and "no weight was changed" in message
        assert unchanged
