"""Which layers a pipeline stage holds, and how many rows Megatron's embedding has.

The layers are those of Megatron-Core's `transformer_block.get_num_layers_to_build` and
`transformer_layer.get_transformer_layer_offset`.
"""

from __future__ import annotations

from collections.abc import Iterable

from simpo_megatron.errors import UserError

VOCAB_DIVISOR = 128  # Megatron-LM's default of --make-vocab-size-divisible-by


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int, divisible_by: int = VOCAB_DIVISOR) -> int:
    """Rows of Megatron's embedding: the vocabulary, rounded up to a multiple of `divisible_by * tensor_parallel_size`.

    Args:
        vocab_size: rows without padding.
        tensor_parallel_size: tensor-parallel ranks.
        divisible_by: `--make-vocab-size-divisible-by`.

    >>> padded_vocab_size(32000, 2), padded_vocab_size(32001, 2)
    (32000, 32256)
    """
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def virtual_stages(num_layers: int, stages: int, layers_per_virtual_stage: int | None) -> int:
    """Virtual stages of a pipeline rank; 1 where the schedule is not interleaved.

    Args:
        num_layers: of the model.
        stages: pipeline_model_parallel_size.
        layers_per_virtual_stage: `--num-layers-per-virtual-pipeline-stage`.

    Raises:
        UserError: stages and virtual stages do not divide the layers.
    """
    if layers_per_virtual_stage is None:
        return 1
    if num_layers % (stages * layers_per_virtual_stage):
        if num_layers % stages:
            fix = f"use --pipeline-model-parallel-size {join_or(divisors(num_layers))}"
        else:
            fix = f"use --num-layers-per-virtual-pipeline-stage {join_or(divisors(num_layers // stages))}"
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage {layers_per_virtual_stage} x --pipeline-model-parallel-size "
            f"{stages} does not divide the model's {num_layers} layers; {fix}"
        )
    return num_layers // (stages * layers_per_virtual_stage)


def stage_layers(
    num_layers: int, stages: int, virtual: int = 1, first: int | None = None, last: int | None = None
) -> list[list[range]]:
    """The global layers of every pipeline rank: one range for each of its virtual stages.

    Args:
        num_layers: of the model.
        stages: pipeline_model_parallel_size.
        virtual: virtual stages of a rank.
        first: layers of the first stage, over all its virtual stages; None for as many as the middle stages.
        last: layers of the last stage, in the same way.

    Raises:
        UserError: the layers cannot be divided so; it names the flags and values that can.

    >>> stage_layers(8, 2, virtual=2)
    [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]
    >>> stage_layers(7, 3, first=2, last=1)
    [[range(0, 2)], [range(2, 6)], [range(6, 7)]]
    """
    ends = [count for count in (first, last) if count is not None]
    if not _fits(num_layers, stages, virtual, sum(ends), len(ends)) or any(count % virtual for count in ends):
        raise _does_not_fit(num_layers, stages, virtual, first, last)
    middle = stages - len(ends)
    share = (num_layers - sum(ends)) // (middle * virtual) if middle else 0
    head = [first // virtual] if first is not None else []
    tail = [last // virtual] if last is not None else []
    counts = [*head, *[share] * middle, *tail]  # layers of one virtual stage of every rank
    found: list[list[range]] = [[] for _ in range(stages)]
    start = 0
    for _ in range(virtual):
        for stage, count in enumerate(counts):
            found[stage].append(range(start, start + count))
            start += count
    return found


def _fits(num_layers: int, stages: int, virtual: int, ends: int, given: int) -> bool:
    """Whether the layers outside the `given` end stages, which hold `ends` layers, divide over the other stages."""
    middle, left = stages - given, num_layers - ends
    return left == 0 if middle == 0 else middle > 0 and left > 0 and left % (middle * virtual) == 0


def _does_not_fit(num_layers: int, stages: int, virtual: int, first: int | None, last: int | None) -> UserError:
    """The error for layers that do not divide over the stages, with values that fit."""
    flags = {"--decoder-first-pipeline-num-layers": first, "--decoder-last-pipeline-num-layers": last}
    given = {name: count for name, count in flags.items() if count is not None}
    in_virtual = f" of {virtual} virtual stages each" if virtual > 1 else ""
    if not given:
        sizes = [size // virtual for size in divisors(num_layers) if size % virtual == 0]
        return UserError(
            f"the model's {num_layers} layers do not divide into {stages} pipeline stages{in_virtual}; use "
            f"--pipeline-model-parallel-size {join_or(sizes or [1])}, or give the first and the last stage another "
            "number of layers"
        )
    ends = sum(given.values())
    named = " and ".join(f"{name} {count}" for name, count in given.items()) + (
        " leaves" if len(given) == 1 else " leave"
    )
    totals = [
        total
        for total in range(len(given) * virtual, num_layers + 1, virtual)
        if _fits(num_layers, stages, virtual, total, len(given))
    ]
    nearest = [*[total for total in totals if total <= ends][-1:], *[total for total in totals if total > ends][:1]]
    if not nearest:
        fix = "use another --pipeline-model-parallel-size"
    elif len(given) == 1:
        fix = f"use {join_or(nearest)}"
    else:
        multiples = f", each a multiple of {virtual}" if virtual > 1 else ""
        fix = f"choose two numbers with the sum {join_or(nearest)}{multiples}"
    return UserError(
        f"{named} {num_layers - ends} of the model's {num_layers} layers for the other {max(0, stages - len(given))} "
        f"pipeline stages{in_virtual}; {fix}"
    )


def divisors(number: int) -> list[int]:
    """All divisors, ascending.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [n for n in range(1, number + 1) if number % n == 0]


def join_or(values: Iterable[int]) -> str:
    """Values as a list in words.

    >>> join_or([1, 2, 4])
    '1, 2 or 4'
    """
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
