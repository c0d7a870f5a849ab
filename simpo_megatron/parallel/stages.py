"""Which layers a pipeline stage holds, and how many rows Megatron's embedding has. Plain arithmetic, each once.

Megatron-Core's own is `transformer_block.get_num_layers_to_build` and `transformer_layer.get_transformer_layer_offset`.
"""

from __future__ import annotations

from collections.abc import Iterable

from simpo_megatron.errors import UserError

VOCAB_DIVISOR = 128  # Megatron-LM's default of --make-vocab-size-divisible-by


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int, divisible_by: int = VOCAB_DIVISOR) -> int:
    """Rows of Megatron's embedding: the vocabulary rounded up to a multiple of `divisible_by * tensor_parallel_size`.

    >>> padded_vocab_size(32000, 2), padded_vocab_size(32001, 2)
    (32000, 32256)
    """
    multiple = divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def virtual_stages(num_layers: int, stages: int, layers_per_virtual_stage: int | None) -> int:
    """Virtual stages of a pipeline rank; 1 where nothing is interleaved.

    Raises:
        UserError: stages and virtual stages do not divide the layers.
    """
    if layers_per_virtual_stage is None:
        return 1
    if num_layers % (stages * layers_per_virtual_stage):
        raise UserError(
            f"--num-layers-per-virtual-pipeline-stage {layers_per_virtual_stage} x --pipeline-model-parallel-size {stages} "
            f"does not divide the model's {num_layers} layers; choose numbers that do"
        )
    return num_layers // (stages * layers_per_virtual_stage)


def stage_layers(
    num_layers: int, stages: int, virtual: int = 1, first: int | None = None, last: int | None = None
) -> list[list[range]]:
    """The global layers of every pipeline rank: one range a virtual stage, through which the layers run in turn.

    Args:
        num_layers: of the model.
        stages: pipeline_model_parallel_size.
        virtual: virtual stages of a rank.
        first, last: layers of the first and the last stage over all their virtual stages; None for as many as the others.

    Raises:
        UserError: the layers cannot be cut so; it names the flags and values that can.

    >>> stage_layers(8, 2, virtual=2)
    [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]
    >>> stage_layers(7, 3, first=2, last=1)
    [[range(0, 2)], [range(2, 6)], [range(6, 7)]]
    """
    counts = _counts(num_layers, stages, virtual, first, last)
    found: list[list[range]] = [[] for _ in range(stages)]
    start = 0
    for _ in range(virtual):
        for stage, count in enumerate(counts):
            found[stage].append(range(start, start + count))
            start += count
    return found


def _counts(num_layers: int, stages: int, virtual: int, first: int | None, last: int | None) -> list[int]:
    """Layers of one virtual stage of every pipeline rank."""
    ends = [count for count in (first, last) if count is not None]
    middle, left = stages - len(ends), num_layers - sum(ends)
    share = left // (middle * virtual) if middle > 0 else 0
    if left != share * max(middle, 0) * virtual or (middle and share < 1) or any(count % virtual for count in ends):
        raise _cannot_cut(num_layers, stages, virtual, first, last)
    head = [first // virtual] if first is not None else []
    tail = [last // virtual] if last is not None else []
    return [*head, *[share] * middle, *tail]


def _cannot_cut(num_layers: int, stages: int, virtual: int, first: int | None, last: int | None) -> UserError:
    """The error of a cut that does not come out even."""
    given = {"--decoder-first-pipeline-num-layers": first, "--decoder-last-pipeline-num-layers": last}
    named = " and ".join(f"{name} {count}" for name, count in given.items() if count is not None)
    middle = stages - sum(count is not None for count in given.values())
    of = f"{middle} pipeline stages" + (f" of {virtual} virtual stages each" if virtual > 1 else "")
    left = num_layers - (first or 0) - (last or 0)
    if named:
        return UserError(
            f"{named}: that leaves {left} of the model's {num_layers} layers for {of}; choose numbers that leave a positive "
            f"multiple of {max(middle * virtual, 1)}"
        )
    fitting = [size // virtual for size in divisors(num_layers) if size % virtual == 0]
    return UserError(
        f"{left} of the model's {num_layers} layers do not divide into {of}; use --pipeline-model-parallel-size "
        f"{join_or(fitting or [1])}, or give the first and the last stage another number of layers"
    )


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def join_or(values: Iterable[int]) -> str:
    """A list for people.

    >>> join_or([1, 2, 4])
    '1, 2 or 4'
    """
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
