"""The implementations that `bench_head.py` compares. Each computes the same loss from hidden states, in its own way.

An implementation is a function of a `Problem` that returns the loss. Its backward pass leaves the gradient of
`hidden_TH` in `.grad`, and that of the weight in `weight.main_grad`, the fp32 buffer that Megatron's DDP keeps for
every parameter.

Shapes: T tokens of all pairs, R response tokens, H hidden, V vocabulary, P pairs, M = 2 responses of a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from head_oracle import lay_out, oracle
from torch import Tensor

from simpo_megatron.objectives import Objective, PairScores
from simpo_megatron.objectives.simpo import simpo_slopes

BETA, GAMMA = 2.0, 1.0


@dataclass(frozen=True)
class Shape:
    """The size of a problem, and how it is written: PAIRSxRESPONSE[+PROMPT]:HIDDENxVOCABULARY[@TENSOR_PARALLEL].

    Attributes:
        pairs: pairs.
        response: tokens of each response.
        prompt: tokens of each prompt.
        hidden: hidden size.
        vocab: vocabulary.
        tensor_parallel: shards of the vocabulary.
    """

    pairs: int
    response: int
    prompt: int
    hidden: int
    vocab: int
    tensor_parallel: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`2x512+2048:4096x128256@4` is 2 pairs of 2 x 512 response tokens, prompts of 2048, 4 shards."""
        tokens, _, sizes = text.partition(":")
        sizes, _, shards = sizes.partition("@")
        tokens, _, prompt = tokens.partition("+")
        numbers = [*tokens.split("x"), prompt or "0", *sizes.split("x"), shards or "1"]
        return cls(*map(int, numbers))


class Problem:
    """Inputs of one rank. Weight and hidden states are bf16 numbers in any dtype, so one fp64 oracle serves all."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, rank: int) -> None:
        """Makes the inputs: random, the same in every process.

        Args:
            shape: their size.
            dtype: of weight and hidden states.
            device: where they are.
            rank: which shard of the vocabulary.
        """
        self.shape, self.rank = shape, rank
        generator = torch.Generator().manual_seed(1)
        self.row = lay_out([(shape.prompt, shape.response, shape.response)] * shape.pairs, 2)
        self.tokens = self.row.starts[-1]
        hidden = torch.randn(self.tokens, shape.hidden, generator=generator).bfloat16()
        weight = torch.randn(shape.vocab, shape.hidden, generator=generator).mul_(2 / shape.hidden**0.5).bfloat16()
        targets = torch.randint(shape.vocab, (self.tokens,), generator=generator)
        self.positions_R, self.segments_R = self.row.positions_R.to(device), self.row.segments_R.to(device)
        self.hidden_TH = hidden.to(device, dtype).requires_grad_()
        shard = weight.chunk(shape.tensor_parallel)[rank]
        self.weight = torch.nn.Parameter(shard.to(device, dtype, copy=True))
        self.targets = targets.to(device)
        self.slab_bytes = 0

    def megatron_layer(self) -> Any:
        """Megatron's output layer with this weight."""
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
        """Does what Megatron's DDP does: an fp32 gradient beside the parameter, and a hook that adds to it."""
        weight: Any = self.weight
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False

        def hook(parameter: Any) -> None:
            if not parameter.grad_added_to_main_grad:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad, parameter.grad_added_to_main_grad = None, False

        weight.register_post_accumulate_grad_hook(hook)

    def pair_loss(self, sums_PM: Tensor) -> Tensor:
        """The SimPO loss, a mean over the pairs."""
        means_PM = BETA * sums_PM / self.shape.response
        return -torch.nn.functional.logsigmoid(means_PM[:, 0] - means_PM[:, 1] - GAMMA).sum() / self.shape.pairs

    def pair_slopes(self, sums_PM: Tensor) -> Tensor:
        """Its derivative with respect to each sum, as training gives it to our head."""
        means_PM = sums_PM / self.shape.response
        slopes_P = simpo_slopes(means_PM[:, 0], means_PM[:, 1], beta=BETA, gamma_P=GAMMA)
        return torch.stack((slopes_P, -slopes_P), 1) / (self.shape.response * self.shape.pairs)

    def loss_of_logps(self, logps_R: Tensor) -> Tensor:
        """The loss from the log-probs of the response tokens."""
        return self.pair_loss(logps_R.view(self.shape.pairs, 2, self.shape.response).sum(2))


class ObjectiveProblem(Problem):
    """A problem with the loss of an objective in place of the SimPO loss that the peers have too.

    Attributes:
        objective: with two responses. Its reference log-probs are random numbers.
    """

    objective: Objective

    def _batch(self, like: Tensor) -> Any:
        """A microbatch, as far as the loss of a step reads it."""
        from simpo_megatron.batch.row import BatchCounts

        pairs, response = self.shape.pairs, self.shape.response
        lengths = torch.full((pairs, 2), response, device=like.device)
        known = -response * 3 * torch.rand(pairs, 2, generator=torch.Generator().manual_seed(2)).to(like)
        weight = torch.ones(pairs, device=like.device)
        return SimpleNamespace(
            scores=lambda sums_PM: PairScores(sums_PM, lengths, weight * torch.nan, weight, known),
            weight=weight,
            counts=BatchCounts(pairs, pairs * response, 1),
        )

    def pair_loss(self, sums_PM: Tensor) -> Tensor:
        """The loss of a step."""
        from simpo_megatron.step import batch_loss

        return batch_loss(self.objective, self._batch(sums_PM), sums_PM)

    def pair_slopes(self, sums_PM: Tensor) -> Tensor:
        """Its derivative with respect to each sum, as training gives it to our head."""
        from simpo_megatron.step import batch_slopes

        slopes_PM = batch_slopes(self.objective, self._batch(sums_PM), sums_PM)
        assert slopes_PM is not None
        return slopes_PM


def eager(problem: Problem) -> Tensor:
    """Logits of every token, cast to fp32, then log_softmax: what Hugging Face does."""
    logits = (problem.hidden_TH @ problem.weight.T).float()
    logps = logits.log_softmax(-1).gather(1, problem.targets[:, None])[:, 0]
    return problem.loss_of_logps(logps[problem.positions_R])


def _megatron_cross_entropy(problem: Problem, cross_entropy: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    logits, _ = problem.megatron_layer()(problem.hidden_TH[:, None])
    return problem.loss_of_logps(-cross_entropy(logits, problem.targets[:, None])[:, 0][problem.positions_R])


def megatron(problem: Problem) -> Tensor:
    """Megatron's vocab-parallel cross entropy of every token."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return _megatron_cross_entropy(problem, vocab_parallel_cross_entropy)


def megatron_fused(problem: Problem) -> Tensor:
    """Megatron's fused cross entropy (`--cross-entropy-loss-fusion`). Its gradient of the logits is always bf16."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    return _megatron_cross_entropy(problem, lambda *args: fused_vocab_parallel_cross_entropy(*args, group))


def liger(problem: Problem) -> Tensor:
    """Liger's fused linear SimPO, a pair at a time; compiled only on CUDA."""
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    shape, ignored = problem.shape, torch.full_like(problem.targets, -100)
    ignored[problem.positions_R] = problem.targets[problem.positions_R]

    def by_response(values: Tensor) -> Tensor:  # chosen sequences first, then rejected ones
        return values.view(shape.pairs, 2, -1, *values.shape[1:]).transpose(0, 1).flatten(0, 1)

    loss = LigerFusedLinearSimPOLoss(beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=problem.hidden_TH.is_cuda)
    return loss(problem.weight, by_response(problem.hidden_TH), by_response(ignored))[0]


def plain(problem: Problem) -> Tensor:
    """Our `--head plain`: logits of every token, then log-probs of the response tokens."""
    from megatron.core import parallel_state

    from simpo_megatron.head.logprobs import vocab_parallel_logprobs

    logits = problem.megatron_layer()(problem.hidden_TH[:, None])[0][:, 0].index_select(0, problem.positions_R)
    group: Any = parallel_state.get_tensor_model_parallel_group()
    return problem.loss_of_logps(
        vocab_parallel_logprobs(logits, problem.targets[problem.positions_R], problem.shape.vocab, group)
    )


def ours(problem: Problem) -> Tensor:
    """Our `--head fused`."""
    from simpo_megatron.head.layer import LogProbHead, split_output
    from simpo_megatron.head.task import HeadTask, ScoredPositions

    shape = problem.shape
    head = LogProbHead.install(SimpleNamespace(output_layer=problem.megatron_layer()), problem.slab_bytes)
    task = HeadTask(
        scored=ScoredPositions(
            positions_R=problem.positions_R,
            targets_R=problem.targets[problem.positions_R],
            segments_R=problem.segments_R,
            per_pair=(2 * shape.response,) * shape.pairs,
            per_pair_max=(2 * shape.response,) * shape.pairs,
        ),
        responses=2,
        vocab_size=shape.vocab,
        loss=problem.pair_loss,
        loss_gradient=1.0,
        slopes=problem.pair_slopes,
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
    """Why an implementation cannot run on a shape; None if it can."""
    if name in ("eager", "liger") and shape.tensor_parallel > 1:
        return "one rank only"
    if name == "liger":
        try:
            import liger_kernel.chunked_loss  # noqa: F401
        except ImportError as error:
            return f"liger-kernel cannot be imported ({error})"
    return None


def expected_gradients(problem: Problem) -> tuple[Tensor, Tensor]:
    """Both gradients in fp64 for the whole vocabulary: of the hidden states [T, H] and of the weight [V, H]."""
    device = problem.hidden_TH.device
    whole = Problem(replace(problem.shape, tensor_parallel=1), torch.bfloat16, str(device), 0)
    positions_R = whole.positions_R
    found = oracle(whole.hidden_TH[positions_R], whole.weight, whole.targets[positions_R], whole.row, whole.pair_loss)
    grad_TH = torch.zeros(whole.tokens, whole.shape.hidden, dtype=torch.float64)
    grad_TH[positions_R.cpu()] = found.hidden_RH.cpu()
    return grad_TH, found.weight_VH
