"""Random adapters for tiny models, their oracle, and what a rank does with them.

The oracle merges the adapter into a model of transformers: W' = W + scale * B A. From the gradient G of W' follow those
of the factors: scale * B^T G and scale * G A^T. `test_peft.py` shows that PEFT computes the same.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from simpo_megatron.adapters.lora import Lora, adapter_entries
from simpo_megatron.adapters.peft_folder import PREFIX, WEIGHTS, write_peft
from simpo_megatron.models.hf_checkpoint import read_hf_checkpoint
from tests.support.families import QWEN3_EXPERTS, on_disk
from tests.support.steps import CASES, build_engine, command_line, oracle_metrics
from tests.support.tiny import EXPERTS, GLM

LORA = Lora(4, 6.0)
ATTENTION = Lora(4, 6.0, ("q_proj", "v_proj", "o_proj"))
# The class in transformers, its settings, and the adapter. The first five are `KINDS`, the others have what is rare.
MODELS: dict[str, tuple[str, dict[str, Any], Lora]] = {
    "llama": ("Llama", {}, LORA),
    "tied": ("Llama", {"tie_word_embeddings": True}, LORA),
    "qwen3": ("Qwen3", {"head_dim": 16}, LORA),
    "mixtral": ("Mixtral", EXPERTS, LORA),
    "qwen3_moe": ("Qwen3Moe", QWEN3_EXPERTS, LORA),
    "attention": ("Qwen3", {"head_dim": 16}, ATTENTION),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, Lora(3, 5.0, rslora=True)),
    "glm": ("Glm4Moe", GLM, ATTENTION),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 1.0, "pad_token_id": None},
        LORA,
    ),
}
KINDS = ("llama", "tied", "qwen3", "mixtral", "qwen3_moe")
WITH_EXPERTS = ("mixtral", "qwen3_moe")
CASE = CASES["columns"]


def factors_of(folder: Path) -> dict[str, Tensor]:
    """The factors in a PEFT folder, by their names in the weight table."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(folder / WEIGHTS).items()}


def random_adapter(checkpoint: Path, folder: Path, lora: Lora = LORA) -> dict[str, Tensor]:
    """Writes a random adapter, both factors, as PEFT would; returns the factors by their names in the weight table."""
    architecture = read_hf_checkpoint(checkpoint).architecture
    generator = torch.Generator().manual_seed(3)
    factors = {
        entry.hf[0].format(**where): 0.2 * torch.randn(entry.shapes[0], generator=generator)
        for entry in adapter_entries(architecture, lora)
        for where in entry.instances(architecture.num_layers)
    }
    write_peft(folder, lora, factors, architecture, str(checkpoint))
    return factors


def merge_weights(checkpoint: Path, factors: dict[str, Tensor], lora: Lora, folder: Path) -> None:
    """Writes a checkpoint with an adapter added to its weights."""
    shutil.copytree(checkpoint, folder)
    state = load_file(folder / "model.safetensors")
    for base in {name.removesuffix("lora_A.weight") for name in factors if ".lora_A." in name}:
        a, b = factors[f"{base}lora_A.weight"], factors[f"{base}lora_B.weight"]
        state[f"{base}weight"] = state[f"{base}weight"] + lora.scale * (b @ a)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def merge(checkpoint: Path, factors: dict[str, Tensor], lora: Lora, folder: Path) -> Any:
    """The model of transformers with an adapter added to its weights."""
    merge_weights(checkpoint, factors, lora, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def oracle(model: Any, factors: dict[str, Tensor], lora: Lora, case: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The metrics with the gradient norm, and the gradient of every factor by its name.

    Args:
        model: of transformers, with the adapter merged.
        factors: of the adapter.
        lora: its shape.
        case: loss and pairs.
    """
    model.zero_grad()
    loss, metrics = oracle_metrics(model, case)
    loss.backward()
    whole = on_disk(model, {name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    gradients = {}
    for name, factor in factors.items():
        base, _, kind = name.removesuffix(".weight").rpartition(".lora_")
        gradient = whole[f"{base}.weight"]
        other = factors[f"{base}.lora_{'B' if kind == 'A' else 'A'}.weight"]
        gradients[name] = lora.scale * (other.T @ gradient if kind == "A" else gradient @ other.T)
        assert gradients[name].shape == factor.shape
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    return {**metrics, "grad_norm": norm}, gradients


def gather_factors(engine: Any, of: str) -> dict[str, Tensor]:
    """On a rank: the whole factors ("data") of its layers, or their gradients ("main_grad")."""
    from simpo_megatron.adapters.install import factors
    from simpo_megatron.verify.shards import complete_gradients

    if of == "main_grad":
        complete_gradients(engine)
    found = {}
    for place in (place for model in engine.models for place in factors(model)):
        mine: Tensor = getattr(place.parameter, of).detach()
        shards = [torch.empty_like(mine) for _ in range(place.group.size())]
        dist.all_gather(shards, mine.contiguous(), group=place.group)
        if place.entry.tp_dim is None:
            for shard in shards:
                assert torch.equal(shard, shards[0]), place.name
            found[place.hf[0]] = shards[0].clone()
        else:
            found[place.hf[0]] = torch.cat(shards, dim=place.entry.tp_dim)
    return found


# The rate is so large that three steps are seen in the logits. With an eps as large as the gradients, a step is smooth
# in them: with Adam's usual one it is a sign, and rounding decides it where a gradient is small.
TRAINING = {
    "lr": 2e-2,
    "lr_decay_style": "constant",
    "lr_warmup_fraction": 0,
    "weight_decay": 0.1,
    "adam_eps": 1e-2,
    "clip_grad": 1.0,
}
STEPS = 3


@dataclass(frozen=True)
class Oracle:
    """An adapter of a tiny model, and what training gives, by transformers and torch's AdamW.

    Attributes:
        checkpoint: the base.
        folder: the adapter, as PEFT writes it.
        lora: its shape.
        factors: the adapter, by the names in the weight table.
        metrics: of the first step, with the gradient norm.
        gradients: of the first step.
        stepped: the factors after `STEPS` steps.
    """

    checkpoint: Path
    folder: Path
    lora: Lora
    factors: dict[str, Tensor]
    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    stepped: dict[str, Tensor]


def train_oracle(checkpoint: Path, folder: Path, lora: Lora) -> Oracle:
    """Writes a random adapter below `folder`, and trains it."""
    factors = random_adapter(checkpoint, folder / "adapter", lora)
    trained = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in factors.items()}
    adam = torch.optim.AdamW(
        trained.values(), lr=TRAINING["lr"], weight_decay=TRAINING["weight_decay"], eps=TRAINING["adam_eps"]
    )
    first = None
    for step in range(STEPS):
        now = {name: parameter.detach() for name, parameter in trained.items()}
        found = oracle(merge(checkpoint, now, lora, folder / str(step)), now, lora, CASE)
        first = first or found
        for name, gradient in found[1].items():
            trained[name].grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(trained.values(), TRAINING["clip_grad"])
        adam.step()
    assert first is not None
    stepped = {name: parameter.detach() for name, parameter in trained.items()}
    return Oracle(checkpoint, folder / "adapter", lora, factors, *first, stepped)


def build_adapted(checkpoint: Path, adapter: Path, settings: dict[str, Any]) -> tuple[Any, Any, Any]:
    """On a rank: the engine of a base and its adapter, the checkpoint of the base, and the batch of `CASE`."""
    alone = {"no_use_distributed_optimizer": "use_distributed_optimizer" not in settings}
    own = {"load_adapter": adapter, **TRAINING, **CASE.loss}
    engine, hf = build_engine(command_line(checkpoint, {**alone, **own, **settings}))
    return engine, hf, engine.packer.pack(CASE.pairs, np.array(CASE.indices))


def run_layout(checkpoint: Path, adapter: Path, settings: dict[str, Any], exports: Path) -> Any:
    """On a rank: metrics of an evaluation and of a step, its gradients, and the factors after `STEPS`, with exports."""
    from simpo_megatron.adapters.export import export_adapter
    from simpo_megatron.adapters.merge import MergedWeights
    from simpo_megatron.models.export import export_hf

    engine, hf, batch = build_adapted(checkpoint, adapter, settings)
    evaluated, metrics = engine.evaluate(batch), engine.compute_gradients(batch)
    gradients = gather_factors(engine, "main_grad")
    trained = [engine.train_step(batch) for _ in range(STEPS)]
    assert {name: trained[0][name] for name in metrics} == metrics
    engine.sync_parameters()
    export_adapter(engine.models, hf, exports / "adapter")
    export_hf(engine.models, hf, exports / "merged", merged=MergedWeights(engine.models))
    trainable = {name for model in engine.models for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapter." in name for name in trainable)
    return evaluated, trained[0], gradients, gather_factors(engine, "data")
