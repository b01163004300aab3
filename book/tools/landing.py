"""The landing page's figure: each method's effect beside its paper's claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from claims import Book, Panel
from ftlib import plots

THEMES = {"light": "#222222", "dark": "#E8E8E8"}
# Light enough for the dark page, dark enough for the light one.
PAPER: dict[str, Any] = {
    "color": "#D55E00",
    "marker": "D",
    "markersize": 6,
    "linestyle": "none",
}
OURS: dict[str, Any] = {
    "color": "#3A8FCC",
    "marker": "o",
    "markersize": 6,
    "linestyle": "none",
}
ROW_INCHES, HEAD_INCHES, WIDTH_INCHES = 0.2, 0.5, 5.6


def draw(book: Book, ink: str) -> Figure:
    """Draw one panel a method, with a row for each number, theirs above ours."""
    plots.use_style()
    rows = [_rows(panel) for panel in book.panels]
    heights = [HEAD_INCHES + ROW_INCHES * count for count in rows]
    dyed: dict[Any, str] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "xtick.color", "ytick.color"), ink
    )
    with plt.rc_context(dyed | {"axes.facecolor": "none", "grid.color": "#88888855"}):
        figure, axes = plt.subplots(
            len(rows),
            figsize=(WIDTH_INCHES, sum(heights)),
            height_ratios=heights,
        )
        for ax, panel in zip(axes, book.panels, strict=True):
            _draw_panel(ax, panel, book)
        by_label = {
            label: handle
            for ax in axes
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        names = ["paper", "here"]
        figure.legend(
            [by_label[name] for name in names],
            names,
            loc="outside upper right",
            ncols=2,
        )
    return figure


def _rows(panel: Panel) -> int:
    return len(panel.theirs) + len(panel.ours) + bool(panel.silent)


def _draw_panel(ax: Axes, panel: Panel, book: Book) -> None:
    theirs = [book.published[name].value for name in panel.theirs]
    ours = [book.measured[name].interval for name in panel.ours]
    first = len(panel.theirs) + bool(panel.silent)
    ax.plot(theirs, range(len(theirs)), label="paper", **PAPER)
    means = np.array([interval.mean for interval in ours])
    edges = np.array([[i.mean - i.low, i.high - i.mean] for i in ours]).T
    places = np.arange(first, first + len(ours))
    ax.errorbar(means, places, xerr=edges, capsize=2.5, label="here", **OURS)
    if panel.silent:
        left = ax.get_yaxis_transform()
        ax.text(0.02, 0, panel.silent, va="center", style="italic", transform=left)
    ax.axvline(0, color="#888888", linewidth=1)
    ax.locator_params(axis="x", nbins=6, integer=True)
    labels = [*panel.theirs.values(), *[""] * bool(panel.silent), *panel.ours.values()]
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_title(f"{panel.title} ({panel.unit})", loc="left", fontsize=10)


def alt_text(book: Book) -> str:
    """Return the figure in words: every panel with its numbers."""
    return " ".join(_panel_text(panel, book) for panel in book.panels)


def _panel_text(panel: Panel, book: Book) -> str:
    theirs = [f"{label} {book.published[n]}" for n, label in panel.theirs.items()]
    ours = [f"{label} {book.measured[n]}" for n, label in panel.ours.items()]
    paper = panel.silent or f"paper: {', '.join(theirs)}"
    return f"{panel.title}. {paper[0].upper()}{paper[1:]}; here: {', '.join(ours)}."


def write(book: Book, folder: Path) -> str:
    """Write the figure for light and for dark pages; return the MyST that shows it."""
    shown = []
    for theme, ink in THEMES.items():
        figure = draw(book, ink)
        figure.savefig(folder / f"landing-{theme}.svg", transparent=True)
        plt.close(figure)
        shown.append(
            f"```{{image}} _static/landing-{theme}.svg\n"
            f":class: only-{theme}\n:alt: {alt_text(book)}\n```"
        )
    return "\n\n".join(shown)
