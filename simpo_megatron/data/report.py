"""The doctor's report: on the terminal, and as one HTML file without scripts or anything from elsewhere."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from simpo_megatron.data.doctor import CHECKS, Doctor, View, packing_figures
from simpo_megatron.errors import UserError

SHOWN = 400  # tokens of a sequence in a view
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#1b1b1b}
table{border-collapse:collapse}td,th{padding:.25em .8em;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
.spoils{color:#a40000;font-weight:600}.warns{color:#7a5200}.fine{color:#777}
.tokens{font-family:ui-monospace,monospace;white-space:pre-wrap;background:#fafafa;padding:.6em;border:1px solid #ddd}
.prompt{color:#777}.scored{background:#d5efd9}.eos{background:#ffd97a;font-weight:600}.tokens span{border-right:1px solid #fff}
.chosen{fill:#2b7a3f;fill-opacity:.6}.rejected{fill:#b5442e;fill-opacity:.6}
"""


def status(doctor: Doctor, name: str) -> str:
    """spoils, warns or fine."""
    if doctor.spoils(name):
        return "spoils"
    return "warns" if doctor.findings[name].count else "fine"


def length_rows(doctor: Doctor) -> list[tuple[str, ...]]:
    """Name, mean, median, 95th percentile and maximum of tokens: prompts, chosen, rejected."""
    table = np.array(doctor.lengths, np.int64).reshape(-1, 3)
    return [
        (name, *(f"{value:.0f}" for value in (column.mean(), *np.percentile(column, (50, 95)), column.max())))
        for name, column in zip(("prompt", "chosen", "rejected"), table.T, strict=True)
        if len(column)
    ]


def packing_lines(doctor: Doctor) -> list[str]:
    """What packing and shared prompts do, in sentences."""
    figures = packing_figures(np.array(doctor.lengths, np.int64).reshape(-1, 3), doctor.seq_length)
    if not figures:
        return []
    return [
        f"{figures['pairs']} pairs, {figures['tokens']} tokens in {figures['rows']} rows of {doctor.seq_length} "
        f"({figures['fewest_rows']} at best): {figures['tokens_per_row']:.0f} tokens a row",
        f"padding {figures['padding_packed']:.1%} packed; {figures['padding_unpacked']:.1%} if four pairs at a time were "
        "padded to their longest sequence",
        f"--share-prompts would save {figures['saved_by_shared_prompts']:.1%} of the tokens",
    ]


def print_report(doctor: Doctor, title: str) -> None:
    """The report on the terminal; faults that were not found are one line."""
    from rich.console import Console
    from rich.markup import escape as plain
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 150)
    table = Table("", "fault", "rows", "examples", "mend", title=plain(title))
    fine = []
    for name, check in CHECKS.items():
        state, finding = status(doctor, name), doctor.findings[name]
        if state == "fine":
            fine.append(check.title)
            continue
        mark = "[bold red]spoils[/]" if state == "spoils" else "[yellow]warns[/]"
        examples = ", ".join(example.removeprefix(title).lstrip(": ") for example in finding.examples[:3])
        table.add_row(mark, check.title, str(finding.count), plain(examples), plain(doctor.mend(name)))
    console.print(table)
    console.print(f"Not found: {'; '.join(fine)}.", markup=False)
    lengths = Table("tokens", "mean", "median", "95 %", "longest")
    for row in length_rows(doctor):
        lengths.add_row(*row)
    console.print(lengths)
    for line in packing_lines(doctor):
        console.print(line, markup=False, highlight=False)
    for view in doctor.views[:1]:
        print_view(view, console)


def print_view(view: View, console: Any) -> None:
    """A pair token by token: the prompt dim, what is scored on green, EOS on yellow."""
    from rich.text import Text

    styles = {"prompt": "dim", "scored": "black on green", "eos": "bold black on yellow"}
    for name, tokens in (("chosen", view.chosen), ("rejected", view.rejected)):
        text = Text(f"{view.where}, {name}: ", style="bold")
        for token, kind in _shortened(tokens):
            text.append(token, styles[kind])
            text.append("|", "dim")
        console.print(text)


def write_html(doctor: Doctor, title: str, path: Path) -> None:
    """Writes the report. Raises UserError where it cannot be written."""
    rows = "".join(
        f"<tr class={status(doctor, name)}><td>{status(doctor, name)}<td>{escape(check.title)}"
        f"<td>{doctor.findings[name].count}<td>{escape(', '.join(doctor.findings[name].examples))}"
        f"<td>{escape(doctor.mend(name)) if doctor.findings[name].count else ''}</tr>"
        for name, check in CHECKS.items()
    )
    lengths = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in length_rows(doctor))
    views = "".join(_html_view(view) for view in doctor.views)
    text = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1><p>{doctor.rows} rows, {len(doctor.lengths)} pairs that can be trained on."
        f"<h2>Faults</h2><table><tr><th><th>fault<th>rows<th>examples<th>mend</tr>{rows}</table>"
        f"<h2>Tokens</h2><table><tr><th><th>mean<th>median<th>95 %<th>longest</tr>{lengths}</table>{_histogram(doctor)}"
        f"<h2>Packing</h2>{''.join(f'<p>{escape(line)}' for line in packing_lines(doctor))}"
        "<h2>Pairs as the loss sees them</h2><p>Grey is the prompt; <span class=scored>what is scored</span>; "
        f"<span class=eos>EOS</span>.{views}</html>\n"
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--report {path} cannot be written: {error.strerror}; choose another file") from error


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
    """Chosen and rejected response lengths over each other, as SVG."""
    table = np.array(doctor.lengths, np.int64).reshape(-1, 3)
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
        f'<text x=0 y="{height + 15}">0</text><text x="{width}" y="{height + 15}" text-anchor=end>{edges[-1]:.0f} tokens '
        "(longer ones in the last bar)</text></svg><p>Response lengths: chosen green, rejected red."
    )
