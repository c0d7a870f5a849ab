"""Routing that is limited to groups of experts, where Megatron ranks the groups by another rule.

A token uses experts of its best groups only (DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3, arXiv 2412.19437). Megatron
takes for the score of a group the sum of its best `topk // group_topk` experts (`moe_utils.py`, `group_limited_topk`).
DeepSeek-V2 takes the best one, DeepSeek-V3 the best two.

Shapes: T tokens, E experts, K of them for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from simpo_megatron.errors import UserError


class GroupRule:
    """Stands where Megatron's router keeps a record of its choices, and chooses instead.

    Args:
        best: how many of its best experts say how good a group is.
    """

    def __init__(self, best: int) -> None:
        self.best = best

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int, group_topk: int, default: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """The scores and the indices, both [T, K], of the chosen experts, from the scores [T, E] of all."""
        del default
        by_group = scores.unflatten(1, (num_groups, -1))
        groups = by_group.topk(self.best, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
        allowed = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(1, groups, True)
        return by_group.masked_fill(~allowed[..., None], -torch.inf).flatten(1).topk(topk, dim=-1)


def rank_groups(model: torch.nn.Module, best: int) -> None:
    """Lets the routers of a built model rank groups of experts by the sum of their best ones.

    Args:
        model: of this rank.
        best: how many.

    Raises:
        UserError: this release of Megatron-Core cannot, or its fused router is asked for.
    """
    for module in model.modules():
        if not isinstance(module, TopKRouter):
            continue
        router: Any = module
        if not hasattr(router, "router_replay") or router.config.moe_router_fusion:
            raise UserError(
                "this model ranks groups of experts by another rule than Megatron's router: it needs Megatron-Core "
                "0.16 or newer, without moe_router_fusion"
            )
        router.router_replay = GroupRule(best)
