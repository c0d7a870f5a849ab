"""What the tests of steps and layouts share: cases, the oracle, and what a rank does with a case.

The oracle runs each sequence alone, unpadded, through transformers in fp32, and writes the formula out in plain torch.

The batch is packed into three rows of 1, 2 and 5 pairs. So ranks and microbatches see different numbers of pairs, and
some see none. The longest chosen response holds the ids at the edges of the vocabulary shards.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from simpo_megatron.data import InMemoryPairs
from tests.support.distributed import WorkerPool
from tests.support.families import on_disk
from tests.support.formulas import FORMULAS, SUMS, TERMS, Pair
from tests.support.pairs import make_pairs
from tests.support.runs import flags
from tests.support.tiny import make_tokenizer

SEQ_LENGTH = 96
# prompt, chosen, rejected: one pair fills a row, two more make the second, the five short ones the third.
LENGTHS = [(4, 3, 5), (20, 40, 12), (6, 9, 1), (1, 2, 3), (16, 20, 12), (3, 1, 4), (8, 9, 4), (2, 7, 2)]
NAN = float("nan")
VOCAB = len(make_tokenizer())
# The first and the last id of every vocabulary shard, up to 4 shards of 384 or 512 rows.
EDGES = [i for i in (0, 95, 96, 127, 128, 191, 192, 255, 256, 287, 288, VOCAB - 1) if i < VOCAB]
PLAIN = {"truncated": [0, 1, 2, 3, 0, 0, 1, 0], "vocab_size": VOCAB, "planted": EDGES}
COLUMNS = {
    **PLAIN,
    "weight": [1, 0.5, 2, 0, 3, 1, 0.25, 1],
    "margin": [NAN, 0, 2.5, NAN, -1, NAN, 0.3, NAN],
}


@dataclass(frozen=True)
class Case:
    """A loss, and the pairs of one global batch.

    Attributes:
        loss: settings of the objective.
        columns: arguments of `make_pairs`: the columns of the data set.
        indices: of the pairs of the batch.
    """

    loss: dict[str, Any]
    columns: dict[str, Any] = field(default_factory=lambda: PLAIN)
    indices: tuple[int, ...] = (5, 0, 7, 1, 3, 6, 2, 4)

    @property
    def pairs(self) -> InMemoryPairs:
        """The data set."""
        return make_pairs(LENGTHS, **self.columns)


CASES = {
    "sigmoid": Case({"simpo_beta": 2.5, "simpo_gamma": 1.375}),
    "hinge": Case({"simpo_beta": 10.0, "simpo_gamma": 1.0, "simpo_loss_type": "hinge", "simpo_sft_weight": 0.7}),
    "columns": Case({"simpo_beta": 2.0, "simpo_label_smoothing": 0.1}, COLUMNS),
    "partial": Case({"simpo_beta": 2.5, "simpo_sft_weight": 0.3}, COLUMNS, indices=(6, 1, 4)),
    "sft": Case({"objective": "sft"}, COLUMNS),
}
REFERENCE = {
    "ref_chosen_logps": [-20.0, -260.5, -70.0, -9.0, -110.0, -6.0, -61.0, -48.0],
    "ref_rejected_logps": [-30.0, -80.0, -4.0, -22.0, -75.0, -29.0, -20.0, -11.0],
}
# One of every objective beside SimPO and SFT: the formulas of `formulas.py`.
OBJECTIVE_CASES = {
    name: Case(settings, {**COLUMNS, **REFERENCE, "margin": [NAN] * 8}) for name, (_, _, settings) in TERMS.items()
}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread: on matrices this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def response_logps(model: Any, prompt: Any, response: Any) -> torch.Tensor:
    """The log-prob of each response token, from the sequence alone: [response], fp64."""
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    logps = model(ids).logits[0, :-1].double().log_softmax(-1)
    return torch.stack([logps[t - 1, ids[0, t]] for t in range(len(prompt), ids.shape[1])])


def oracle_metrics(model: Any, case: Case) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss, with its autograd graph, and every metric."""
    pairs, loss = case.pairs, case.loss
    if loss.get("objective") in {settings["objective"] for _, _, settings in TERMS.values()}:
        return _metrics_of_formula(model, case)
    sft = loss.get("objective") == "sft"
    beta = loss.get("simpo_beta", 2.0)
    total, nll, tokens, found = torch.zeros((), dtype=torch.float64), 0, 0, {}

    def count(name: str, value: Any) -> None:
        value = value.item() if isinstance(value, torch.Tensor) else value
        found[name] = found.get(name, 0.0) + value / len(case.indices)

    for i in case.indices:
        prompt, *responses = pairs.pair(i)
        logps = [response_logps(model, prompt, response) for response in responses[: 1 if sft else 2]]
        nll, tokens = nll - logps[0].sum(), tokens + len(logps[0])
        for bit, name, values in zip((1, 2), ("chosen", "rejected"), logps, strict=False):
            count(f"logps/{name}", values.mean())
            count(f"response_length/{name}", len(values))
            count(f"truncated/{name}", bool(pairs.columns["truncated"][i] & bit))
        if sft:
            continue
        count("likelihood_accuracy", logps[0].mean() > logps[1].mean())
        chosen, rejected = beta * logps[0].mean(), beta * logps[1].mean()
        margin = float(pairs.columns["margin"][i])
        gamma = loss.get("simpo_gamma", beta / 2) if math.isnan(margin) else margin
        logit = chosen - rejected - gamma
        if loss.get("simpo_loss_type") == "hinge":
            pair_loss = torch.clamp(1 - logit, min=0)
        else:
            swapped = loss.get("simpo_label_smoothing", 0.0)
            pair_loss = (1 - swapped) * F.softplus(-logit) + swapped * F.softplus(logit)
        total = total + float(pairs.columns["weight"][i]) * pair_loss / len(case.indices)
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


def _metrics_of_formula(model: Any, case: Case) -> tuple[torch.Tensor, dict[str, float]]:
    """`oracle_metrics` of an objective whose formula is in `formulas.py`."""
    pairs, settings = case.pairs, case.loss
    name = settings["objective"]
    flags = {key: value for key, value in settings.items() if key != "baseline"}
    ((weight, normalizer, _),) = (term for term in TERMS.values() if term[2] == flags)
    total, nll, tokens, found = torch.zeros((), dtype=torch.float64), torch.zeros(()), 0, Counter[str]()
    for i in case.indices:
        prompt, *responses = pairs.pair(i)
        logps = [response_logps(model, prompt, response) for response in responses]
        known = [float(pairs.columns[column][i]) for column in REFERENCE]
        (a, b), (n, m) = [part.sum() for part in logps], [len(part) for part in logps]
        loss, chosen, rejected = FORMULAS[name](Pair(a, b, n, m, *known), settings)
        total = total + float(pairs.columns["weight"][i]) * loss / len(case.indices)
        nll, tokens = nll - a, tokens + n
        averages = "logps_mean" if name in SUMS else "logps"
        values: dict[str, Any] = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": chosen > rejected,
            "rewards/ties": chosen == rejected,
            "logps/chosen": a,
            "logps/rejected": b,
            f"{averages}/chosen": a / n,
            f"{averages}/rejected": b / m,
            "likelihood_accuracy": a / n > b / m,
            "response_length/chosen": n,
            "response_length/rejected": m,
            "truncated/chosen": bool(pairs.columns["truncated"][i] & 1),
            "truncated/rejected": bool(pairs.columns["truncated"][i] & 2),
        }
        if name == "orpo":
            odds = [(part / count).exp() / (1 - (part / count).exp()) for part, count in ((a, n), (b, m))]
            values |= {
                "log_odds_chosen": (odds[0] / odds[1]).log(),
                "log_odds_ratio": -F.softplus(-(odds[0] / odds[1]).log()),
            }
        if name == "kto":
            values["kl_on_given_text"] = ((a - known[0]) + (b - known[1])) / 2
        if name == "simpo":
            values["rewards/above_gamma"] = chosen - rejected > settings["simpo_gamma"]
        found.update({key: float(value) / len(case.indices) for key, value in values.items()})
    total = total + weight * nll / (tokens if normalizer == "token" else len(case.indices))
    return total, {"loss": total.item(), "nll_loss": nll.item() / tokens, **found}


def oracle(model: Any, case: Case) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The metrics with the gradient norm, and the gradient of every parameter by its name."""
    model.zero_grad()
    loss, metrics = oracle_metrics(model, case)
    loss.backward()
    gradients = on_disk(model, {name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    return {**metrics, "grad_norm": norm}, gradients


def command_line(checkpoint: Path, settings: dict[str, Any]) -> list[str]:
    """The flags of a run on this checkpoint with these settings, and no data file."""
    return flags(checkpoint, Path("unused.jsonl"), **{"seq_length": SEQ_LENGTH, "clip_grad": 0, **settings})


def build_engine(argv: list[str]) -> tuple[Any, Any]:
    """On a rank: the engine of a run of this command line, and its HFCheckpoint."""
    from megatron.core import parallel_state

    from simpo_megatron.config.arguments import parse
    from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
    from simpo_megatron.trainer import setup
    from simpo_megatron.trainer.distributed import initialize

    config = parse(argv)
    hf = read_hf_checkpoint(config.model.hf_checkpoint)
    transformer = setup.build_transformer_config(config, hf)
    if not parallel_state.model_parallel_is_initialized():
        initialize(transformer, 1, "cpu", 0)
    return setup.build_engine(config, hf, transformer, config.train.train_iters), hf


def gather_gradients(engine: Any, hf: Any) -> dict[str, torch.Tensor]:
    """On a rank: `main_grad` of the parameters this rank holds, whole and by Hugging Face name."""
    from simpo_megatron.models.part_layout import join_ranks
    from simpo_megatron.models.placement import place_parameters
    from simpo_megatron.verify.shards import complete_gradients

    complete_gradients(engine)
    found = {}
    for place in (
        place
        for model in engine.models
        for place in place_parameters(model, hf.architecture.weights, tied=hf.architecture.tied)
        if place.entry.trained
    ):
        weight, mine, group = place.entry, place.parameter.main_grad, place.group
        shards = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(shards, mine, group=group)
        whole = mine if weight.tp_dim is None else join_ranks(weight.part_layout, weight.rows, shards, weight.tp_dim)
        parts = weight.part_layout.split(whole[: sum(weight.rows)], weight.rows)
        for held in weight.tensors:
            found[place.hf[held[0]]] = weight.as_stored(torch.cat([parts[part] for part in held]), held)
    return found


def run_cases(checkpoint: Path, layout: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """On a rank: for each case the metrics of an evaluation, those of a step, and the step's gradients."""
    found = {}
    for name in names:
        case = {**CASES, **OBJECTIVE_CASES}[name]
        settings = {"no_use_distributed_optimizer": "use_distributed_optimizer" not in layout, **layout, **case.loss}
        engine, hf = build_engine(command_line(checkpoint, settings))
        batch = engine.packer.pack(case.pairs, np.array(case.indices))
        evaluated = engine.evaluate(batch)
        trained = engine.train_step(batch)
        found[name] = (evaluated, trained, gather_gradients(engine, hf))
    return found


def check_layout(
    pool: WorkerPool,
    checkpoint: Path,
    oracles: dict[str, Any],
    world: int,
    layout: dict[str, Any],
    tolerance: float = 1e-5,
) -> None:
    """Compares every number of every rank with the oracle. Every parameter must be on some rank.

    Args:
        pool: runs the ranks.
        checkpoint: of the model.
        oracles: what `oracle` gives, for each case that is run.
        world: number of ranks.
        layout: settings of the layout.
        tolerance: relative.
    """
    ranks = pool.run(world, run_cases, checkpoint, layout, list(oracles))
    for name, (wanted, wanted_gradients) in oracles.items():
        for evaluated, trained, gradients in (found[name] for found in ranks):
            del trained["learning_rate"]
            metrics = {**trained, **{f"eval/{key}": value for key, value in evaluated.items()}}
            expected = {**wanted, **{f"eval/{key}": value for key, value in wanted.items() if key != "grad_norm"}}
            assert metrics == pytest.approx(expected, rel=tolerance, abs=2 * tolerance), name
            for key, gradient in gradients.items():
                assert relative_error(gradient, wanted_gradients[key]) < tolerance, (name, key)
        assert set().union(*(found[name][2] for found in ranks)) == wanted_gradients.keys()


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error of a whole tensor. An expert without tokens has a gradient of 0, which must be exact."""
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
