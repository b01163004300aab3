import math
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb

from ftlib import plots
from ftlib.results import Metric, NotRecordedError, Record, Results, bootstrap

matplotlib.use("Agg")


@pytest.fixture
def ax():
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.use_style()
        figure, axes = plt.subplots()
        yield axes
        figure.canvas.draw()
        plt.close(figure)


def results_of(**arms):
    """Make results of arms given as lists of (kl, violation), one pair a seed."""
    return Results(
        Record(
            method="cgm",
            experiment="mixture",
            arm=arm,
            seed=seed,
            scale="cpu",
            settings={},
            metrics={"kl": Metric(kl), "violation": Metric(violation)},
            seconds=1.0,
            peak_memory_bytes=0,
            device="cpu",
            versions={},
            data={},
            commit=None,
        )
        for arm, pairs in arms.items()
        for seed, (kl, violation) in enumerate(pairs)
    )


TWO_ARMS = results_of(
    relax=[(0.1, 5.0), (0.2, 4.0), (0.4, 2.0)], base=[(1.0, 1.0), (1.5, 1.25)]
)


def means(ax):
    """Return the mean marker of every arm as (x, y)."""
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines]


def spans(ax):
    """Return the error bars of every arm, x then y, as ((x0, y0), (x1, y1))."""
    return [
        [bar.get_segments()[0].tolist() for bar in container[2]]
        for container in ax.containers
    ]


def seeds(ax):
    dots = (c for c in ax.collections if isinstance(c, PathCollection))
    return [c.get_offsets().data.tolist() for c in dots]


def _luminance(rgb):
    channels = np.asarray(rgb)
    linear = np.where(
        channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
    )
    return linear @ [0.2126, 0.7152, 0.0722]


def _contrast_on_white(name):
    return 1.05 / (_luminance(to_rgb(name)) + 0.05)


def test_the_first_colours_stand_out_on_white_and_yellow_is_not_used():
    assert all(_contrast_on_white(plots.colour(i)) > 2.9 for i in range(5))
    assert all(_contrast_on_white(plots.colour(i)) > 2.0 for i in range(7))
    assert "#F0E442" not in {plots.colour(i) for i in range(20)}


def test_colour_is_never_the_only_cue():
    styles = [plots.arm_style(i) for i in range(56)]
    assert len({(s["color"], s["marker"]) for s in styles}) == 56
    assert len({s["marker"] for s in styles[:8]}) == 8
    assert styles[0] == plots.arm_style(0)


def test_style_fits_the_page(ax):
    assert ax.figure.get_size_inches()[0] == 7
    assert ax.figure.dpi == 110
    assert ax.figure.get_constrained_layout()
    sizes = [ax.xaxis.label, ax.yaxis.label, ax.title, *ax.get_xticklabels()]
    assert min(text.get_size() for text in sizes) >= 9
    assert ax.plot([0, 1])[0].get_color() == plots.colour(0)
    assert ax.plot([0, 1])[0].get_color() == plots.colour(1)


def test_seed_points(ax):
    values = [0.1, 0.2, 0.6]
    plots.seed_points(ax, 3.0, values, index=1, label="relax")
    assert seeds(ax)[0] == [[3.0, v] for v in values]
    assert means(ax) == [(3.0, pytest.approx(0.3))]
    interval = bootstrap(values)
    (x_span, y_span) = spans(ax)[0]
    assert np.allclose(y_span, [[3, interval.low], [3, interval.high]])
    assert np.allclose(x_span, [[3, 0.3], [3, 0.3]])
    assert ax.get_legend_handles_labels()[1] == ["relax"]
    assert ax.lines[0].get_marker() == plots.arm_style(1)["marker"]


def test_one_seed_has_a_mean_and_no_interval(ax):
    plots.seed_points(ax, 0.0, [2.0])
    assert means(ax) == [(0.0, 2.0)]
    assert np.isnan(spans(ax)[0][1]).any() or not spans(ax)[0][1]


def test_equal_values_draw_in_spite_of_rounding(ax):
    for value in np.random.default_rng(0).random(50):
        plots.seed_points(ax, value, [value] * 7)


def test_a_diverged_seed_is_named_and_no_mean_is_drawn(ax):
    plots.seed_points(ax, 0.0, [1.0, math.nan, 2.0], label="relax")
    assert ax.get_legend_handles_labels()[1] == ["relax (1 of 3 not finite)"]
    assert math.isnan(means(ax)[0][1])


def test_frontier(ax):
    plots.frontier(ax, TWO_ARMS, "kl", "violation", {"relax": "λ = 1", "base": "b"})
    assert seeds(ax) == [
        [[0.1, 5.0], [0.2, 4.0], [0.4, 2.0]],
        [[1.0, 1.0], [1.5, 1.25]],
    ]
    assert np.allclose(means(ax), [(0.7 / 3, 11 / 3), (1.25, 1.125)])
    interval = bootstrap([5.0, 4.0, 2.0])
    assert np.allclose(np.array(spans(ax)[0][1])[:, 1], interval[1:3])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["λ = 1", "b"]
    markers = [line.get_marker() for line in ax.lines]
    assert markers == [plots.arm_style(0)["marker"], plots.arm_style(1)["marker"]]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("kl", "violation")
    x_low, x_high = ax.get_xlim()
    assert x_low < 0.1 < 1.5 < x_high


def test_frontier_counts_a_seed_lost_in_either_metric(ax):
    lost = results_of(a=[(1.0, math.nan), (math.nan, 1.0), (1.0, 1.0)])
    plots.frontier(ax, lost, "kl", "violation")
    assert ax.get_legend().get_texts()[0].get_text() == "a (2 of 3 not finite)"


def test_dot_plot_has_the_first_arm_on_top(ax):
    plots.dot_plot(ax, TWO_ARMS, "kl", ["relax", "base"])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["relax", "base"]
    assert seeds(ax)[1] == [[1.0, 1.0], [1.5, 1.0]]
    assert np.allclose(means(ax), [(0.7 / 3, 0), (1.25, 1)])
    bottom, top = ax.get_ylim()
    assert bottom > top
    assert ax.get_xlabel() == "kl"


def test_default_arms_are_all(ax):
    plots.dot_plot(ax, TWO_ARMS, "kl")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["base", "relax"]


def test_an_arm_that_is_not_there_is_refused(ax):
    with pytest.raises(NotRecordedError, match="there are: mixture/base"):
        plots.frontier(ax, TWO_ARMS, "kl", "violation", ["relx"])
