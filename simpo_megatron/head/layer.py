"""`LogProbHead`: from hidden states to the loss of a microbatch, without the [tokens, vocabulary] logits.

    head = LogProbHead.install(gpt_model, slab_bytes=256 * 2**20)   # once, before DDP wraps the model
    with head.scoring(HeadTask(...)):
        output = gpt_model(tokens, position_ids, None, ...)         # no logits: `split_output` reads the output
    loss, sums_PM = split_output(output, responses)

While it has a task, the output layer scores the response tokens only. It computes the logits of some whole pairs at a
time: a slab. The loss of a pair depends only on that pair's summed log-probs. So after a slab is scored, the gradient
of the loss with respect to each of its log-probs is known, and both gradients are computed before the logits are
overwritten. That takes three GEMMs, 6NHV FLOPs. No logits are kept and none are computed twice. The backward pass only
multiplies by a number. Without a task the layer is Megatron's.

A pair that is larger than a slab goes through it in parts, first for the sums, then for the gradients. The logits of
all parts but the last are computed a second time, which takes up to 8NHV FLOPs for such pairs. If that costs too much
time, raise --head-slab-bytes. The second projection could be avoided only with two more fp32 copies of the weight
gradient, one for each response: with an NLL term the loss changes with the two sums at two unrelated rates, which are
known only at the end of the pair. Those copies take more memory than the slabs save.

Shapes: T tokens of the row, R scored positions of this context-parallel rank, N those of a slab, H hidden, V columns of
this tensor-parallel rank, P pairs, M scored responses of a pair (1 or 2).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from simpo_megatron.head.kernels import soft_cap
from simpo_megatron.head.projection import Gradients
from simpo_megatron.head.slabs import Groups, score_slabs
from simpo_megatron.head.task import HeadTask


class LogProbHead(ColumnParallelLinear):
    """Megatron's output layer, which scores pairs while it has a task. Parameter, names and checkpoint stay the same.

    Collectives of a pass with a task:

    * over the tensor-parallel ranks, forward: one all-gather of the hidden states under sequence parallelism; and for
      each slab one all-gather of two numbers a position
    * over the tensor-parallel ranks, backward: one reduce-scatter of the hidden states' gradient under sequence
      parallelism, else one all-reduce
    * over the context-parallel ranks, forward: for each slab one all-reduce of one number a response

    There are none over a group of one rank.

    Attributes:
        slab_bytes: bytes of the logits that are held at a time.
        softcap: the bound of the model's logits (`kernels.soft_cap`); None for none.
    """

    slab_bytes: int
    softcap: float | None = None
    _task: HeadTask | None = None

    @classmethod
    def install(cls, model: Any, slab_bytes: int) -> LogProbHead:
        """Replaces a GPTModel's output layer by a head with the same parameter. Call it before DDP wraps the model.

        The attribute `softcap` of the old layer, if there is one, is kept.

        Args:
            model: a GPTModel of the last pipeline stage.
            slab_bytes: bytes of the logits that are held at a time; those of one position are held in any case.

        Raises:
            ValueError: the model has multi-token prediction, which uses the same output layer for several tokens.
        """
        old = model.output_layer
        if getattr(old.config, "mtp_num_layers", None):
            raise ValueError("LogProbHead does not support multi-token prediction; leave mtp_num_layers unset")
        head = cls(
            old.input_size,
            old.output_size,
            config=old.config,
            init_method=old.config.init_method,
            bias=False,
            gather_output=old.gather_output,
            skip_weight_param_allocation=True,
            embedding_activation_buffer=old.embedding_activation_buffer,
            grad_output_buffer=old.grad_output_buffer,
            tp_group=old.tp_group,
        )
        if old.weight is not None:  # None: the embedding of the same stage is used as the weight
            head.weight = old.weight
        head.slab_bytes, head.softcap = slab_bytes, getattr(old, "softcap", None)
        model.output_layer = head
        return head

    @contextlib.contextmanager
    def scoring(self, task: HeadTask) -> Iterator[None]:
        """Within this context the layer returns the loss and the sums of `task` instead of logits."""
        self._task = task
        try:
            yield
        finally:
            self._task = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Without a task, Megatron's forward and the cap; with one, the loss and the sums of the task.

        Args:
            input_: hidden states [T, 1, H]; under sequence parallelism this rank's part of the tokens.
            weight: [V, H], if it is tied to the embedding.
            runtime_gather_output: Megatron's argument; not used with a task.

        Returns:
            With a task [1, 1, 1 + P * M] in fp32 (the loss, then the sums without gradient) and no bias.
        """
        task = self._task
        if task is None:
            logits, bias = super().forward(input_, weight, runtime_gather_output)
            return soft_cap(logits, self.softcap), bias
        weight = self.weight if weight is None else weight
        loss, sums_PM = _FusedHead.apply(input_, weight, self, task, torch.is_grad_enabled())
        return torch.cat((loss[None], sums_PM.flatten()))[None, None], None


def find_head(model: torch.nn.Module) -> LogProbHead | None:
    """The head among the modules of a model, or None. Only the last pipeline stage has one."""
    return next((module for module in model.modules() if isinstance(module, LogProbHead)), None)


def split_output(output: Tensor, responses: int) -> tuple[Tensor, Tensor]:
    """Splits what a model returns while its head has a task.

    Returns:
        The loss, a scalar with its gradient; and the sums [P, M], without gradient.
    """
    flat = output.flatten()
    return flat[0], flat[1:].detach().view(-1, responses)


class _FusedHead(torch.autograd.Function):
    """The autograd function of the head: the forward pass computes both gradients, the backward pass returns them.

    The backward pass is given the gradient of the loss, which multiplies both gradients. If that number is known before
    (`HeadTask.loss_gradient`), the forward pass multiplies by it, and the `ratio` of the backward pass is 1.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_T1H: Tensor, weight_VH: Tensor, head: LogProbHead, task: HeadTask, training: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss and the sums, with the gradients in `ctx`."""
        hidden_TH = hidden_T1H.flatten(0, 1)
        group: Any = head.tp_group
        if head.sequence_parallel:
            local_TH = hidden_TH.contiguous()
            hidden_TH = local_TH.new_empty(local_TH.shape[0] * group.size(), local_TH.shape[1])
            dist.all_gather_into_tensor(hidden_TH, local_TH, group=group)
        hidden_RH = hidden_TH.index_select(0, task.scored.positions_R)

        ctx.into_main_grad = False
        gradients = None
        if training:
            needs_hidden, needs_weight = ctx.needs_input_grad[:2]
            ctx.into_main_grad = needs_weight and task.loss_gradient is not None and _accumulates(weight_VH)
            gradients = Gradients.of(
                hidden_RH if needs_hidden else None,
                weight_VH if needs_weight else None,
                main_grad=weight_VH.main_grad if ctx.into_main_grad else None,  # type: ignore[attr-defined]
                factor=1.0 if task.loss_gradient is None else task.loss_gradient,
            )
        context: Any = parallel_state.get_context_parallel_group(check_initialized=False)
        groups = Groups(group, context)
        loss, sums_PM = score_slabs(
            hidden_RH, weight_VH.detach(), task, gradients, head.slab_bytes, groups, head.softcap
        )
        ctx.gradients, ctx.head, ctx.task = gradients, head, task
        ctx.weight, ctx.hidden_shape, ctx.tokens = weight_VH, hidden_T1H.shape, hidden_TH.shape[0]
        ctx.dtype = hidden_T1H.dtype
        ctx.mark_non_differentiable(sums_PM)
        return loss, sums_PM

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """The gradients of the hidden states and of the weight, from that of the loss."""
        gradients, weight, task = ctx.gradients, ctx.weight, ctx.task
        ratio = grads[0] / gradients.factor
        grad_hidden = grad_weight = None
        if ctx.into_main_grad:
            # main_grad has the gradient already, so the factor can no longer change. The check runs on the device, so
            # that the host does not wait for it.
            expected = "the loss of the head was multiplied by another number than HeadTask.loss_gradient"
            torch.ops.aten._assert_async.msg((ratio - 1).abs() < 1e-4, expected)
            zeros = getattr(weight, "zero_out_wgrad", False)
            grad_weight = _placeholder(weight.shape, weight.dtype, weight.device, zeros).detach()
            if zeros:  # a tied embedding adds its own gradient, perhaps in place
                grad_weight.zero_()
            weight.grad_added_to_main_grad = True
        elif gradients.weight_VH is not None:
            grad_weight = (gradients.weight_VH * ratio).to(weight.dtype)
        if gradients.hidden_RH is not None:
            grad_RH = (gradients.hidden_RH * ratio).to(ctx.dtype)
            # The last token of a shared prompt is there twice. A sum of two numbers does not depend on their order, so
            # the atomics of a GPU do not make it differ from run to run.
            grad_TH = grad_RH.new_zeros(ctx.tokens, grad_RH.shape[1]).index_add_(0, task.scored.positions_R, grad_RH)
            grad_hidden = _reduce(grad_TH, ctx.head).view(ctx.hidden_shape)
        return grad_hidden, grad_weight, None, None, None


def _accumulates(weight: Tensor) -> bool:
    """Whether DDP keeps this parameter's gradient in fp32 and allows a layer to add to it directly."""
    main_grad = getattr(weight, "main_grad", None)
    return main_grad is not None and main_grad.dtype == torch.float32 and hasattr(weight, "grad_added_to_main_grad")


@functools.cache
def _placeholder(shape: torch.Size, dtype: torch.dtype, device: torch.device, zeros: bool) -> Tensor:
    """The gradient that is returned for a weight whose `main_grad` has the gradient already.

    DDP's hook needs some gradient, and drops it. The same tensor serves every backward pass, as in Megatron's layers
    (`get_dummy_wgrad` of Transformer Engine): a new one is as large as the weight. Its values matter only if
    `zero_out_wgrad` is set, so those weights have a tensor of their own.
    """
    return torch.empty(shape, dtype=dtype, device=device)


def _reduce(grad_TH: Tensor, head: LogProbHead) -> Tensor:
    """Adds up the gradients of the hidden states that the vocabulary shards give."""
    group: Any = head.tp_group
    if head.sequence_parallel:
        part_TH = grad_TH.new_empty(grad_TH.shape[0] // group.size(), grad_TH.shape[1])
        dist.reduce_scatter_tensor(part_TH, grad_TH, group=group)
        return part_TH
    if head.allreduce_dgrad:
        dist.all_reduce(grad_TH, group=group)
    return grad_TH
