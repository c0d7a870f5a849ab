"""An adapter on the models of a rank: the factors, which train, and the base, which does not.

    load_hf_weights(models, hf)
    install(models, hf, lora, seed)        # before the head is installed and DDP wraps the models

A is drawn whole for each projection, from the seed and the name, and then cut. So a model is the same, bit for bit, in
any layout. B is zero: before the first step the model is the base.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from simpo_megatron.adapters.dropout import Stream, start_streams
from simpo_megatron.adapters.layer import LinearAdapter
from simpo_megatron.adapters.lora import Lora, adapted_table, projections
from simpo_megatron.errors import UserError
from simpo_megatron.models.build import mark_parameters
from simpo_megatron.models.hf_checkpoint import HFCheckpoint
from simpo_megatron.models.part_layout import rank_slice, same_shares
from simpo_megatron.models.placement import PlacedParameter, place_parameters, unwrap
from simpo_megatron.models.weight_table import WeightEntry


class AdaptedModel(GPTModel):
    """A GPTModel with an adapter. Its checkpoints hold the factors alone; the base comes from its own checkpoint.

    Attributes:
        lora: the adapter.
        table: the weight table, with the entries of the factors.
        tied: whether the output layer is the embedding.
        streams: of the random numbers of dropout, of this rank; none without dropout.
    """

    lora: Lora
    table: Sequence[WeightEntry]
    tied: bool
    streams: set[Stream]

    def sharded_state_dict(  # type: ignore[override]
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The factors as Megatron's sharded tensors, by the names of this rank's parameters."""
        return {place.name: _sharded(place) for place in factors(self)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Fills the factors. The base is not in the state."""
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def factors(model: torch.nn.Module) -> Iterator[PlacedParameter]:
    """The factors of a model of this rank, wrapped by DDP or not, each with its entry; none without an adapter."""
    gpt = unwrap(model)
    if isinstance(gpt, AdaptedModel):
        for place in place_parameters(gpt, gpt.table, tied=gpt.tied):
            if place.entry.trained:
                yield place


def _sharded(place: PlacedParameter) -> ShardedTensor:
    entry, group = place.entry, place.group
    if entry.experts:
        replica = parallel_state.get_expert_data_parallel_rank()
    else:
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    split = () if entry.tp_dim is None else ((entry.tp_dim, group.rank(), group.size()),)
    name = entry.megatron.format(layer=place.layer, expert=place.expert)
    return ShardedTensor.from_rank_offsets(
        name.replace(".local_experts.", ".experts."),  # as Megatron's key of an expert that is not stacked
        place.parameter,
        *split,
        replica_id=(0, 0 if split else group.rank(), replica),
    )


def install(models: Sequence[GPTModel], hf: HFCheckpoint, lora: Lora, seed: int) -> None:
    """Puts an adapter on the models of this rank and freezes their base. A is drawn, and B is zero.

    Args:
        models: with the weights of the base.
        hf: the checkpoint of the base.
        lora: the adapter.
        seed: of A.

    Raises:
        UserError: the model cannot have this adapter.
        ValueError: a model has an adapter already.
    """
    if any(isinstance(model, AdaptedModel) for model in models):
        raise ValueError("the model has an adapter already, and would get two; build it again from its base")
    table, tied = adapted_table(hf.architecture, lora), hf.architecture.tied
    base = {entry.megatron: entry for entry in hf.architecture.weights}
    for model in models:
        model.requires_grad_(False)
        for linear, place in _targeted(model, base.values(), lora, tied):
            entry, ranks = place.entry, place.group.size()
            if entry.tp_dim == 0 and not same_shares(entry.part_layout, entry.rows, ranks):
                raise UserError(
                    f"--tensor-model-parallel-size {ranks} cuts a query group, whose parts cannot have adapters then; "
                    f"use at most {hf.architecture.transformer['num_query_groups']}, the number of key and value heads"
                )
            experts = getattr(linear, "num_gemms", None)
            LinearAdapter(
                place.entry,
                lora,
                group=place.group,
                sequence_parallel=model.config.sequence_parallel,
                experts=experts,
                like=place.parameter,
            ).attach(linear)
        adapted: Any = model
        adapted.__class__ = AdaptedModel
        adapted.lora, adapted.table, adapted.tied = lora, table, tied
        adapted.streams = {layer.stream for layer in adapters([model]) if layer.stream is not None}
        mark_parameters(model, table, tied=tied)
        for place in factors(model):
            _mark(place, model.config.sequence_parallel)
        if model.pre_process and model.config.recompute_granularity is not None:
            model.embedding.register_forward_hook(_require_grad)
    fill_factors(models, lambda place: _draw(place, seed))


def _targeted(model: GPTModel, table: Any, lora: Lora, tied: bool) -> list[tuple[torch.nn.Module, PlacedParameter]]:
    """The layers that get factors, each with its weight; a grouped layer with that of its first expert."""
    found: dict[str, tuple[torch.nn.Module, PlacedParameter]] = {}
    for place in place_parameters(model, table, tied=tied):
        if set(projections(place.entry)) & set(lora.targets):
            layer = place.name.rpartition(".")[0]
            found.setdefault(layer, (model.get_submodule(layer), place))
    return list(found.values())


def _mark(place: PlacedParameter, sequence_parallel: bool) -> None:
    """Tells Megatron that a factor sees other tokens on every tensor-parallel rank, where it is whole on all."""
    parameter: Any = place.parameter
    if place.entry.tp_dim is None and not place.entry.experts:
        parameter.sequence_parallel = sequence_parallel


def _require_grad(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Lets a gradient reach recomputed layers: torch recomputes nothing where no input of a layer requires one."""
    return output.detach().requires_grad_(True) if torch.is_grad_enabled() else output


def _draw(place: PlacedParameter, seed: int) -> Tensor:
    """A factor as training starts: PEFT's uniform distribution for A, and 0 for B. fp32, on the CPU."""
    [shape], [name] = place.entry.shapes, place.hf
    if ".lora_B." in name:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def fill_factors(models: Sequence[torch.nn.Module], whole: Callable[[PlacedParameter], Tensor]) -> None:
    """Fills the factors of this rank.

    Args:
        models: with an adapter.
        whole: gives the whole factor on the CPU, which is cut and rounded here.
    """
    for model in models:
        for place in factors(model):
            tensor, dim = whole(place), place.entry.tp_dim
            if dim is not None:
                cut = rank_slice(tensor.shape[dim], tensor.shape[dim], place.group.rank(), place.group.size())
                tensor = tensor.narrow(dim, cut.start, cut.stop - cut.start)
            place.parameter.data.copy_(tensor)


def adapters(models: Sequence[torch.nn.Module]) -> Iterator[LinearAdapter]:
    """The adapters of all layers of these models; none where they have no adapter."""
    for model in models:
        for module in model.modules():
            if isinstance(module, LinearAdapter):
                yield module


def start_dropout(models: Sequence[torch.nn.Module], seed: int, position: int) -> None:
    """Starts the random numbers of a step: the masks are a function of the seed, the position and the layout.

    Args:
        models: of this rank; without an adapter, or without dropout, nothing is done.
        seed: of the run.
        position: of the step in the run.
    """
    adapted = [gpt for gpt in map(unwrap, models) if isinstance(gpt, AdaptedModel)]
    if streams := set[Stream]().union(*(model.streams for model in adapted)):
        start_streams(streams, next(adapted[0].parameters()).device, seed, position)


@contextlib.contextmanager
def without_adapters(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside the block the models are their base: the reference of an objective that compares with one."""
    found = list(adapters(models))
    for adapter in found:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in found:
            adapter.enabled = True
