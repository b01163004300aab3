"""One look for the figures of all chapters.

Every arm has a colour, a marker and a line style of its own, so that colour is never
the only cue. Every figure of results shows each seed beside the mean and its
interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray

from ftlib.results import Results, as_labels, bootstrap

# Okabe and Ito's palette, which readers with colour-blindness can tell apart,
# darkest first. Its yellow is left out: a thin line of it is lost on white.
_COLOURS = (
    "#0072B2",  # blue
    "#D55E00",  # vermillion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#000000",  # black
    "#E69F00",  # orange
    "#56B4E9",  # sky blue
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.", ":")

_STYLE = {
    "figure.figsize": (7.0, 4.0),
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "axes.prop_cycle": cycler(color=_COLOURS),
}


def use_style() -> None:
    """Set matplotlib's defaults for the chapters' figures (7 in wide, 110 dpi)."""
    matplotlib.style.use(_STYLE)


def colour(index: int) -> str:
    """Return the colour of the arm with this index, as ``#RRGGBB``."""
    return _COLOURS[index % len(_COLOURS)]


def arm_style(index: int) -> dict[str, str]:
    """Return ``color``, ``marker`` and ``linestyle`` of the arm with this index.

    No two of the first 56 arms have both colour and marker in common.
    """
    return {
        "color": colour(index),
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
    }


def seed_points(
    ax: Axes, x: float, values: ArrayLike, index: int = 0, label: str | None = None
) -> None:
    """Draw one dot per seed at ``x``, with their mean and its interval.

    Args:
        ax: the axes to draw in.
        x: position on the horizontal axis.
        values: one number per seed, shape (seeds,).
        index: the arm's index, which decides its style.
        label: the legend's entry.
    """
    sample = np.asarray(values, dtype=np.float64)
    at = np.full_like(sample, x)
    _seeds_and_mean(ax, at, sample, index, label and _noted(label, sample))


def dot_plot(
    ax: Axes,
    results: Results,
    metric: str,
    arms: Mapping[str, str] | Iterable[str] | None = None,
) -> None:
    """Draw a metric with one row an arm: its seeds, their mean and its interval.

    Args:
        ax: the axes to draw in.
        results: of one experiment.
        metric: the metric on the horizontal axis.
        arms: the rows from the top, or a mapping of arms to labels; default: all.
            The order decides the styles.
    """
    rows = []
    for row, (arm, label) in enumerate(_arms(results, arms).items()):
        values = results.select(arm=arm).values(metric)
        _seeds_and_mean(ax, values, np.full_like(values, row), row)
        rows.append(_noted(label, values))
    ax.set_yticks(range(len(rows)), rows)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(metric)


def frontier(
    ax: Axes,
    results: Results,
    x_metric: str,
    y_metric: str,
    arms: Mapping[str, str] | Iterable[str] | None = None,
) -> None:
    """Draw two metrics against each other: each arm's seeds, mean and intervals.

    Args:
        ax: the axes to draw in.
        results: of one experiment.
        x_metric: the metric on the horizontal axis.
        y_metric: the metric on the vertical axis.
        arms: the arms in order, or a mapping of arms to labels; default: all.
            The order decides the styles.
    """
    for index, (arm, label) in enumerate(_arms(results, arms).items()):
        of_arm = results.select(arm=arm)
        x, y = of_arm.values(x_metric), of_arm.values(y_metric)
        _seeds_and_mean(ax, x, y, index, _noted(label, x + y))
    ax.set_xlabel(x_metric)
    ax.set_ylabel(y_metric)
    ax.legend()


def _arms(
    results: Results, arms: Mapping[str, str] | Iterable[str] | None
) -> dict[str, str]:
    return as_labels(results.arms() if arms is None else arms)


def _seeds_and_mean(
    ax: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    index: int,
    label: str | None = None,
) -> None:
    """Draw points (seeds,), and their mean with an interval along each axis."""
    face, marker = colour(index), arm_style(index)["marker"]
    ax.scatter(x, y, s=18, color=face, marker=marker, alpha=0.5, linewidths=0)
    (x_mean, x_reach), (y_mean, y_reach) = _mean_and_reach(x), _mean_and_reach(y)
    ax.errorbar([x_mean], [y_mean], xerr=x_reach, yerr=y_reach, color=face, fmt="none")
    ax.plot(
        [x_mean],
        [y_mean],
        label=label,
        color=face,
        marker=marker,
        markersize=6,
        markeredgecolor="black",  # the pale colours need an edge to stand out
        linestyle="none",
    )


def _mean_and_reach(
    values: NDArray[np.float64],
) -> tuple[float, NDArray[np.float64]]:
    """Return the mean, and how far its interval reaches down and up, shape (2, 1)."""
    interval = bootstrap(values)
    down, up = interval.mean - interval.low, interval.high - interval.mean
    return interval.mean, np.maximum(0.0, [[down], [up]])  # rounding can be below 0


def _noted(label: str, values: NDArray[np.float64]) -> str:
    """Add to a label how many values are not finite, since those are not drawn."""
    lost = int(np.count_nonzero(~np.isfinite(values)))
    return f"{label} ({lost} of {values.size} not finite)" if lost else label
