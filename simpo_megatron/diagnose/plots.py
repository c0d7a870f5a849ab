"""Plots of a diagnosis, as SVG elements without scripts and without links to other files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 360, 220
_LEFT, _BOTTOM, _TOP = 48, 34, 8
_POINTS = 1000  # at most this many are drawn, evenly picked

Bars = Sequence[tuple[str, float, str]]  # name, value, CSS class


def scatter(title: str, across: tuple[str, np.ndarray], up: tuple[str, np.ndarray]) -> str:
    """A point for each response.

    Args:
        title: above the plot.
        across: name and values of the horizontal axis.
        up: name and values of the vertical axis.
    """
    (x_name, x), (y_name, y) = across, up
    shown = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).round().astype(int))
    right, above = _scale(x, _LEFT, WIDTH - 8), _scale(y, HEIGHT - _BOTTOM, _TOP)
    points_N2 = np.stack((x, y), axis=1)[shown].tolist()
    points = "".join(f'<circle cx="{right(at):.1f}" cy="{above(height):.1f}" r="2" />' for at, height in points_N2)
    ends = [(float(values.min()), float(values.max())) for values in (x, y)]
    return _frame(title, points, x_name, y_name, *ends)


def bars(title: str, x_name: str, y_name: str, found: Bars) -> str:
    """A bar from 0 for each value, with its name below and its value above.

    Args:
        title: above the plot.
        x_name: of the horizontal axis.
        y_name: of the vertical axis.
        found: name, value and CSS class of each bar.
    """
    values = np.array([0.0, *(value for _, value, _ in found)])
    above = _scale(values, HEIGHT - _BOTTOM - 14, _TOP + 14)
    step = (WIDTH - _LEFT - 8) / max(len(found), 1)
    parts = []
    for number, (name, value, style) in enumerate(found):
        left, ends = _LEFT + step * number, sorted((above(0.0), above(value)))
        middle = left + step / 2
        parts.append(
            f'<rect class="{style}" x="{left + step * 0.1:.1f}" y="{ends[0]:.1f}" width="{step * 0.8:.1f}" '
            f'height="{max(ends[1] - ends[0], 0.5):.1f}"/>'
            f'<text x="{middle:.1f}" y="{HEIGHT - _BOTTOM + 12}" text-anchor="middle">{escape(name)}</text>'
            f'<text x="{middle:.1f}" y="{ends[0] - 3 if value >= 0 else ends[1] + 10:.1f}" text-anchor="middle">'
            f"{value:.3g}</text>"
        )
    return _frame(title, "".join(parts), x_name, y_name, None, (float(values.min()), float(values.max())))


def _scale(values: np.ndarray, low: float, high: float) -> Callable[[float], float]:
    """From a value to its place, so that the smallest is at `low` and the largest at `high`."""
    smallest, span = float(values.min()), float(np.ptp(values)) or 1.0
    return lambda value: low + (float(value) - smallest) / span * (high - low)


def _frame(
    title: str,
    content: str,
    x_name: str,
    y_name: str,
    x_ends: tuple[float, float] | None,
    y_ends: tuple[float, float],
) -> str:
    base = HEIGHT - _BOTTOM
    ends = (
        ""
        if x_ends is None
        else (
            f'<text x="{_LEFT}" y="{base + 12}">{x_ends[0]:.4g}</text>'
            f'<text x="{WIDTH - 8}" y="{base + 12}" text-anchor="end">{x_ends[1]:.4g}</text>'
        )
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'role="img" aria-label="{escape(title)}"><path d="M{_LEFT} {_TOP}V{base}H{WIDTH - 8}"/>{content}{ends}'
        f'<text x="{_LEFT - 4}" y="{base}" text-anchor="end">{y_ends[0]:.3g}</text>'
        f'<text x="{_LEFT - 4}" y="{_TOP + 8}" text-anchor="end">{y_ends[1]:.3g}</text>'
        f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>'
        f'<text transform="translate(10 {HEIGHT / 2 - 10}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>'
        "</svg></figure>"
    )
