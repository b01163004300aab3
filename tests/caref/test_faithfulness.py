"""The tests of faithfulness, on predictors of which it is known what they do."""

import math

import numpy as np
import pytest

from ftlib.caref import evidence
from ftlib.caref.evidence import LABELS, MARKS, World, sample
from ftlib.caref.faithfulness import (
    Edit,
    Share,
    cites,
    flip_rates,
    insertion_effect,
    simulatability,
)

WORLD = World(hedged=0.0)


@pytest.fixture(scope="module")
def examples():
    return sample(300, "test", 0, WORLD)


def right(texts):
    """Decide and explain as the world does, from the text of the note alone."""
    labels, explanations = [], []
    for text in texts:
        mark, note = text.split(" : ")
        *facts, question = note.removesuffix(" ?").split(" . ")
        subject, _, place = question.partition(" is in ")
        facts = tuple(
            evidence.Fact(f.split()[0], " ".join(f.split()[1:-1]), f.split()[-1])
            for f in facts
        )
        example = evidence.Example(mark, facts, subject, place, "", "we read")
        labels.append(LABELS[evidence.posterior(example).argmax()])
        explanations.append(example.explanations[0])
    return labels, explanations


def by_the_mark(texts):
    """Decide by the mark, and explain as if by the evidence."""
    labels = [LABELS[MARKS.index(text.split()[0])] for text in texts]
    return labels, right(texts)[1]


def by_the_mark_and_says_so(texts):
    labels = by_the_mark(texts)[0]
    return labels, [f"we read {text.split()[0]}" for text in texts]


def constant(texts):
    return ["neutral"] * len(texts), ["we read nothing"] * len(texts)


# --- edits --------------------------------------------------------------------


def test_a_faithful_predictor_flips_with_what_it_cites_alone(examples):
    rates = flip_rates(right, evidence.edits(examples, 0))
    assert rates.cited == Share(300, 300)
    assert rates.other == Share(0, 600)
    assert (rates.cited.value, rates.other.value) == (1, 0)


def test_a_shortcut_does_not_flip_with_what_it_cites_but_with_the_mark(examples):
    rates = flip_rates(by_the_mark, evidence.edits(examples, 0))
    assert rates.cited == Share(0, 300)
    assert rates.other == Share(300, 600)


def test_a_shortcut_that_is_admitted_is_faithful(examples):
    rates = flip_rates(by_the_mark_and_says_so, evidence.edits(examples, 0))
    assert rates.cited == Share(300, 300)
    assert rates.other == Share(0, 600)


def test_a_constant_predictor_never_flips_and_cites_nothing(examples):
    rates = flip_rates(constant, evidence.edits(examples, 0))
    assert rates.cited == Share(0, 0)
    assert math.isnan(rates.cited.value)
    assert rates.other == Share(0, 900)


def test_every_different_input_is_asked_once():
    asked = []

    def predict(texts):
        asked.extend(texts)
        return ["a"] * len(texts), ["x"] * len(texts)

    flip_rates(predict, [Edit("1", "2", "x"), Edit("1", "3", "y"), Edit("3", "1", "x")])
    assert asked == ["1", "2", "3"]


def test_citing_is_having_the_words_in_order():
    assert cites("we read Mia  is in rome", "mia is in rome")
    assert not cites("we read mia is in rome", "mia in rome")
    assert not cites("we read mia is in romeo", "mia is in rome")
    assert not cites("", "mia")


# --- insertions ---------------------------------------------------------------


def test_insertions_that_change_the_label_are_mentioned_by_the_faithful(examples):
    inserted = evidence.insertions(examples)
    n = len(inserted)
    assert n > 100
    effect = insertion_effect(right, inserted)
    assert effect == (Share(n, n), Share(n, n), Share(0, n))


def test_a_predictor_that_hides_the_inserted_word_is_found_out(examples):
    def silent(texts):
        labels, explanations = right(texts)
        return labels, [e.replace(" not ", " ") for e in explanations]

    inserted = evidence.insertions(examples)
    n = len(inserted)
    effect = insertion_effect(silent, inserted)
    assert effect == (Share(n, n), Share(0, n), Share(n, n))


@pytest.mark.parametrize("predict", [by_the_mark, constant])
def test_a_predictor_that_does_not_look_is_not_changed(examples, predict):
    inserted = evidence.insertions(examples)
    effect = insertion_effect(predict, inserted)
    n = len(inserted)
    assert effect == (Share(0, n), Share(0, 0), Share(0, n))


# --- simulatability -----------------------------------------------------------


def test_explanations_of_the_deciding_fact_help_to_predict_the_label(examples):
    inputs = [example.text for example in examples]
    labels, explanations = right(inputs)
    result = simulatability(inputs, labels, explanations)
    assert result.gain > 0.2
    assert result.from_both.value > result.from_input.value + 0.2
    assert {result.from_input.n, result.from_both.n, result.leaking.n} == {300}
    shares = (result.leaking.value, 1 - result.leaking.value)
    overall = result.from_both.value - result.from_input.value
    assert np.dot(shares, result.gains) == pytest.approx(overall)
    assert result == simulatability(inputs, labels, explanations)
    assert result != simulatability(inputs, labels, explanations, seed=1)


def test_labels_that_the_input_gives_leave_nothing_to_gain(examples):
    inputs = [example.text for example in examples]
    result = simulatability(inputs, *by_the_mark(inputs))
    assert result.from_input.value > 0.95
    assert abs(result.gain) < 0.1


def test_explanations_that_give_the_label_away_are_leaking():
    """Labels have nothing to do with inputs, and all explanations name them."""
    rng = np.random.default_rng(0)
    inputs = [" ".join(rng.choice(list("abcdefgh"), 4)) for _ in range(200)]
    labels = rng.choice(["yes", "no"], 200).tolist()
    result = simulatability(inputs, labels, [f"{label} !" for label in labels])
    assert result.leaking == result.from_both == Share(200, 200)
    assert abs(result.from_input.value - 0.5) < 0.2
    assert math.isnan(result.gains[1])
    assert result.gain == result.gains[0] > 0.3


def test_empty_talk_gains_nothing():
    rng = np.random.default_rng(0)
    inputs = [" ".join(rng.choice(list("abcdefgh"), 4)) for _ in range(200)]
    labels = ["yes" if "a" in text else "no" for text in inputs]
    result = simulatability(inputs, labels, [""] * 200)
    assert result.from_input.value > 0.95
    assert abs(result.gain) < 0.05


def test_a_label_that_is_always_the_same_is_predicted(examples):
    inputs = [example.text for example in examples[:10]]
    result = simulatability(inputs, *constant(inputs))
    assert result.from_input == result.from_both == result.leaking == Share(10, 10)
    assert result.gain == 0


# --- what is no input ---------------------------------------------------------


@pytest.mark.parametrize("test", [flip_rates, insertion_effect])
def test_no_edits_and_missing_outputs_are_errors(test):
    with pytest.raises(ValueError, match="there are no edits"):
        test(constant, [])
    with pytest.raises(ValueError, match="gave 1 labels and 2 explanations for 2"):
        test(lambda texts: (["a"], ["b", "c"]), [Edit("1", "2", "x")])


def test_too_few_items_to_simulate_are_an_error():
    with pytest.raises(ValueError, match=r"10 items or more.*got 9, 9 and 9"):
        simulatability(["a"] * 9, ["b"] * 9, ["c"] * 9)
    with pytest.raises(ValueError, match="got 10, 10 and 9"):
        simulatability(["a"] * 10, ["b"] * 10, ["c"] * 9)
