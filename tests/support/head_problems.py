"""Random problems for the head: rows with pairs in them, what the head must compute, and what it computes on a rank.

The oracle is that of the benchmark, `tools/head_oracle.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from simpo_megatron.head import projection
from simpo_megatron.head.layer import LogProbHead, split_output
from simpo_megatron.head.task import HeadTask, ScoredPositions
from tools.head_oracle import lay_out, oracle

HIDDEN, VOCAB, PADDED = 8, 50, 64  # with 8 shards the last one is all padding
SCALE = 0.75  # the loss is multiplied by it before the backward pass
POSITION_BYTES = PADDED * 8  # of the logits of one position in fp64


def sigmoid(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The SimPO loss of 7 pairs."""
    return -F.logsigmoid(margins(sums, lengths)).sum() / 7


def smoothing(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """With label smoothing."""
    logits = margins(sums, lengths)
    return -(0.9 * F.logsigmoid(logits) + 0.1 * F.logsigmoid(-logits)).sum()


def hinge(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The hinge loss."""
    return torch.relu(1 - margins(sums, lengths)).sum()


def weighted_nll(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Weighted pairs with an NLL term: the derivatives by the two sums of a pair are unrelated."""
    weight = torch.arange(len(sums)) % 3
    return -(weight * F.logsigmoid(margins(sums, lengths))).sum() - 0.3 * sums[:, 0].sum() / 11


def chosen_nll(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The NLL of the chosen responses alone."""
    return -sums[:, 0].sum() / 5


def margins(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The reward margins less gamma."""
    means = sums / lengths
    return 2.5 * (means[:, 0] - means[:, 1]) - 0.5


PAIR_LOSSES = [sigmoid, smoothing, hinge, weighted_nll]


@dataclass
class Problem:
    """A row of tokens with its pairs, random hidden states and a random weight.

    Attributes:
        lengths: tokens of prompt, chosen and rejected response of each pair.
        responses: responses of a pair that are scored.
        seed: of the random numbers.
        dtype: of hidden states and weight.
        hidden_size: of the hidden states.
        vocab: the true vocabulary.
        padded: rows of the weight.
        confident: every target is the token that the model predicts, with a probability near 1.
        softcap: the bound of the model's logits.
    """

    lengths: tuple[tuple[int, int, int], ...]
    responses: int = 2
    seed: int = 0
    dtype: torch.dtype = torch.float64
    hidden_size: int = HIDDEN
    vocab: int = VOCAB
    padded: int = PADDED
    confident: bool = False
    softcap: float | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.row = lay_out(self.lengths, self.responses)
        starts = self.row.starts
        tokens = -(-(starts[-1] + 1) // 16) * 16

        def normal(rows: int) -> torch.Tensor:
            return torch.randn(rows, self.hidden_size, dtype=torch.float64, generator=generator).to(self.dtype)

        self.hidden, self.weight = normal(tokens), normal(self.padded)
        self.weight[self.vocab :] = 9  # padding that would win
        self.targets = torch.randint(self.vocab, (tokens,), generator=generator)
        self.positions, self.segments, self.lengths_PM = self.row.positions_R, self.row.segments_R, self.row.lengths_PM
        if self.confident:
            self.targets = (self.hidden.double() @ self.weight[: self.vocab].double().T).argmax(-1)
        # The context-parallel rank of each token. The first pair of the row is on one rank alone.
        self.parts = torch.randint(2, (tokens,), generator=generator)
        if self.lengths:
            self.parts[: starts[self.responses]] = 1

    def oracle(self, loss: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The loss, the sums, and both gradients of SCALE * loss, whole and in fp64."""
        found = oracle(
            self.hidden[self.positions],
            self.weight[: self.vocab],
            self.targets[self.positions],
            self.row,
            lambda sums: SCALE * loss(sums, self.lengths_PM),
            self.softcap,
        )
        hidden, weight = (torch.zeros(x.shape, dtype=torch.float64) for x in (self.hidden, self.weight))
        hidden[self.positions], weight[: self.vocab] = found.hidden_RH, found.weight_VH
        return loss(found.sums_PM, self.lengths_PM), found.sums_PM, hidden, weight

    def bf16_errors(self, loss: Callable[..., torch.Tensor], native: bool) -> tuple[float, float, float]:
        """The errors in bf16 that rounding predicts: of the sums and of both gradients of SCALE * loss, relative to
        their norms.

        The gradients that are returned are rounded to bf16. With native bf16 GEMMs so are the logits, their gradient,
        and each product of that gradient with hidden states or weights. Everything else is fp32.

        Rounding to 8 significant bits changes a number with the significand m in [1, 2) by up to 2**-8 / m of it,
        uniformly. Significands have the density 1 / m. Errors are independent, so their squares add up. The prediction
        is of first order, computed in fp64.

        Args:
            loss: from sums and lengths to a scalar.
            native: whether the GEMMs are native bf16.
        """
        unit = 2.0**-8 / 3**0.5 * (3 / 8 / math.log(2)) ** 0.5  # root of the mean square, over errors and significands
        inner = unit if native else 2.0**-24  # of what the GEMMs give
        hidden, weight = self.hidden[self.positions].double(), self.weight[: self.vocab].double()
        logits, targets = hidden @ weight.T, self.targets[self.positions, None]
        p = logits.softmax(-1)
        squares = (inner * logits).square()  # of the errors of the logits
        of_lse = (p.square() * squares).sum(-1, keepdim=True)
        pull = torch.zeros_like(p).scatter_(1, targets, 1.0) - p  # the derivative of each log-prob by its logits
        of_logps = (pull.square() * squares).sum(-1)

        sums = self.row.sums(logits.log_softmax(-1).gather(1, targets)[:, 0])
        of_sums = self.row.sums(of_logps)
        slope = torch.func.jacrev(lambda x: SCALE * loss(x, self.lengths_PM))(sums).flatten()[self.segments, None]
        curvature = torch.func.hessian(lambda x: SCALE * loss(x, self.lengths_PM))(sums)
        of_slope = torch.einsum("pmqn,qn->pm", curvature.square(), of_sums).flatten()[self.segments, None]
        gradient = slope * pull
        of_p = p.square() * (squares * (1 - 2 * p) + of_lse)  # a probability near 1 moves little
        of_gradient = of_slope * pull.square() + slope.square() * of_p + (inner * gradient).square()
        _, _, grad_hidden, grad_weight = self.oracle(loss)
        of_weight = of_gradient.T @ hidden.square() + (unit**2 + inner**2) * grad_weight[: self.vocab].square()
        of_hidden = of_gradient @ weight.square() + (unit**2 + inner**2) * grad_hidden[self.positions].square()
        return tuple(  # type: ignore[return-value]
            float(error.sum().sqrt() / whole.norm())
            for error, whole in ((of_sums, sums), (of_hidden, grad_hidden), (of_weight, grad_weight))
        )


@contextlib.contextmanager
def bf16_arithmetic(native: bool) -> Iterator[None]:
    """Within this context the head computes as on a processor with bf16 arithmetic, or as on one without."""
    before, projection.have_native_bf16 = projection.have_native_bf16, lambda: native
    try:
        yield
    finally:
        projection.have_native_bf16 = before


@contextlib.contextmanager
def products(way: str) -> Iterator[None]:
    """Within this context the head multiplies bf16 matrices in this way (`projection._way`), also that of a GPU.

    The operators with `out_dtype`, which torch has on CUDA alone, multiply fp32 copies here.
    """
    before, mm, addmm = projection._way, torch.mm, torch.addmm

    def as_fp32(multiply: Any) -> Any:
        def call(*matrices: torch.Tensor, out_dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
            return multiply(*(x if out_dtype is None else x.to(out_dtype) for x in matrices), **options)

        return call

    projection._way, torch.mm, torch.addmm = (lambda weight: way), as_fp32(mm), as_fp32(addmm)
    try:
        yield
    finally:
        projection._way, torch.mm, torch.addmm = before, mm, addmm


def random_problems() -> list[Problem]:
    """Rows of 1, 3 and 7 pairs, an empty row, and a row of chosen responses alone; the logits of some have a bound."""
    generator = torch.Generator().manual_seed(3)

    def lengths(pairs: int) -> tuple[tuple[int, int, int], ...]:
        return tuple(tuple(torch.randint(1, 12, (3,), generator=generator).tolist()) for _ in range(pairs))  # type: ignore[misc]

    return [
        Problem(lengths(pairs), seed=pairs, softcap=softcap) for pairs, softcap in ((1, None), (3, 2.5), (7, None))
    ] + [
        Problem(()),
        Problem(lengths(3), responses=1),
    ]


def build_head(problem: Problem, tp: int, sp: bool, cp: int, slab_bytes: int, tied: bool = False) -> tuple[Any, Any]:
    """On a rank: the head, and the weight that it scores with.

    Args:
        problem: what is scored.
        tp: tensor-parallel size.
        sp: whether sequence parallelism is on.
        cp: context-parallel size.
        slab_bytes: of the head.
        tied: the weight is handed to the head instead of being its own.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=problem.hidden_size,
        num_attention_heads=8,
        tensor_model_parallel_size=tp,
        sequence_parallel=sp,
        context_parallel_size=cp,
        params_dtype=problem.dtype,
        perform_initialization=False,
        cuda_graph_scope=[],
        gradient_accumulation_fusion=False,
    )
    layer = ColumnParallelLinear(
        problem.hidden_size,
        problem.padded,
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        skip_weight_param_allocation=tied,
    )
    shard = problem.weight.chunk(tp)[parallel_state.get_tensor_model_parallel_rank()].clone()
    weight = torch.nn.Parameter(shard) if tied else layer.weight
    weight.data = shard
    model: Any = SimpleNamespace(output_layer=layer)
    layer.softcap = problem.softcap  # type: ignore[assignment]
    head = LogProbHead.install(model, slab_bytes)
    assert model.output_layer is head and (tied or head.weight is weight)
    return head, weight


def score(problem: Problem, head: Any, weight: Any, loss: Any, tied: bool = False, **task: Any) -> tuple[Any, ...]:
    """On a rank: loss, sums, this rank's tokens, and the gradient of their hidden states.

    Args:
        problem: what is scored.
        head: from `build_head`.
        weight: from `build_head`.
        loss: from sums and lengths to a scalar.
        tied: as for `build_head`.
        **task: further fields of the `HeadTask`.
    """
    from megatron.core import parallel_state

    cp, part = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    mine = problem.parts == part if cp > 1 else torch.ones_like(problem.parts, dtype=torch.bool)
    tokens = mine.nonzero()[:, 0]
    place = torch.full_like(problem.targets, -1)
    place[tokens] = torch.arange(len(tokens))
    kept = mine[problem.positions]
    positions, segments = problem.positions[kept], problem.segments[kept]
    pairs = len(problem.lengths_PM)
    hidden = problem.hidden[tokens]
    hidden = F.pad(hidden, (0, 0, 0, -len(hidden) % 8))[:, None]
    if head.sequence_parallel:
        hidden = hidden.chunk(head.tp_group.size())[head.tp_group.rank()]
    hidden = hidden.clone().requires_grad_()
    pair_of_positions = problem.segments // problem.responses
    per_pair = [
        torch.bincount(
            pair_of_positions[problem.parts[problem.positions] == part] if cp > 1 else pair_of_positions,
            minlength=pairs,
        )
        for part in range(cp)
    ]
    made = HeadTask(
        scored=ScoredPositions(
            positions_R=place[positions],
            targets_R=problem.targets[positions],
            segments_R=segments,
            per_pair=tuple(per_pair[part].tolist()) if pairs else (),
            per_pair_max=tuple(torch.stack(per_pair).amax(0).tolist()) if pairs else (),
        ),
        responses=problem.responses,
        vocab_size=problem.vocab,
        loss=lambda sums: loss(sums, problem.lengths_PM),
        **task,
    )
    with head.scoring(made):
        output, bias = head(hidden, weight=weight if tied else None)
    assert bias is None
    value, sums = split_output(output.transpose(0, 1).contiguous(), problem.responses)
    if torch.is_grad_enabled():
        (SCALE * value).backward()
    return value.detach(), sums, tokens, hidden.grad
