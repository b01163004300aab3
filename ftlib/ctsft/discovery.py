"""From scores of heads to circuits, and whether the circuits are any good.

A circuit is the k heads of the highest scores. Whether they carry the task is tested in
the model itself: with all other heads replaced by their means, F(C) of the margin is
left (:func:`ftlib.ctsft.ablation.faithfulness`), to be compared with random circuits of
the same size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from ftlib.ctsft import decomposition
from ftlib.ctsft.ablation import faithfulnesses
from ftlib.ctsft.decomposition import OURS, Rules, head_means
from ftlib.ctsft.evaluation import Questions
from ftlib.ctsft.heads import Head


def ranking(scores: Tensor) -> list[Head]:
    """Return all heads, those of the highest scores first; equal ones layer by layer.

    Args:
        scores: signed, (layers, heads).
    """
    return _sorted(scores, descending=True)


def top_k(scores: Tensor, k: int) -> list[Head]:
    """Return the circuit: the k heads that do most for the right answer.

    Args:
        scores: signed, (layers, heads).
        k: 1 to the number of heads.

    Raises:
        ValueError: there are not that many heads, or the circuit would be empty.
    """
    _check_k(scores, k)
    return ranking(scores)[:k]


def near_zero(scores: Tensor, k: int) -> list[Head]:
    """Return the k heads whose scores are closest to zero: NearZero, as published.

    Args:
        scores: signed, (layers, heads).
        k: 1 to the number of heads.

    Raises:
        ValueError: as for :func:`top_k`.
    """
    _check_k(scores, k)
    return _sorted(scores.abs(), descending=False)[:k]


def random_heads(scores: Tensor, k: int, seed: int) -> list[Head]:
    """Draw k heads; some of them may be in the circuit too.

    Args:
        scores: of which only the shape matters, (layers, heads).
        k: 1 to the number of heads.
        seed: of the draw.

    Raises:
        ValueError: as for :func:`top_k`.
    """
    _check_k(scores, k)
    every = ranking(scores * 0)
    chosen = np.random.default_rng(seed).permutation(len(every))[:k]
    return [every[at] for at in sorted(chosen.tolist())]


def _sorted(values: Tensor, *, descending: bool) -> list[Head]:
    order = values.flatten().argsort(descending=descending, stable=True)
    return [Head(*divmod(at, values.shape[1])) for at in order.tolist()]


def _check_k(scores: Tensor, k: int) -> None:
    if not 1 <= k <= scores.numel():
        raise ValueError(
            f"a circuit of {k} heads: the model has {scores.numel()}, choose from 1 to"
            " that"
        )


# --- faithfulness ----------------------------------------------------------------


def faithfulness_curve(
    model: Any,
    judged: Questions,
    means: Tensor,
    order: Sequence[Head],
    sizes: Sequence[int],
) -> list[float]:
    """Return how faithful the first k heads of a ranking are, for several k.

    Args:
        model: see :func:`ftlib.ctsft.ablation.faithfulness`.
        judged: what the margin is measured on.
        means: μ of every head, (layers, heads, head_dim).
        order: heads, best first.
        sizes: the k.

    Raises:
        ValueError: as there.
    """
    circuits = [order[:k] for k in sizes]
    return faithfulnesses(model, circuits, judged.batches, means, judged.token_ids)


def random_curves(
    model: Any,
    judged: Questions,
    means: Tensor,
    sizes: Sequence[int],
    seeds: Iterable[int],
) -> list[list[float]]:
    """Return :func:`faithfulness_curve` of random circuits, for each seed.

    Of a seed, the larger circuits contain the smaller.
    """
    shape = means[..., 0]
    flat = [random_heads(shape, k, seed) for seed in seeds for k in sizes]
    found = faithfulnesses(model, flat, judged.batches, means, judged.token_ids)
    return [found[i : i + len(sizes)] for i in range(0, len(found), len(sizes))]


def choose_k(sizes: Sequence[int], faithful: Sequence[float], share: float) -> int:
    """Return the smallest size that reaches a share of the model's margin.

    The paper's number of heads is not known; this way to choose one is ours.

    Args:
        sizes: of circuits.
        faithful: F of each, on data for validation.
        share: of the margin, 0 to 1.

    Raises:
        ValueError: none reaches it.
    """
    reached = [k for k, f in zip(sizes, faithful, strict=True) if f >= share]
    if not reached:
        raise ValueError(
            f"no circuit of {', '.join(map(str, sizes))} heads has {share:.0%} of the"
            f" margin, the best has {max(faithful):.0%}: allow larger ones"
        )
    return min(reached)


class Evidence(NamedTuple):
    """What a circuit is found by, and judged by.

    Attributes:
        found: for means and scores.
        judged: other questions, for validation.
    """

    found: Questions
    judged: Questions


class Circuit(NamedTuple):
    """What was found about a model's heads.

    Attributes:
        scores: signed, (layers, heads).
        means: μ of every head, (layers, heads, head_dim).
        faithful: F of the heads of the highest scores, for each size tried.
        size: the chosen one.
    """

    scores: Tensor
    means: Tensor
    faithful: list[float]
    size: int

    @property
    def heads(self) -> list[Head]:
        """The circuit."""
        return top_k(self.scores, self.size)


def find_circuit(
    model: Any,
    by: Evidence,
    sizes: Sequence[int],
    share: float,
    *,
    rules: Rules = OURS,
) -> Circuit:
    """Find a model's circuit: score the heads, and take as many as it needs.

    Args:
        model: see :func:`ftlib.ctsft.architectures.describe`.
        by: of one language, balanced in labels.
        sizes: numbers of heads to choose from.
        share: of the margin that the circuit must have by itself on validation.
        rules: of the decomposition.

    Raises:
        ValueError: no size is enough, or a label has no example.
    """
    batches, tokens = by.found
    means = head_means(model, batches, classes=len(tokens))
    found = decomposition.scores(model, batches, means, tokens, rules=rules)
    faithful = faithfulness_curve(model, by.judged, means, ranking(found), sizes)
    return Circuit(found, means, faithful, choose_k(sizes, faithful, share))


# --- comparisons -----------------------------------------------------------------


def jaccard(one: Collection[Head], other: Collection[Head]) -> float:
    """Return how many heads two circuits share, among those of either.

    Raises:
        ValueError: both are empty.
    """
    either = set(one) | set(other)
    if not either:
        raise ValueError("both circuits are empty, so they have no share in common")
    return len(set(one) & set(other)) / len(either)


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's ρ of two sets of scores of the same heads."""
    return float(spearmanr(one.flatten(), other.flatten()).statistic)


def correlation(one: Tensor, other: Tensor) -> float:
    """Return Pearson's r of two sets of scores of the same heads."""
    return float(pearsonr(one.flatten().double(), other.flatten().double()).statistic)
