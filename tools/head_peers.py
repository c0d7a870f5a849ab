"""The implementations `bench_head.py` compares: response tokens' loss and gradients from hidden states, each in its own way.

Every one is a function of a `Problem` that returns the loss; its backward leaves the gradient of `hidden_TH` in `.grad` and
that of the weight in `weight.main_grad`, the fp32 buffer that Megatron's DDP keeps for every parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

BETA, GAMMA = 2.0, 1.0


@dataclass(frozen=True)
class Shape:
    """`2x512+2048:4096x128256@4`: 2 pairs of 2 x 512 response tokens, prompts of 2048, hidden x vocabulary, 4 shards."""

    pairs: int
    response: int
    prompt: int
    hidden: int
    vocab: int
    tensor_parallel: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads the text above; prompt and shards may be left out."""
        tokens, _, sizes = text.partition(":")
        sizes, _, shards = sizes.partition("@")
        tokens, _, prompt = tokens.partition("+")
        numbers = [*tokens.split("x"), prompt or "0", *sizes.split("x"), shards or "1"]
        return cls(*map(int, numbers))

    @property
    def rows(self) -> int:
        """Response tokens."""
        return self.pairs * 2 * self.response


class Problem:
    """Inputs of one rank. Weight and hidden states are bf16 numbers in any dtype, so that one fp64 oracle serves all."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, rank: int) -> None:
        self.shape, self.rank = shape, rank
        generator = torch.Generator().manual_seed(1)
        sequence = shape.prompt + shape.response
        self.tokens = shape.pairs * 2 * sequence
        hidden = torch.randn(self.tokens, shape.hidden, generator=generator).bfloat16()
        weight = torch.randn(shape.vocab, shape.hidden, generator=generator).mul_(2 / shape.hidden**0.5).bfloat16()
        targets = torch.randint(shape.vocab, (self.tokens,), generator=generator)
        starts = torch.arange(0, self.tokens, sequence)[:, None] + shape.prompt
        self.rows = (starts + torch.arange(shape.response)).flatten().to(device)
        self.segments = torch.arange(shape.pairs * 2).repeat_interleave(shape.response).to(device)
        self.hidden_TH = hidden.to(device, dtype).requires_grad_()
        shard = weight.chunk(shape.tensor_parallel)[rank]
        self.weight = torch.nn.Parameter(shard.to(device, dtype, copy=True))
        self.targets = targets.to(device)
        self.slab_bytes = 0

    def megatron_layer(self) -> Any:
        """Megatron's output layer on the weight."""
        from megatron.core.tensor_parallel import ColumnParallelLinear
        from megatron.core.transformer import TransformerConfig

        shape, tp = self.shape, self.shape.tensor_parallel
        config = TransformerConfig(
            num_layers=1,
            hidden_size=shape.hidden,
            num_attention_heads=tp,
            tensor_model_parallel_size=tp,
            params_dtype=self.weight.dtype,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            cuda_graph_scope=[],
        )
        layer = ColumnParallelLinear(
            shape.hidden,
            shape.vocab,
            config=config,
            init_method=torch.nn.init.zeros_,
            bias=False,
            skip_weight_param_allocation=True,
        )
        layer.weight = self.weight
        return layer

    def keep_main_grad(self) -> None:
        """What Megatron's DDP does: an fp32 gradient beside the parameter, and a hook that adds to it."""
        weight: Any = self.weight
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False

        def hook(parameter: Any) -> None:
            if not parameter.grad_added_to_main_grad:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad, parameter.grad_added_to_main_grad = None, False

        weight.register_post_accumulate_grad_hook(hook)

    def pair_loss(self, sums_PM: Tensor) -> Tensor:
        """SimPO, a mean over the pairs."""
        means_PM = BETA * sums_PM / self.shape.response
        return -torch.nn.functional.logsigmoid(means_PM[:, 0] - means_PM[:, 1] - GAMMA).sum() / self.shape.pairs

    def loss_of_logps(self, logps_R: Tensor) -> Tensor:
        """The loss from the log-probs of the response tokens."""
        return self.pair_loss(logps_R.view(self.shape.pairs, 2, self.shape.response).sum(2))


def eager(problem: Problem) -> Tensor:
    """Logits of every token, upcast, log_softmax: the Hugging Face way."""
    logits = (problem.hidden_TH @ problem.weight.T).float()
    logps = logits.log_softmax(-1).gather(1, problem.targets[:, None])[:, 0]
    return problem.loss_of_logps(logps[problem.rows])


def _megatron_cross_entropy(problem: Problem, cross_entropy: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    logits, _ = problem.megatron_layer()(problem.hidden_TH[:, None])
    return problem.loss_of_logps(-cross_entropy(logits, problem.targets[:, None])[:, 0][problem.rows])


def megatron(problem: Problem) -> Tensor:
    """Megatron's vocab-parallel cross entropy, over every token."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return _megatron_cross_entropy(problem, vocab_parallel_cross_entropy)


def megatron_fused(problem: Problem) -> Tensor:
    """Megatron's fused cross entropy (`--cross-entropy-loss-fusion`); its gradient of the logits is always bf16."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    return _megatron_cross_entropy(problem, lambda *args: fused_vocab_parallel_cross_entropy(*args, group))


def liger(problem: Problem) -> Tensor:
    """Liger's fused linear SimPO, a pair at a time; compiled on CUDA alone."""
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    shape, ignored = problem.shape, torch.full_like(problem.targets, -100)
    ignored[problem.rows] = problem.targets[problem.rows]

    def by_response(values: Tensor) -> Tensor:  # chosen sequences first, then rejected ones
        return values.view(shape.pairs, 2, -1, *values.shape[1:]).transpose(0, 1).flatten(0, 1)

    loss = LigerFusedLinearSimPOLoss(beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=problem.hidden_TH.is_cuda)
    return loss(problem.weight, by_response(problem.hidden_TH), by_response(ignored))[0]


def plain(problem: Problem) -> Tensor:
    """`--head plain`: logits of every token, log-probs of the response tokens by `logprobs.py`."""
    from megatron.core import parallel_state

    from simpo_megatron.head.logprobs import vocab_parallel_logprobs

    logits = problem.megatron_layer()(problem.hidden_TH[:, None])[0][:, 0].index_select(0, problem.rows)
    group: Any = parallel_state.get_tensor_model_parallel_group()
    return problem.loss_of_logps(
        vocab_parallel_logprobs(logits, problem.targets[problem.rows], problem.shape.vocab, group)
    )


def ours(problem: Problem) -> Tensor:
    """`--head fused`."""
    from simpo_megatron.head.layer import LogProbHead, split_output
    from simpo_megatron.head.task import HeadTask, ScoredPositions

    shape = problem.shape
    head = LogProbHead.install(SimpleNamespace(output_layer=problem.megatron_layer()), problem.slab_bytes)
    task = HeadTask(
        scored=ScoredPositions(
            positions_R=problem.rows,
            targets_R=problem.targets[problem.rows],
            segments_R=problem.segments,
            per_pair=(2 * shape.response,) * shape.pairs,
            per_pair_max=(2 * shape.response,) * shape.pairs,
        ),
        responses=2,
        vocab_size=shape.vocab,
        loss=problem.pair_loss,
        loss_gradient=1.0,
    )
    with head.scoring(task):
        return split_output(head(problem.hidden_TH[:, None])[0], 2)[0]


IMPLEMENTATIONS: dict[str, Callable[[Problem], Tensor]] = {
    "eager": eager,
    "megatron": megatron,
    "megatron_fused": megatron_fused,
    "liger": liger,
    "plain": plain,
    "ours": ours,
}


def reason_to_skip(name: str, shape: Shape) -> str | None:
    """Why an implementation cannot run here, if it cannot."""
    if name in ("eager", "liger") and shape.tensor_parallel > 1:
        return "one rank only"
    if name == "liger":
        try:
            import liger_kernel.chunked_loss  # noqa: F401
        except ImportError as error:
            return f"liger-kernel cannot be imported ({error})"
    return None


def oracle(problem: Problem) -> tuple[Tensor, Tensor]:
    """Both gradients in fp64, of the whole vocabulary: hidden [T, H] and weight [V, H], a few rows at a time."""
    shape, device = problem.shape, problem.hidden_TH.device
    whole = Problem(Shape(**{**vars(shape), "tensor_parallel": 1}), torch.bfloat16, str(device), 0)
    hidden, weight = whole.hidden_TH.detach()[whole.rows].double(), whole.weight.detach().double()
    targets, blocks = whole.targets[whole.rows], range(0, shape.rows, 256)
    lse = torch.cat([torch.logsumexp(hidden[i : i + 256] @ weight.T, 1) for i in blocks])
    logps = ((hidden * weight[targets]).sum(1) - lse).requires_grad_()
    (coefficients,) = torch.autograd.grad(whole.loss_of_logps(logps), logps)
    grad_hidden, grad_weight = torch.zeros(problem.tokens, shape.hidden, dtype=torch.float64), torch.zeros_like(weight)
    for i in blocks:
        block = slice(i, i + 256)
        gradient = (hidden[block] @ weight.T - lse[block, None]).exp_().mul_(-coefficients[block, None])
        gradient.scatter_add_(1, targets[block, None], coefficients[block, None])
        grad_hidden[whole.rows[block].cpu()] = (gradient @ weight).cpu()
        grad_weight += gradient.T @ hidden[block]
    return grad_hidden, grad_weight
