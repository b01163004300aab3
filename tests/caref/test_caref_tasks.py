"""FEB's formats, word for word on made-up rows, and on the real data where it is."""

from collections import Counter

import pytest

from ftlib import data
from ftlib.caref import tasks
from ftlib.caref.tasks import TASKS, Item, Output, few_shot, read

REAL = ("esnli", "comve", "cose")


def real(task, seed, **sizes):
    where = next(row.where for row in data.catalogue() if row.name == task)
    if where == "not here":
        pytest.skip(f"{task} is not here")
    return few_shot(task, seed, **sizes)


# --- formats ------------------------------------------------------------------


def test_esnli_is_asked_in_febs_words(monkeypatch):
    rows = {
        "dev": {
            "premise": "A dog  runs .",
            "hypothesis": "It moves .",
            "label": "entailment",
            "explanations": ["Running is  moving .", "b", "c"],
        }
    }
    monkeypatch.setattr(tasks, "esnli", lambda split: [rows[split]])
    (item,) = TASKS["esnli"].items("train")
    assert item == Item(
        "explain nli hypothesis: It moves . premise: A dog runs .",
        "entailment",
        ("running is moving .", "b", "c"),
    )
    assert item.target == "entailment because running is moving ."


def test_comve_is_asked_in_febs_words_in_either_order(monkeypatch):
    rows = [
        {"sense": f"He ate {n} eggs.", "nonsense": f"He ate {n} cars.", "reasons": [r]}
        for n, r in enumerate(["Cars are hard.", "x", "y", "z", "u", "v"])
    ]
    monkeypatch.setattr(tasks, "comve", lambda split: rows if split == "dev" else [])
    items = TASKS["comve"].items("evaluation")
    assert items == TASKS["comve"].items("evaluation")
    assert {item.label for item in items} == {"choice1", "choice2"}
    for n, item in enumerate(items):
        choices = [f"he ate {n} eggs.", f"he ate {n} cars."]
        if item.label == "choice1":
            choices.reverse()
        assert item.prompt == (
            "explain what is more nonsensical? \\n "
            f"choice1: {choices[0]} choice2: {choices[1]}"
        )
    assert items[0].explanations == ("cars are hard.",)


def test_pairs_without_a_difference_are_left_out(monkeypatch):
    rows = [{"sense": "He ate.", "nonsense": "he ate.", "reasons": ["x"]}]
    monkeypatch.setattr(tasks, "comve", lambda split: rows)
    assert TASKS["comve"].items("train") == []


@pytest.mark.parametrize("task", ["cose", "ecqa"])
def test_questions_are_asked_in_febs_words(monkeypatch, task):
    row = {
        "question": "Where do Cats sleep?",
        "choices": ["Bed", "the Moon", "sea"],
        "answer": "Bed",
        "explanation": "Cats like\nBeds",
    }
    monkeypatch.setattr(tasks, task, lambda *split: [row])
    (item,) = TASKS[task].items("evaluation")
    assert item == Item(
        "explain where do cats sleep? \\n (A) bed (B) the moon (C) sea",
        "bed",
        ("cats like beds",),
    )
    assert item.target == "bed because cats like beds"


# --- reading ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label", "explanation"),
    [
        ("neutral because not all dogs run", "neutral", "not all dogs run"),
        ("  Choice1   because it is ", "Choice1", "it is"),
        ("entailment", "entailment", "UNK"),
        ("", "", "UNK"),
        ("because a dog", "", "a dog"),
        ("neutral because", "neutral", ""),
        ("bed because cats sleep because of it", "bed", "cats sleep"),
    ],
)
def test_outputs_are_taken_apart_as_in_feb(text, label, explanation):
    assert read(text) == Output(label, explanation)


def test_targets_are_read_back():
    item = Item("?", "choice1", ("a car is no egg",))
    assert read(item.target) == Output("choice1", "a car is no egg")


# --- samples ------------------------------------------------------------------


@pytest.mark.parametrize("task", REAL)
def test_real_samples_have_febs_sizes_and_balance(task):
    train, evaluation = real(task, seed=0)
    assert len(train) == 48
    assert len(evaluation) == (348 if task == "esnli" else 350)
    for part, items in (("train", train), ("evaluation", evaluation)):
        labels = Counter(item.label for item in items)
        if TASKS[task].labels:
            assert set(labels) == set(TASKS[task].labels)
            assert len(set(labels.values())) == 1
        for item in items:
            assert item.prompt.startswith("explain ")
            assert all(item.explanations)
            assert item.explanations == tuple(e.lower() for e in item.explanations)
            if part == "train":
                assert len(item.explanations) == 1
    assert not {i.prompt for i in train} & {i.prompt for i in evaluation}


@pytest.mark.parametrize("task", REAL)
def test_a_seed_is_a_sample(task):
    first, again, other = (real(task, seed, evaluation=30) for seed in (1, 1, 2))
    assert first == again
    shared = {i.prompt for i in first.train} & {i.prompt for i in other.train}
    assert len(shared) < 10


def test_labels_are_shuffled_and_every_explanation_is_shown_by_some_seed(monkeypatch):
    rows = [
        {
            "premise": str(n),
            "hypothesis": "h",
            "label": label,
            "explanations": ["a", "b"],
        }
        for n in range(20)
        for label in TASKS["esnli"].labels
    ]
    monkeypatch.setattr(tasks, "esnli", lambda split: rows)
    train, evaluation = few_shot("esnli", 0, shots=30, evaluation=61)
    assert len(evaluation) == 60
    assert len({item[:2] for item in evaluation}) == 60
    assert len({item.label for item in evaluation[:20]}) == 3
    assert {item.explanations for item in train} == {("a",), ("b",)}
    assert {item.explanations for item in evaluation} == {("a", "b")}
    with pytest.raises(ValueError, match="asked for 21 items of a kind, found 20"):
        few_shot("esnli", 0, shots=63)


def test_tasks_that_are_not_to_be_had():
    with pytest.raises(ValueError, match="no task 'sbic': choose one of esnli, comve"):
        few_shot("sbic", 0)
    with pytest.raises(data.DataUnavailable, match="dair-iitd/ECQA-Dataset"):
        few_shot("ecqa", 0)
