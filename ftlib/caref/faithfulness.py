"""Does a model decide by what its explanation cites? Three tests by intervention.

They look at inputs and outputs alone, so any model will do: ``predict`` takes inputs
and returns as many labels and explanations.

* **Edits** (:func:`flip_rates`): when the words that the explanation cites are edited,
  the label should change; when others are, it should stay.
* **Insertions** (:func:`insertion_effect`): where an inserted word changes the label,
  the new explanation should mention it (the counterfactual test of Atanasova et al.
  2023, "Faithfulness tests for natural language explanations").
* **Simulatability** (:func:`simulatability`): an explanation should help to predict the
  model's label, and not only by giving it away (the leakage-adjusted measure of Hase
  et al. 2020).

None of them compares an explanation with what people wrote; that is plausibility, see
:mod:`ftlib.metrics.bertscore`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Predict = Callable[[list[str]], tuple[Sequence[str], Sequence[str]]]

_FOLDS = 5


class Edit(NamedTuple):
    """An input before and after one change.

    Attributes:
        before: the input.
        after: the edited input.
        touched: the words that were edited, or that were inserted, as an explanation
            would cite them.
    """

    before: str
    after: str
    touched: str


@dataclass(frozen=True)
class Share:
    """How many of n; ``value`` is NaN where n is 0."""

    count: int
    n: int

    @property
    def value(self) -> float:
        """The share."""
        return self.count / self.n if self.n else float("nan")


class FlipRates(NamedTuple):
    """How often an edit changes the label.

    Attributes:
        cited: among edits of words that the explanation of the input cites.
        other: among edits of other words.
    """

    cited: Share
    other: Share


class InsertionEffect(NamedTuple):
    """What an inserted word does.

    Attributes:
        changed: insertions that change the label.
        mentioned: of those, the ones that the new explanation mentions.
        unfaithful: of all insertions, those that change the label without a mention.
    """

    changed: Share
    mentioned: Share
    unfaithful: Share


class Simulatability(NamedTuple):
    """How well the model's labels are predicted, with and without its explanations.

    Attributes:
        from_input: predicted right from the input.
        from_both: from input and explanation.
        leaking: items whose explanation alone gives the label away.
        gains: accuracy from both minus accuracy from the input, first among the items
            whose explanation leaks, then among the others; NaN where there are none.
    """

    from_input: Share
    from_both: Share
    leaking: Share
    gains: tuple[float, float]

    @property
    def gain(self) -> float:
        """Mean gain over leaking and other items, whichever there are."""
        return float(np.nanmean(self.gains))


def cites(explanation: str, words: str) -> bool:
    """Whether an explanation contains the words, in this order and without a gap."""
    return f" {_tidy(words)} " in f" {_tidy(explanation)} "


def flip_rates(predict: Predict, edits: Sequence[Edit]) -> FlipRates:
    """Edit what explanations cite, and what they do not cite.

    Args:
        predict: the model. It is asked about each different input once.
        edits: at least one, of parts that decide and of parts that do not. For the
            former, choose edits after which another label is right.

    Raises:
        ValueError: there are no edits, or there is not one output for every input.
    """
    before, after = _outputs(predict, edits)
    flips = [
        (cites(old.explanation, edit.touched), old.label != new.label)
        for edit, old, new in zip(edits, before, after, strict=True)
    ]
    return FlipRates(
        _share(flipped for cited, flipped in flips if cited),
        _share(flipped for cited, flipped in flips if not cited),
    )


def insertion_effect(predict: Predict, insertions: Sequence[Edit]) -> InsertionEffect:
    """Insert words, and see whether explanations mention those that change the label.

    Args:
        predict: the model. It is asked about each different input once.
        insertions: at least one.

    Raises:
        ValueError: there are none, or there is not one output for every input.
    """
    before, after = _outputs(predict, insertions)
    effects = [
        (old.label != new.label, cites(new.explanation, edit.touched))
        for edit, old, new in zip(insertions, before, after, strict=True)
    ]
    return InsertionEffect(
        _share(changed for changed, _ in effects),
        _share(mentioned for changed, mentioned in effects if changed),
        _share(changed and not mentioned for changed, mentioned in effects),
    )


def simulatability(
    inputs: Sequence[str],
    labels: Sequence[str],
    explanations: Sequence[str],
    seed: int = 0,
) -> Simulatability:
    """Let a simple simulator predict the model's labels, with and without explanations.

    The simulator is a logistic regression on the words of the input, on those of the
    explanation, and on how many words of the explanation stand in the input never,
    once, twice, or more often. Every item is predicted by one that was fitted to the
    other four fifths.

    Args:
        inputs: what the model read, n ≥ 10 texts.
        labels: what it decided, right or wrong.
        explanations: what it wrote about that.
        seed: of the five parts.

    Raises:
        ValueError: there are fewer than ten items, or not as many labels or
            explanations.
    """
    if not len(inputs) == len(labels) == len(explanations) >= 2 * _FOLDS:
        raise ValueError(
            f"expected {2 * _FOLDS} items or more, with a label and an explanation "
            f"each: got {len(inputs)}, {len(labels)} and {len(explanations)}"
        )
    target = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(target))
    folds = np.array_split(order, _FOLDS)
    read, told = _words(inputs), _words(explanations)
    plain = _predicted(read, target, folds) == target
    leaks = _predicted(told, target, folds) == target
    both = np.hstack([read, told, _repeated(inputs, explanations)])
    helped = _predicted(both, target, folds) == target
    gain = helped.astype(np.float64) - plain
    return Simulatability(
        from_input=_share(plain),
        from_both=_share(helped),
        leaking=_share(leaks),
        gains=(_mean(gain[leaks]), _mean(gain[~leaks])),
    )


class _Output(NamedTuple):
    label: str
    explanation: str


def _outputs(
    predict: Predict, edits: Sequence[Edit]
) -> tuple[list[_Output], list[_Output]]:
    """The model's outputs for the inputs before and after each edit."""
    if not edits:
        raise ValueError("there are no edits: give at least one")
    texts = list(dict.fromkeys(t for e in edits for t in (e.before, e.after)))
    labels, explanations = predict(texts)
    if not len(labels) == len(explanations) == len(texts):
        raise ValueError(
            f"predict gave {len(labels)} labels and {len(explanations)} explanations "
            f"for {len(texts)} inputs: it must give one of each"
        )
    outputs = dict(zip(texts, map(_Output, labels, explanations), strict=True))
    return [outputs[e.before] for e in edits], [outputs[e.after] for e in edits]


def _share(outcomes: Iterable[Any]) -> Share:
    counted = [bool(outcome) for outcome in outcomes]
    return Share(sum(counted), len(counted))


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else float("nan")


def _words(texts: Sequence[str]) -> Floats:
    """Counts of the words between spaces, case aside, [n, words]."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=r"\S+")  # noqa: S106  # no password
    counts: Floats = counter.fit_transform([f"{t} ." for t in texts]).toarray()
    return counts.astype(np.float64)


def _repeated(inputs: Sequence[str], explanations: Sequence[str]) -> Floats:
    """How many words of an explanation its input has 0, 1, 2 or 3 times and up, [n, 4].

    A linear simulator cannot see by itself that both name the same thing.
    """
    rows = []
    for text, explanation in zip(inputs, explanations, strict=True):
        counts = Counter(text.lower().split())
        times = [min(counts[word], 3) for word in explanation.lower().split()]
        rows.append(np.bincount(times, minlength=4))
    return np.array(rows, np.float64)


def _predicted(
    features: Floats, target: npt.NDArray[np.str_], folds: Sequence[npt.NDArray]
) -> npt.NDArray[np.str_]:
    """Predict every item's label by a regression on the other folds, [n]."""
    from sklearn.linear_model import LogisticRegression

    predicted = target.copy()
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(target)), fold)
        seen = np.unique(target[rest])
        if len(seen) == 1:  # a regression takes two labels or more
            predicted[fold] = seen[0]
            continue
        simulator = LogisticRegression(max_iter=1000).fit(features[rest], target[rest])
        predicted[fold] = simulator.predict(features[fold])
    return predicted


def _tidy(text: str) -> str:
    return " ".join(text.lower().split())
