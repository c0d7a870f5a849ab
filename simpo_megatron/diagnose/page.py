"""A diagnosis as one HTML page, and as lines for the terminal."""

from __future__ import annotations

from html import escape
from typing import Any

from simpo_megatron.diagnose.figures import RESPONSES, rewards_of
from simpo_megatron.diagnose.plots import bars, scatter
from simpo_megatron.diagnose.scoring import Scored
from simpo_megatron.objectives import Objective

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:76em;padding:0 1em;color:#1b1b1b}
table{border-collapse:collapse}td,th{padding:.25em .8em;text-align:left;border-bottom:1px solid #ddd}
figure{display:inline-block;margin:.5em 1em .5em 0}figcaption{font-weight:600}
svg text{font-size:10px}svg path{fill:none;stroke:#888}circle{fill:#2b5f9e;fill-opacity:.35}
.chosen{fill:#2b7a3f}.rejected{fill:#b5442e}.margin{fill:#2b5f9e}
"""


def table(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of every number that is neither the 2x2 nor the bins, for terminal and page."""
    rows = []
    for name, value in found.items():
        if name in ("rankings", "margin_by_length_difference"):
            continue
        for path, number in _leaves(name, value):
            text = f"{number:.4g}" if isinstance(number, float) else str(number)
            rows.append((path, "-" if number is None else text))
    return rows


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    """The numbers of nested dictionaries, with their path as `a/b`."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [leaf for key, inner in value.items() for leaf in _leaves(f"{name}/{key}", inner)]


def rankings_table(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The 2x2 of the rankings by reward and by likelihood, as shares of the pairs."""
    shares = {name: f"{count / found['pairs']:.1%}" for name, count in found["rankings"].items()}
    return [
        ("", "average log-prob: chosen higher", "not higher"),
        ("reward: chosen higher", shares["both"], shares["reward_alone"]),
        ("not higher", shares["likelihood_alone"], shares["neither"]),
    ]


def page(found: dict[str, Any], scored: Scored, objective: Objective, names: dict[str, str]) -> str:
    """The page.

    Args:
        found: from `figures`.
        scored: what they were computed from.
        objective: whose reward is shown.
        names: what was compared: the names of data and models, by what they are.
    """
    lengths, rewards = scored.lengths.ravel(), rewards_of(scored, objective)
    plots = [
        bars(
            "Reward margin by the difference of the lengths",
            "tokens of chosen minus rejected response",
            "mean margin",
            [
                (f"{one['shortest']} to {one['longest']}", one["margin"], "margin")
                for one in found["margin_by_length_difference"]
            ],
        )
    ]
    for name, sums in (("policy", scored.policy_sums), ("reference", scored.reference_sums)):
        plots.append(
            scatter(
                f"Likelihood of the {name} by length{_rho(found, name)}",
                ("tokens of the response", lengths),
                ("average log-prob", sums.ravel() / lengths),
            )
        )
    plots.append(
        scatter(
            f"Reward by length{_rho(found, 'reward')}",
            ("tokens of the response", lengths),
            ("reward", rewards.ravel()),
        )
    )
    for name, title, unit in (
        ("kl_exact", "KL[policy || reference], exact", "nats a token"),
        ("kl_on_given_text", "log policy - log reference on the given text (not a KL)", "nats a response"),
    ):
        plots.append(bars(title, "responses", unit, [(side, found[name][side], side) for side in RESPONSES]))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Diagnosis</title><style>{_STYLE}</style>"
        f"<h1>Diagnosis</h1>{_table(list(names.items()))}"
        f"<h2>Do reward and likelihood rank alike?</h2><p>Reward: {escape(objective.describe())}. Shares of "
        f"{found['pairs']} pairs.{_table(rankings_table(found))}"
        f"<h2>Plots</h2>{''.join(plots)}<h2>Numbers</h2>{_table(table(found))}</html>\n"
    )


def _rho(found: dict[str, Any], name: str) -> str:
    rho = found["length_spearman"][name]
    return "" if rho is None else f", Spearman's rho {rho:.2f}"


def _table(rows: list[Any]) -> str:
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
