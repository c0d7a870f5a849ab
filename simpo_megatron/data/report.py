"""The doctor's report: on the terminal, and as one HTML file without scripts and without links to other files.

`sections` is the content of both: faults that were found (those that block training first), then lengths, then packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from simpo_megatron.data.checks import CHECKS
from simpo_megatron.data.doctor import Doctor, View
from simpo_megatron.data.packing import packing_figures
from simpo_megatron.program import write_report

SHOWN = 400  # tokens of a sequence in a view
_STATES = {"blocks": "bold red", "warns": "yellow"}  # by severity, with the style on the terminal
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#1b1b1b}
table{border-collapse:collapse}td,th{padding:.25em .8em;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
.blocks{color:#a40000;font-weight:600}.warns{color:#7a5200}
.tokens{font-family:ui-monospace,monospace;white-space:pre-wrap;background:#fafafa;padding:.6em;border:1px solid #ddd}
.prompt{color:#777}.scored{background:#d5efd9}.eos{background:#ffd97a;font-weight:600}
.tokens span{border-right:1px solid #fff}svg{display:block;margin-top:1em}
.chosen{fill:#2b7a3f;fill-opacity:.6}.rejected{fill:#b5442e;fill-opacity:.6}
"""


@dataclass
class Section:
    """A part of the report: a heading, a table, and lines below it.

    Attributes:
        title: the heading.
        header: of the table.
        rows: of the table; a cell that is one of `_STATES` is coloured.
        lines: sentences.
    """

    title: str
    header: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def state(doctor: Doctor, name: str) -> str | None:
    """`blocks` or `warns` for a fault that was found, else None."""
    if doctor.blocks(name):
        return "blocks"
    return "warns" if doctor.findings[name].count else None


def summary(doctor: Doctor) -> str:
    """The report in one line."""
    states = [state(doctor, name) for name in CHECKS]
    return (
        f"{doctor.rows} rows, {len(doctor.lengths)} pairs that can be trained on; faults that block training: "
        f"{states.count('blocks')}, warnings: {states.count('warns')}"
    )


def sections(doctor: Doctor, source: str) -> list[Section]:
    """The report.

    Args:
        doctor: that has examined the source.
        source: its name, which examples do not repeat.
    """
    return [_faults(doctor, source), _tokens(doctor), Section("Packing", lines=_packing_lines(doctor))]


def _faults(doctor: Doctor, source: str) -> Section:
    found = [
        (mark, name)
        for mark in _STATES
        for name in sorted(CHECKS, key=lambda name: -doctor.findings[name].count)
        if state(doctor, name) == mark
    ]
    section = Section("Faults", ("", "fault", "rows", "examples", "fix"))
    for mark, name in found:
        finding = doctor.findings[name]
        examples = ", ".join(example.removeprefix(source).lstrip(": ") for example in finding.examples)
        section.rows.append((mark, CHECKS[name].title, str(finding.count), examples, doctor.fix(name)))
    absent = [check.title for name, check in CHECKS.items() if not state(doctor, name)]
    section.lines.append(f"Not found: {'; '.join(absent)}.")
    return section


def _tokens(doctor: Doctor) -> Section:
    """Mean, median, 95th percentile and maximum of the lengths."""
    rows = [
        (name, *(f"{value:.0f}" for value in (column.mean(), *np.percentile(column, (50, 95)), column.max())))
        for name, column in zip(("prompt", "chosen", "rejected"), _lengths(doctor).T, strict=True)
        if len(column)
    ]
    return Section("Tokens", ("", "mean", "median", "95 %", "longest"), rows)


def _lengths(doctor: Doctor) -> np.ndarray:
    return np.array(doctor.lengths, np.int64).reshape(-1, 3)


def _packing_lines(doctor: Doctor) -> list[str]:
    figures = packing_figures(_lengths(doctor), doctor.seq_length)
    if not figures:
        return []
    return [
        f"{figures['pairs']} pairs, {figures['tokens']} tokens in {figures['rows']} packed rows of {doctor.seq_length} "
        f"(at least {figures['fewest_rows']} are needed): {figures['tokens_per_row']:.0f} tokens a row",
        f"padding {figures['padding_packed']:.1%} packed; {figures['padding_unpacked']:.1%} if four pairs at a time "
        "were padded to their longest sequence",
        f"--share-prompts would save {figures['saved_by_shared_prompts']:.1%} of the tokens",
    ]


def print_report(doctor: Doctor, source: str) -> None:
    """Prints the report, and the pair that was asked for token by token."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if Console().is_terminal else 150)
    console.print(Text(f"{source}: {summary(doctor)}"))
    for section in sections(doctor, source):
        if section.rows:
            table = Table(*section.header, title=section.title)
            for row in section.rows:
                table.add_row(*(Text(cell, _STATES.get(cell, "")) for cell in row))
            console.print(table)
        for line in section.lines:
            console.print(Text(line))
    if doctor.asked is not None:
        print_view(doctor.asked, console)


def print_view(view: View, console: Any) -> None:
    """Prints a pair token by token: the prompt is dim, what is scored is on green, EOS is on yellow."""
    from rich.text import Text

    styles = {"prompt": "dim", "scored": "black on green", "eos": "bold black on yellow"}
    for name, tokens in (("chosen", view.chosen), ("rejected", view.rejected)):
        text = Text(f"{view.where}, {name}: ", style="bold")
        for token, kind in _shortened(tokens):
            text.append(token, styles[kind])
            text.append("|", "dim")
        console.print(text)


def write_html(doctor: Doctor, source: str, path: Path) -> None:
    """Writes the report, with an example of every fault that is found in ids, token by token.

    Raises:
        UserError: the file cannot be written.
    """
    parts = []
    for section in sections(doctor, source):
        parts.append(f"<h2>{section.title}</h2>")
        if section.rows:
            rows = [_html_row("th", section.header), *(_html_row("td", row) for row in section.rows)]
            parts.append(f"<table>{''.join(rows)}</table>")
        parts += [f"<p>{escape(line)}" for line in section.lines]
        if section.title == "Tokens":
            parts.append(_histogram(doctor))
    text = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(source)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(source)}</h1><p>{summary(doctor)}{''.join(parts)}"
        "<h2>Pairs as the loss sees them</h2><p>Grey is the prompt; <span class=scored>what is scored</span>; "
        f"<span class=eos>EOS</span>.{''.join(_html_view(view) for view in doctor.views)}</html>\n"
    )
    write_report("--report", path, text)


def _html_row(tag: str, cells: Sequence[str]) -> str:
    marks = [f" class={cell}" if cell in _STATES else "" for cell in cells]
    row = "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True))
    return f"<tr>{row}</tr>"


def _html_view(view: View) -> str:
    parts = [f"<h3>{escape(view.where)}</h3>"]
    for name, tokens in (("chosen", view.chosen), ("rejected", view.rejected)):
        spans = "".join(
            f"<span class={kind}>{escape(token).replace(chr(10), '&#9166;' + chr(10))}</span>"
            for token, kind in _shortened(tokens)
        )
        parts.append(f"<p>{name}<div class=tokens>{spans}</div>")
    return "".join(parts)


def _shortened(tokens: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    if len(tokens) <= SHOWN:
        return list(tokens)
    half = SHOWN // 2
    return [*tokens[:half], (f" [{len(tokens) - SHOWN} tokens] ", "prompt"), *tokens[-half:]]


def _histogram(doctor: Doctor, bins: int = 40, width: int = 800, height: int = 200) -> str:
    """The lengths of chosen and rejected responses as SVG, one drawn over the other."""
    table = _lengths(doctor)
    if not len(table):
        return ""
    edges = np.linspace(0, max(float(np.percentile(table[:, 1:], 99)), 1.0), bins + 1)
    counts = {
        name: np.histogram(np.minimum(table[:, column], edges[-1]), edges)[0]
        for name, column in (("chosen", 1), ("rejected", 2))
    }
    tallest = max(int(count.max()) for count in counts.values())
    bars = "".join(
        f'<rect class={name} x="{i * width / bins:.1f}" y="{height - height * count / tallest:.1f}" '
        f'width="{width / bins - 1:.1f}" height="{height * count / tallest:.1f}"/>'
        for name, found in counts.items()
        for i, count in enumerate(found.tolist())
    )
    return (
        f'<svg viewBox="0 0 {width} {height + 20}" width="{width}" role=img aria-label="response lengths">{bars}'
        f'<text x=0 y="{height + 15}">0</text><text x="{width}" y="{height + 15}" text-anchor=end>{edges[-1]:.0f} '
        "tokens (longer responses are in the last bar)</text></svg><p>Response lengths: chosen green, rejected red."
    )
