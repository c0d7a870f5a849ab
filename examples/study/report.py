"""The results of the study: a table in Markdown, the figures as JSON, and a page with plots.

write(plan, sft_figures, results, costs, load)      # OUTPUT/table.md, study.json and index.html

The page is one HTML file without scripts and without links to other files; the plots in it are SVG.
"""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Callable
from html import escape
from operator import itemgetter
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

import matplotlib
import torch

from examples.study.cost import RESIDENT
from examples.study.plan import Plan
from simpo_megatron.program import write_report
from tools.machine import processor

matplotlib.use("Agg")  # draws to files; needs no screen
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter

pyplot.rcParams["svg.fonttype"] = "none"  # text stays text

T = TypeVar("T")
Figures = dict[str, dict[str, list[float]]]  # by variant and figure, one value a seed
SFT = "sft"
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:80em;padding:0 1em;color:#1b1b1b}
table{border-collapse:collapse}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}
td{white-space:nowrap}td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto;margin-top:1em}
"""


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        title: its head.
        figure: its name in `Measure`.
        show: a value, or a spread, as text.
    """

    title: str
    figure: str
    show: Callable[[float], str]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _short(value: float) -> str:
    return f"{value:.3f}"


COLUMNS = (
    Column("ranking, training pairs (%)", "train_ranking", _percent),
    Column("ranking, held-out pairs (%)", "heldout_ranking", _percent),
    Column("reward accuracy, held-out (%)", "reward_accuracy", _percent),
    Column("KL from SFT (nats a token)", "kl", _short),
    Column("log-prob of chosen (nats a token)", "chosen_logp", _short),
    Column("length (% of SFT's)", "relative_length", lambda value: f"{100 * value:.0f}"),
    Column("right answers, greedy (%)", "correct", _percent),
    Column("right answers, drawn (%)", "sampled_correct", _percent),
)
COSTS = ("CPU time of a step (%)", "memory (%)")


def load() -> float:
    """Processes that ran or waited to run, over the last minute."""
    return os.getloadavg()[0]


def gather(sft: dict[str, float], results: dict[tuple[str, int], dict[str, Any]]) -> Figures:
    """The figures of each variant, in the order of the seeds; SFT has one value of each.

    `relative_length` is the length of drawn answers by that of the SFT model.
    """
    found: Figures = {}
    of_one = [
        (SFT, sft),
        *((name, results[name, seed]["figures"]) for name, seed in sorted(results, key=itemgetter(1))),
    ]
    for name, figures in of_one:
        for figure, value in {**figures, "relative_length": figures["length"] / sft["length"]}.items():
            found.setdefault(name, {}).setdefault(figure, []).append(value)
    return found


def spread(values: list[float]) -> float | None:
    """The standard deviation over the seeds; None for one seed."""
    return stdev(values) if len(values) > 1 else None


def cell(values: list[float] | None, show: Callable[[float], str]) -> str:
    """Mean and standard deviation as text."""
    if not values:
        return ""
    deviation = spread(values)
    return show(fmean(values)) + ("" if deviation is None else f" ± {show(deviation)}")


def table(plan: Plan, figures: Figures, costs: dict[str, dict[str, float]]) -> list[list[str]]:
    """The table: its head, SFT, a line for each variant, and DPO with a resident reference model for the cost."""
    columns = [column for column in COLUMNS if any(column.figure in of_one for of_one in figures.values())]
    lines = [["", *(column.title for column in columns), *COSTS]]
    names = [SFT, *(variant.name for variant in plan.variants), RESIDENT]
    for name in names:
        cells = [cell(figures.get(name, {}).get(column.figure), column.show) for column in columns]
        cost = [
            f"{100 * costs[name][what] / costs[RESIDENT][what]:.0f}" if name in costs else ""
            for what in ("seconds", "mib")
        ]
        lines.append([name, *cells, *cost])
    return lines


def notes(plan: Plan, sft: dict[str, float], costs: dict[str, dict[str, float]], load_before: float) -> list[str]:
    """What the table was made with."""
    flags = " ".join(plan.run_flags(plan.variants[0], 1)[2:])
    return [
        f"Mean and standard deviation over {plan.seeds} seed(s). A seed decides the order of the training pairs; the "
        "SFT model and the pairs are the same for all.",
        f"Each run: {flags.replace(str(plan.output), 'OUTPUT')}",
        "ranking: the chosen response has the higher average log-prob. KL: exact, over the vocabulary, at the response "
        "positions of the held-out chosen responses. length: of answers drawn at temperature 1; the SFT model's have "
        f"{sft['length']:.1f} tokens.",
        f"Cost: 100 % is DPO with a reference model in memory: {costs[RESIDENT]['seconds']:.2f} s and "
        f"{costs[RESIDENT]['mib']:.0f} MiB for a model of 10 M parameters. Log-probs that are computed once cost one "
        "forward pass over the pairs, before the first step.",
        f"Machine: {processor()}, load {load_before:.1f} before and {load():.1f} after. Python "
        f"{platform.python_version()}, torch {torch.__version__}.",
    ]


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown."""
    head, *rest = lines
    rows = [head, ["---"] * len(head), *rest]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(
    plan: Plan,
    sft: dict[str, float],
    results: dict[tuple[str, int], dict[str, Any]],
    costs: dict[str, dict[str, float]],
    load_before: float,
) -> None:
    """Writes the table, the figures and the page, and prints the table.

    Args:
        plan: of the study.
        sft: figures of the SFT model.
        results: of the runs, by variant and seed.
        costs: from `cost.measure`.
        load_before: load of the machine when the study began.

    Raises:
        UserError: a file cannot be written.
    """
    figures = gather(sft, results)
    lines, remarks = table(plan, figures, costs), notes(plan, sft, costs, load_before)
    text = markdown(lines)
    print(text)
    write_report("--output", plan.output / "table.md", text + "".join(f"\n* {remark}" for remark in remarks) + "\n")
    everything = {"figures": figures, "cost": costs, "notes": remarks}
    write_report("--output", plan.output / "study.json", json.dumps(everything, indent=1) + "\n")
    write_report("--output", plan.output / "index.html", page(lines, remarks, plots(plan, figures, costs)))


def page(lines: list[list[str]], remarks: list[str], drawings: list[str]) -> str:
    """The HTML page."""
    head, *rest = [[escape(text) for text in line] for line in lines]
    rows = [f"<tr>{''.join(f'<th>{text}</th>' for text in head)}</tr>"]
    rows += [f"<tr>{''.join(f'<td>{text}</td>' for text in line)}</tr>" for line in rest]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Objectives compared</title><style>{STYLE}</style>"
        f"<h1>Objectives compared, from one SFT model</h1><table>{''.join(rows)}</table>"
        f"<ul>{''.join(f'<li>{escape(remark)}' for remark in remarks)}</ul>{''.join(drawings)}</html>\n"
    )


def plots(plan: Plan, figures: Figures, costs: dict[str, dict[str, float]]) -> list[str]:
    """The plots as SVG."""
    names = [variant.name for variant in plan.variants]
    drawn = [
        _ranking(names, figures),
        _against_kl(names, figures, "relative_length", "length of a drawn answer by that of SFT"),
        _cost([*names, RESIDENT], costs),
    ]
    if "correct" in figures[SFT]:
        drawn.insert(1, _against_kl(names, figures, "sampled_correct", "share of right answers, drawn"))
    return drawn


def _ranking(names: list[str], figures: Figures) -> str:
    figure, axis = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    kinds = (
        ("train_ranking", "likelihood ranking, training pairs"),
        ("heldout_ranking", "likelihood ranking, held-out pairs"),
        ("reward_accuracy", "reward accuracy, held-out pairs"),
    )
    for place, (kind, label) in enumerate(kinds):
        offsets = [index + 0.25 * (place - 1) for index in range(len(names))]
        axis.bar(offsets, [fmean(figures[name][kind]) for name in names], 0.23, label=label, alpha=0.6)
        for offset, name in zip(offsets, names, strict=True):
            values = figures[name][kind]
            axis.plot([offset] * len(values), values, "k.", markersize=3)
    axis.axhline(figures[SFT]["heldout_ranking"][0], color="grey", linestyle="--", label="SFT, held-out pairs")
    axis.set(
        xticks=range(len(names)), ylabel="share of pairs", ylim=(0, 1.02), title="Ranking accuracy, one dot a seed"
    )
    axis.set_xticklabels(names, rotation=30, ha="right")
    axis.legend(loc="lower right", fontsize="small")
    return _svg(figure)


def _against_kl(names: list[str], figures: Figures, kind: str, label: str) -> str:
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for index, name in enumerate(names):
        marker = "os^Dv<>pP*XhH8"[index % 14]
        axis.plot(figures[name]["kl"], figures[name][kind], marker, label=name, alpha=0.8)
    axis.axhline(figures[SFT][kind][0], color="grey", linestyle="--", label=SFT)
    axis.set(xlabel="exact KL[model || SFT], nats a token", ylabel=label, title="One mark a seed")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return _svg(figure)


def _cost(names: list[str], costs: dict[str, dict[str, float]]) -> str:
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, what, title in zip(axes, ("seconds", "mib"), ("CPU seconds of a step", "memory, MiB"), strict=True):
        axis.barh(range(len(names)), [costs[name][what] for name in names], alpha=0.6)
        axis.set(yticks=range(len(names)), title=title)
        axis.set_yticklabels(names)
        axis.invert_yaxis()
    return _svg(figure)


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg")
    pyplot.close(figure)
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]
