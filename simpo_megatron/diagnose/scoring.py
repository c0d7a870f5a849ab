"""Log-probs of the responses under two models, and the exact KL of their distributions at each response position.

    policy, reference = load_model("--hf-checkpoint", folder), load_model("--reference-checkpoint", other)
    scored = score(policy, reference, pairs)

Sequences of similar length share a batch. The logits are computed from the last hidden states, a block of positions at
a time, and for response positions alone, so the logits of a batch never exist.

Shapes: P pairs, B sequences of a batch, T tokens of the longest, R response positions of a batch, N those of a block,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simpo_megatron.data import Pairs
from simpo_megatron.errors import UserError
from simpo_megatron.program import with_time_left

BATCH_TOKENS, BLOCK_BYTES = 8192, 64 * 2**20
_COPIES = 6  # arrays [N, V] that a block holds at a time: logits, log-probs and products of both models


@dataclass(frozen=True)
class Scored:
    """What two models say of the responses of P pairs. Arrays are float64 [P, 2], chosen first.

    Attributes:
        policy_sums: log-probs under the policy, summed over the tokens of the response.
        reference_sums: the same under the reference model.
        kl_sums: KL[policy || reference] of the next token, in nats, summed over the positions that predict the tokens
            of the response.
        lengths: tokens of the responses, int64.
    """

    policy_sums: np.ndarray
    reference_sums: np.ndarray
    kl_sums: np.ndarray
    lengths: np.ndarray


@torch.no_grad()
def score(
    policy: Any, reference: Any, pairs: Pairs, batch_tokens: int = BATCH_TOKENS, block_bytes: int = BLOCK_BYTES
) -> Scored:
    """Scores the responses of all pairs under both models.

    Args:
        policy: from `models.transformers_model.load_model`.
        reference: the same, with the same vocabulary.
        pairs: their token ids.
        batch_tokens: tokens of a batch, with padding; a longer sequence has a batch of its own.
        block_bytes: memory for the logits of both models.

    Raises:
        UserError: the vocabularies differ or are too small, or a log-prob is not finite.
    """
    heads = [_Head(model) for model in (policy, reference)]
    _check_vocabulary(heads, pairs)
    lengths = np.stack([pairs.chosen_length[:], pairs.rejected_length[:]], axis=1).astype(np.int64)
    whole = lengths + pairs.prompt_length[:, None].astype(np.int64)
    results = np.zeros((3, len(pairs), 2))
    for batch in with_time_left(_batches(whole.ravel(), batch_tokens), "Scoring"):
        results.reshape(3, -1)[:, batch] = _score_batch(heads, pairs, batch, block_bytes).cpu().numpy()
    if not np.isfinite(results).all():
        pair = int(np.flatnonzero(~np.isfinite(results).all(axis=(0, 2)))[0])
        raise UserError(f"a log-prob of pair {pair} is not finite; one of the models is broken")
    return Scored(results[0], results[1], results[2], lengths)


class _Head:
    """A model as last hidden states and an output layer."""

    def __init__(self, model: Any) -> None:
        self.model, self.output = model, model.get_output_embeddings()
        self.vocabulary = self.output.weight.shape[0]
        ids = torch.arange(2, device=model.device)[None]
        apart = self.output(self.hidden(ids, torch.ones_like(ids)))
        if not torch.allclose(apart, model(ids).logits, rtol=1e-2, atol=1e-3):
            raise UserError(
                f"{type(model).__name__} computes its logits by more than an output layer, which is not supported; "
                "use a model of another architecture"
            )

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The last hidden states."""
        return self.model.base_model(ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state


def _check_vocabulary(heads: list[_Head], pairs: Pairs) -> None:
    policy, reference = (head.vocabulary for head in heads)
    if policy != reference:
        raise UserError(
            f"the two models have {policy} and {reference} logits: KL needs the same vocabulary; give two checkpoints "
            "of the same model"
        )
    if pairs.largest_token >= policy:
        raise UserError(f"the data has token id {pairs.largest_token}, but the models have {policy} logits")


def _batches(tokens: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Indices of sequences, longest first, so that each batch has at most `batch_tokens` tokens with its padding."""
    batches: list[list[int]] = []
    for index in np.argsort(-tokens, kind="stable").tolist():
        if not batches or (len(batches[-1]) + 1) * tokens[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return [np.array(batch) for batch in batches]


def _score_batch(heads: list[_Head], pairs: Pairs, batch: np.ndarray, block_bytes: int) -> Tensor:
    """Sums under both models and KL sums of some responses, [3, B]; response 2 i + 1 is the rejected one of pair i."""
    sequences = []
    for index in batch.tolist():
        prompt, *both = pairs.pair(index // 2)
        sequences.append((len(prompt), [*prompt.tolist(), *both[index % 2].tolist()]))
    device = heads[0].model.device
    longest = max(len(ids) for _, ids in sequences)
    ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in sequences], device=device)
    sizes = torch.tensor([len(ids) for _, ids in sequences], device=device)[:, None]
    starts = torch.tensor([start for start, _ in sequences], device=device)[:, None]
    places_T = torch.arange(longest, device=device)
    mask_BT = (places_T < sizes).long()
    # position t predicts token t + 1
    scored_BT = (places_T >= starts - 1) & (places_T < sizes - 1)
    of_R = scored_BT.nonzero()[:, 0]
    targets_R = ids_BT.roll(-1, 1)[scored_BT]
    hidden = [head.hidden(ids_BT, mask_BT)[scored_BT] for head in heads]
    sums = torch.zeros(3, len(sequences), dtype=torch.float64, device=device)
    size = max(1, block_bytes // (_COPIES * 4 * heads[0].vocabulary))
    for start in range(0, len(targets_R), size):
        block = slice(start, start + size)
        policy_NV, reference_NV = (
            _log_softmax(head.output(states[block])) for head, states in zip(heads, hidden, strict=True)
        )
        targets_N1 = targets_R[block, None]
        kl_N = (policy_NV.exp() * (policy_NV - reference_NV)).sum(-1)
        found = torch.stack((policy_NV.gather(1, targets_N1)[:, 0], reference_NV.gather(1, targets_N1)[:, 0], kl_N))
        sums.index_add_(1, of_R[block], found.double())
    return sums


def _log_softmax(logits_NV: Tensor) -> Tensor:
    """In fp32, or in fp64 for a model in fp64."""
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(-1)
