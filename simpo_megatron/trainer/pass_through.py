"""Fields for Megatron's configurations from text: `--transformer-config`, `--ddp-config` and `--optimizer-config`.

DistributedDataParallelConfig(**{**own, **fields_of(config, "ddp_config")})
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from simpo_megatron.compat import have_transformer_engine
from simpo_megatron.config.run import Config
from simpo_megatron.errors import UserError, one_line
from simpo_megatron.program import nearest
from simpo_megatron.settings import flag, require

CLASSES: dict[str, type] = {
    "transformer_config": TransformerConfig,
    "ddp_config": DistributedDataParallelConfig,
    "optimizer_config": OptimizerConfig,
}
# Names of Megatron-LM's flags for types of numbers.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}

# Fields that only some layouts use; see `check_use`.
_PARTIAL = "num_microbatches_with_partial_activation_checkpoints"
_REDUCE_SCATTER = ("pad_buckets_for_high_nccl_busbw", "reduce_scatter_with_fp32_accumulation")
_SENDING = ("overlap_p2p_comm", "batch_p2p_comm", "batch_p2p_sync", "deallocate_pipeline_outputs")
_FP8 = ("first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "tp_only_amax_red")
_OFFLOAD = ("use_torch_optimizer_for_cpu_offload", "pin_cpu_grads", "pin_cpu_params")
_INTERLEAVED = ("overlap_p2p_comm_warmup_flush", "microbatch_group_size_per_vp_stage")


def fields_of(config: Config, name: str) -> dict[str, Any]:
    """The fields that one of the settings gives, in the types of Megatron's dataclass.

    Args:
        config: of the run.
        name: of the setting: a key of `CLASSES`.

    Raises:
        UserError: Megatron has no such field, the value is not of its type, or a number is too small.
    """
    cls, given = CLASSES[name], config.megatron.values(name)
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    annotations = typing.get_type_hints(cls)
    found = {}
    for field, text in given.items():
        if field not in known:
            near = nearest(field, known)
            advice = f"did you mean {near}?" if near else "look at the class in the installed Megatron-Core"
            raise UserError(f"{flag(name)} {field}: {cls.__name__} has no such field; {advice}")
        try:
            found[field] = _convert(text, annotations[field])
        except (ValueError, KeyError, TypeError):
            wanted = _wanted(annotations[field])
            raise UserError(f"{flag(name)} {field}={text}: {field} is {wanted}; give such a value") from None
        least = _least(field, found[field])
        require(least is None, f"{flag(name)} {field}={text} must be {least}")
    return found


def _least(field: str, value: Any) -> str | None:
    """What a number that is too small must be; None for other values. Counts are above 0, but for layers in bf16."""
    numbers = [one for one in (value if isinstance(value, list | tuple) else (value,)) if type(one) in (int, float)]
    if all(type(one) is int for one in numbers) and not field.startswith("num_layers_"):
        return "greater than 0" if min(numbers, default=1) <= 0 else None
    return "at least 0" if min(numbers, default=0) < 0 else None


def check_use(config: Config, has_experts: bool) -> None:
    """Makes sure that the fields that are passed through change something in this run.

    Args:
        config: of the run.
        has_experts: whether the model has experts.

    Raises:
        UserError: a field has no effect with this layout or model, or needs what is not installed.
    """
    parallel, memory = config.parallel, config.memory
    full = parallel.recompute_granularity == "full"
    stages = parallel.pipeline_model_parallel_size > 1
    virtual = parallel.num_layers_per_virtual_pipeline_stage is not None
    rows = (  # whether the fields have an effect, what they need, and the fields
        (parallel.overlap_grad_reduce, "--overlap-grad-reduce", ("bucket_size",)),
        (parallel.overlap_param_gather, "--overlap-param-gather", ("align_param_gather",)),
        (parallel.sequence_parallel, "--sequence-parallel", ("clone_scatter_output_in_embedding",)),
        (full, "--recompute-granularity full", ("distribute_saved_activations", _PARTIAL)),
        (parallel.use_distributed_optimizer, "--use-distributed-optimizer", _REDUCE_SCATTER),
        (stages, "--pipeline-model-parallel-size of at least 2", (*_SENDING, _PARTIAL)),
        (virtual, "--num-layers-per-virtual-pipeline-stage", _INTERLEAVED),
        (memory.fp8_format is not None, "--fp8-format", _FP8),
        (memory.use_precision_aware_optimizer, "--use-precision-aware-optimizer", ("store_param_remainders",)),
        (memory.optimizer_cpu_offload, "--optimizer-cpu-offload", _OFFLOAD),
        (have_transformer_engine(), "Transformer Engine, which is not installed", ("moe_router_fusion",)),
    )
    for name in CLASSES:
        for field in config.megatron.values(name):
            lacking = [what for there, what, fields in rows if not there and field in fields]
            if field.startswith("moe_") and not has_experts:
                lacking = ["a model with experts, and this one is dense"]
            for what in lacking:
                advice = "drop it, or add that" if what.startswith("--") else "drop it"
                raise UserError(f"{flag(name)} {field} needs {what}; {advice}")


@contextlib.contextmanager
def refusals(config: Config, name: str) -> Iterator[None]:
    """Turns a refusal of Megatron inside the block into one sentence, where fields were passed through.

    Args:
        config: of the run.
        name: of the setting: a key of `CLASSES`.

    Raises:
        UserError: Megatron refuses the fields.
    """
    try:
        yield
    except Exception as error:
        items = " ".join(getattr(config.megatron, name) or ())
        of_megatron = error.__cause__ if isinstance(error, UserError) else error  # `transformer_config` has told one
        if not items or of_megatron is None or isinstance(error, torch.OutOfMemoryError | torch.distributed.DistError):
            raise
        why = one_line(of_megatron)
        if isinstance(error, TypeError) and not have_transformer_engine():  # Megatron compares its version with None
            why = "it needs Transformer Engine, which is not installed"
        raise UserError(f"{flag(name)} {items}: Megatron refuses it: {why}") from error


def _parts(annotation: Any) -> list[Any]:
    """The types that a value may have; text last, because every value is one."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return sorted(typing.get_args(annotation), key=lambda part: part is str)
    return [annotation]


def _convert(text: str, annotation: Any) -> Any:
    """A text as a value of a type.

    Raises:
        ValueError: it is none.
        KeyError: it is not the name of a dtype or of a member.
        TypeError: no text is one.
    """
    parts = _parts(annotation)
    if len(parts) > 1:
        for part in parts:
            try:
                return _convert(text, part)
            except (ValueError, KeyError, TypeError):
                continue
        raise ValueError
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (list, tuple):
        items = [_convert(item.strip(), inner[0]) for item in text.split(",")]
        return items if origin is list else tuple(items)
    if origin is typing.Literal:
        if text not in inner:
            raise ValueError
        return text
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return annotation[text]
    return _SIMPLE[annotation](text)


def _none(text: str) -> None:
    if text.lower() not in ("none", "null"):
        raise ValueError


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


_SIMPLE: dict[Any, Any] = {
    type(None): _none,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: _number,
    str: str,
    torch.dtype: DTYPES.__getitem__,
}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}


def _wanted(annotation: Any) -> str:
    """What a field takes, for the error."""
    words = []
    for part in _parts(annotation):
        origin, inner = typing.get_origin(part), typing.get_args(part)
        if origin is typing.Literal:
            words.append(" or ".join(map(str, inner)))
        elif origin in (list, tuple):
            words.append("a list with commas")
        elif part is torch.dtype:
            words.append(" or ".join(DTYPES))
        elif isinstance(part, type) and issubclass(part, enum.Enum):
            words.append(" or ".join(part.__members__))
        else:
            words.append(_NAMES.get(part, "an object, which no text can be"))
    return " or ".join(words)
