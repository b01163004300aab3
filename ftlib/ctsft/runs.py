"""What the experiments share: tuning with looks on the way, and what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ftlib.ctsft.ablation import ablation_effects, faithfulness
from ftlib.ctsft.decomposition import PUBLISHED, head_means, scores
from ftlib.ctsft.discovery import (
    Circuit,
    Evidence,
    correlation,
    faithfulness_curve,
    jaccard,
    near_zero,
    random_curves,
    random_heads,
    rank_correlation,
    ranking,
    top_k,
)
from ftlib.ctsft.evaluation import Questions, is_right
from ftlib.ctsft.heads import Head
from ftlib.ctsft.tasks import Encoded
from ftlib.ctsft.tuning import Recipe, distance, tune, weights_of
from ftlib.outcomes import Booleans, outcome_metrics
from ftlib.results import PACKED_PREFIX, Metric
from ftlib.streams import stream
from ftlib.training import TrainingSettings

Metrics = Mapping[str, Metric | float]

_WHOLE = ("all", "blocks", "norms")  # trained without a choice of heads

# --- tuning -----------------------------------------------------------------------


class Look(NamedTuple):
    """What was measured after some steps.

    Attributes:
        step: how many.
        right: whether each question was answered rightly, by test.
        distance: ‖Δθ‖.
    """

    step: int
    right: Mapping[str, Booleans]
    distance: float

    def accuracy(self, test: str) -> Metric:
        """The share of a test's questions that were answered rightly."""
        return Metric(float(self.right[test].mean()), len(self.right[test]))

    def metrics(self) -> dict[str, Metric | float]:
        """All accuracies, and the distance."""
        accuracies = {test: self.accuracy(test) for test in self.right}
        return {**accuracies, "distance": self.distance}


class Tuned(NamedTuple):
    """A tuned checkpoint.

    Attributes:
        model: the checkpoint, with adapters in it if there are any.
        trained: number of weights that were trained.
        heads: whose weights were among them; for LoRA those that set its budget.
        looks: what was measured on the way.
    """

    model: Any
    trained: int
    heads: list[Head]
    looks: list[Look]

    def metrics(self) -> Metrics:
        """Return what is recorded of a checkpoint, one of whose tests is validation.

        Returns:
            Accuracies of the last look, with the outcome of each question but those of
            validation, and ``distance``; the same with ``best`` of the look that was
            best on validation, the first among equals; curves of all; and how many
            weights and heads were trained.
        """
        best = max(self.looks, key=lambda look: look.accuracy("validation").value)
        last = self.looks[-1]
        found = {
            **last.metrics(),
            **{f"best {name}": value for name, value in best.metrics().items()},
            "best step": float(best.step),
            **{
                f"{PACKED_PREFIX}curve/{name}/{look.step}": value
                for look in self.looks
                for name, value in look.metrics().items()
            },
            "trained": float(self.trained),
            "heads": float(len(self.heads)),
        }
        for test, right in last.right.items():
            if test != "validation":
                found |= outcome_metrics(test, right)
        return found


def tune_watched(
    model: Any,
    recipe: Recipe | None,
    heads: list[Head],
    examples: Sequence[Encoded],
    token_ids: Tensor,
    settings: TrainingSettings,
    tests: Mapping[str, Questions],
    looks: int,
    label: str,
) -> Tuned:
    """Tune a model in place, and ask it questions before, on the way and at the end.

    Args:
        model: the checkpoint.
        recipe: which weights are trained; ``None`` leaves it as it is.
        heads: as for :func:`ftlib.ctsft.tuning.tune`.
        examples: to train on.
        token_ids: the token of each label, int64 (C,).
        settings: of the training.
        tests: what is asked, by name.
        looks: how many times on the way, evenly; divides the steps.
        label: of the progress bar.
    """
    start, seen = weights_of(model), []

    def look(step: int) -> None:
        if step % (settings.steps // looks) == 0:
            right = {name: is_right(model, test) for name, test in tests.items()}
            seen.append(Look(step, right, distance(model, start)))

    look(0)
    if recipe is None:
        return Tuned(model, 0, [], seen)
    trained = tune(
        model, recipe, heads, examples, token_ids, settings, watch=look, label=label
    )
    return Tuned(model, trained, heads, seen)


def heads_to_train(
    recipe: Recipe | None, find_circuit: Callable[[], Circuit], seed: int
) -> list[Head]:
    """Return the heads of a recipe, as many in every arm that trains heads.

    LoRA gets the circuit, which sets its budget.

    Args:
        recipe: which heads are trained, or other weights; ``None`` trains none.
        find_circuit: only called where the recipe is one of heads.
        seed: of random heads.
    """
    if recipe is None or recipe.weights in _WHOLE:
        return []
    circuit = find_circuit()
    if recipe.weights == "near zero":
        return near_zero(circuit.scores, circuit.size)
    if recipe.weights == "random":
        return random_heads(circuit.scores, circuit.size, stream(seed, "random heads"))
    return circuit.heads


# --- the circuit ------------------------------------------------------------------


def discovery_metrics(
    model: Any,
    by: Evidence,
    circuit: Circuit,
    sizes: Sequence[int],
    draws: int,
    seed: int,
) -> Metrics:
    """Say how good the scores and the circuit of a checkpoint are.

    Args:
        model: the checkpoint.
        by: what the circuit was found and is judged by.
        circuit: found in it by the rules OURS.
        sizes: of circuits to compare.
        draws: random circuits of each size.
        seed: of these.

    Returns:
        The number of ``heads`` in the circuit; for the rules of both names
        ``correlation`` and ``rank correlation`` of the scores with real ablation; for
        circuits of that number of heads, how ``faithful`` the best by each map are, and
        ``random`` ones on average, with the share of those that ours have ``beaten``;
        the maps, and curves of faithfulness over sizes.
    """
    batches, tokens = by.found
    effects = ablation_effects(model, batches, circuit.means, tokens)
    published = scores(model, batches, circuit.means, tokens, rules=PUBLISHED)
    maps = {
        "ours": circuit.scores.cpu(),
        "published": published.cpu(),
        "ablation": effects.view_as(circuit.scores),
    }
    metrics = {"heads": float(circuit.size)}
    for name in ("ours", "published"):
        metrics[f"correlation {name}"] = correlation(maps[name], effects)
        metrics[f"rank correlation {name}"] = rank_correlation(maps[name], effects)
    faithful = _faithfulness_metrics(
        model, by.judged, circuit, maps, sizes, draws, seed
    )
    return {**metrics, **_packed(maps), **faithful}


def _faithfulness_metrics(
    model: Any,
    judged: Questions,
    circuit: Circuit,
    maps: Mapping[str, Tensor],
    sizes: Sequence[int],
    draws: int,
    seed: int,
) -> Metrics:
    means, at = circuit.means, list(sizes).index(circuit.size)
    curves = {
        name: faithfulness_curve(model, judged, means, ranking(values), sizes)
        for name, values in maps.items()
    }
    seeds = [stream(seed, f"circuit {n}") for n in range(draws)]
    drawn = random_curves(model, judged, means, sizes, seeds)
    by_chance = np.array(drawn)[:, at]
    curves |= {f"random {n}": curve for n, curve in enumerate(drawn)}
    return {
        **{f"faithful {name}": curves[name][at] for name in maps},
        "faithful random": float(by_chance.mean()),
        "beaten": float((by_chance < curves["ours"][at]).mean()),
        **{
            f"{PACKED_PREFIX}faithful/{name}/{size}": value
            for name, curve in curves.items()
            for size, value in zip(sizes, curve, strict=True)
        },
    }


def overlap_metrics(
    circuit: Circuit, others: Mapping[str, tuple[Any, Evidence]]
) -> Metrics:
    """Say whether a circuit is also the one of other texts, or of other models.

    Args:
        circuit: of the source language, in the checkpoint.
        others: models of the same shape, and what to find circuits of them by.

    Returns:
        By name, the ``jaccard`` index and ``rank correlation`` of the circuit and its
        scores with those found there, as many heads; how ``faithful`` the circuit is
        there; and the maps.
    """
    metrics: dict[str, float] = {}
    maps: dict[str, Tensor] = {}
    for name, (model, by) in others.items():
        batches, tokens = by.found
        means = head_means(model, batches, classes=len(tokens))
        maps[name] = scores(model, batches, means, tokens).cpu()
        own = top_k(maps[name], circuit.size)
        metrics |= {
            f"jaccard {name}": jaccard(circuit.heads, own),
            f"rank correlation {name}": rank_correlation(
                circuit.scores.cpu(), maps[name]
            ),
            f"faithful {name}": faithfulness(
                model, circuit.heads, by.judged.batches, means, tokens
            ),
        }
    return {**metrics, **_packed(maps)}


def _packed(maps: Mapping[str, Tensor]) -> dict[str, float]:
    """Put maps into numbers of a record, by layer and head."""
    return {
        f"{PACKED_PREFIX}map/{name}/{layer}/{index}": value
        for name, values in maps.items()
        for layer, row in enumerate(values.tolist())
        for index, value in enumerate(row)
    }
