"""A judge's second look at preference pairs: pairs that it does not confirm are left out or turned round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal

from simpo_megatron.data.pairing import PairingReport
from simpo_megatron.on_policy.scorers.judge import Judge

Policy = Literal["drop", "flip"]
_BLOCK = 64  # pairs judged at a time


def verified(
    pairs: Iterable[dict[str, Any]], judge: Judge, policy: Policy, report: PairingReport
) -> Iterator[dict[str, Any]]:
    """The pairs whose chosen response the judge prefers, over both orders of the two.

    Args:
        pairs: rows of `data.pairing.build_pairs`.
        judge: that is asked.
        policy: "drop" leaves out a pair whose rejected response the judge prefers; "flip" exchanges its responses and
            drops its scores, which say the opposite. A pair that the judge cannot decide is left out.
        report: counts are added to it.

    Raises:
        UserError: the judge fails.
    """
    rows = iter(pairs)
    while block := list(islice(rows, _BLOCK)):
        questions = [
            (row["chosen"][:-1], row["chosen"][-1]["content"], row["rejected"][-1]["content"]) for row in block
        ]
        for row, wins in zip(block, judge.compare(questions), strict=True):
            if wins > 0.5:
                yield row
            elif wins < 0.5 and policy == "flip":
                report.flipped += 1
                yield {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
            else:
                report.undecided += wins == 0.5
                report.reversed += wins < 0.5
                report.pairs -= 1
