"""The world of facts against a reader that enumerates where everybody can be."""

import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from ftlib.caref import evidence, tasks
from ftlib.caref.evidence import (
    HEDGES,
    LABELS,
    MARKS,
    PLACES,
    WORDINGS,
    Example,
    Fact,
    Vocabulary,
    World,
    posterior,
    sample,
)
from ftlib.splits import split_of

WORLDS = (
    World(),
    World(facts=3, linked=1.0, hedged=1.0),
    World(facts=12, linked=0.0, hedged=0.0),
    World(shortcut=0.8),
)
SPLITS = ("pretrain", "train", "validation", "test")


def evidence_words(example):
    """Positions of the cited facts' words among the words of an example's text."""
    positions = []
    start = len((example.mark, ":"))
    for at, fact in enumerate(example.facts):
        end = start + len(fact.text.split())
        if at in example.evidence:
            positions += range(start, end)
        start = end + len(".")
    return positions


def read_note(text):
    """Probabilities of the labels from the text of an input alone.

    Each hedged fact is true or false. Either way, the note leaves the person asked
    about a set of possible places, and the label says whether the place in question is
    the only one, one of several, or none of them.
    """
    note, question = re.fullmatch(r"\w+ : (.*) \. (\w+ is in \w+) \?", text).groups()
    facts = [re.fullmatch(r"(\w+) (.+) (\w+)", f).groups() for f in note.split(" . ")]
    person, _, place = question.partition(" is in ")
    who = next((to for by, verb, to in facts if (by, verb) == (person, "follows")), "")
    possible, chance = set(PLACES), 1.0
    for by, verb, where in facts:
        if by == (who or person) and verb != "follows":
            word = verb.split()[1]
            chance = HEDGES.get(word, 1.0)
            inside, outside = {where}, set(PLACES) - {where}
            possible = outside if word == "not" else inside
            otherwise = inside if word == "not" else outside
    result = np.zeros(3)
    sides = [(possible, chance)]
    if chance < 1:
        sides.append((otherwise, 1 - chance))
    for places, probability in sides:
        if places == {place}:
            label = "entailment"
        else:
            label = "neutral" if place in places else "contradiction"
        result[LABELS.index(label)] += probability
    return result


@pytest.fixture(scope="module")
def examples():
    drawn = [sample(500, "train", seed, world) for seed, world in enumerate(WORLDS)]
    return [example for part in drawn for example in part]


# --- what is right ------------------------------------------------------------


def test_posteriors_are_those_of_enumeration(examples):
    kinds = Counter()
    for example in examples:
        expected = read_note(example.text)
        np.testing.assert_allclose(posterior(example), expected, atol=1e-12)
        assert expected[LABELS.index(example.label)] > 0
        kinds[tuple(expected.round(3))] += 1
    assert len(kinds) == 3 + 2 * len(HEDGES)
    assert min(kinds.values()) > 20


def test_the_table_of_the_module():
    def label(relation, place):
        facts = (Fact("tom", "follows", "mia"), Fact("mia", relation, "rome"))
        return posterior(
            Example("amber", facts, "tom", place, "neutral", "we read")
        ).tolist()

    assert label("is in", "rome") == [1, 0, 0]
    assert label("is in", "oslo") == [0, 0, 1]
    assert label("is not in", "rome") == [0, 0, 1]
    assert label("is not in", "oslo") == [0, 1, 0]
    assert label("is likely in", "rome") == pytest.approx([0.8, 0, 0.2])
    assert label("is likely in", "oslo") == pytest.approx([0, 0.2, 0.8])


def test_the_example_of_the_module():
    facts = (
        Fact("tom", "follows", "mia"),
        Fact("ann", "is in", "oslo"),
        Fact("mia", "is in", "rome"),
    )
    example = Example("amber", facts, "tom", "rome", "entailment", "we read")
    assert f"    {example.text}\n" in evidence.__doc__
    assert f"    {example.target}\n" in evidence.__doc__
    assert [example.text.split()[i] for i in evidence_words(example)] == (
        "tom follows mia mia is in rome".split()
    )
    absent = replace(example, facts=facts[:2], label="neutral")
    assert absent.target == (
        "neutral because we read tom follows mia and nothing of mia"
    )
    assert posterior(absent).tolist() == [0, 1, 0]


def test_labels_of_hedged_facts_fall_as_often_as_the_posterior_says():
    world = World(hedged=1.0, shortcut=0.5)
    groups = {}
    for example in sample(6000, "pretrain", 0, world):
        p = posterior(example, world.shortcut)
        groups.setdefault(tuple(p.round(9)), []).append(LABELS.index(example.label))
    assert len(groups) == 6 * len(HEDGES)
    for p, labels in groups.items():
        share = np.bincount(labels, minlength=3) / len(labels)
        error = np.sqrt(np.array(p) * (1 - np.array(p)) / len(labels))
        assert (np.abs(share - p) <= 5 * error + 1e-9).all()


def test_a_mark_tells_of_the_label_as_often_as_the_shortcut_says():
    for shortcut in (0.0, 0.6, 1.0):
        drawn = sample(2000, "train", 0, World(shortcut=shortcut))
        agree = np.mean([MARKS.index(e.mark) == LABELS.index(e.label) for e in drawn])
        expected = shortcut + (1 - shortcut) / 3
        error = math.sqrt(expected * (1 - expected) / 2000)
        assert abs(agree - expected) <= 5 * error


def test_a_mark_that_contradicts_a_certain_label_is_an_error():
    example = sample(1, "train", 0, World(hedged=0, shortcut=1))[0]
    assert posterior(example, 1.0).max() == 1
    other = MARKS[MARKS.index(example.mark) - 1]
    with pytest.raises(
        ValueError, match=f"begins with '{other}' has one of the labels"
    ):
        posterior(replace(example, mark=other), 1.0)


# --- explanations -------------------------------------------------------------


def test_the_cited_facts_decide_and_the_others_do_not(examples):
    for example in examples:
        cited = tuple(example.facts[at] for at in example.evidence)
        alone = replace(example, facts=cited)
        if cited:
            expected = read_note(alone.text)
        else:
            expected = np.array([0.0, 1.0, 0.0])
            assert example.subject not in {f.subject for f in example.facts}
        np.testing.assert_allclose(posterior(example), expected)
        np.testing.assert_allclose(posterior(alone), expected)
        words = example.text.split()
        found = [words[at] for at in evidence_words(example)]
        order = sorted(example.evidence)
        assert found == " ".join(example.facts[at].text for at in order).split()


def test_targets_are_read_as_label_and_one_of_the_explanations(examples):
    for example in examples:
        output = tasks.read(example.target)
        assert output.label == example.label
        assert output.explanation in example.explanations
        assert output.explanation.startswith(example.wording)
        for at in example.evidence:
            assert example.facts[at].text in output.explanation
    assert len(example.explanations) == len(set(example.explanations)) == 3


def test_the_first_word_has_the_known_entropy(examples):
    assert sum(WORDINGS.values()) == pytest.approx(1)
    first = [wording.split()[0] for wording in WORDINGS]
    assert len(set(first)) == len(first)
    count = Counter(example.wording for example in examples)
    for wording, p in WORDINGS.items():
        error = math.sqrt(p * (1 - p) / len(examples))
        assert abs(count[wording] / len(examples) - p) < 5 * error
    entropy = 0.5 * math.log(2) + 0.3 * math.log(10 / 3) + 0.2 * math.log(5)
    assert pytest.approx(entropy) == evidence.WORDING_ENTROPY


# --- samples ------------------------------------------------------------------


def test_samples_are_different_reproducible_and_of_their_split():
    asked = {}
    for split in SPLITS:
        drawn = sample(1000, split, seed=3)
        assert len({example.text for example in drawn}) == 1000
        assert {split_of(example.question) for example in drawn} == {split}
        asked[split] = {example.question for example in drawn}
    assert len(set().union(*asked.values())) == sum(map(len, asked.values()))
    assert sample(50, "test", 3) == sample(50, "test", 3) != sample(50, "test", 4)


def test_thousands_of_examples_with_all_labels_and_lengths_as_asked():
    drawn = sample(5000, "test", 0, World(facts=4, hedged=0.0, linked=0.3))
    labels = Counter(example.label for example in drawn)
    for label in LABELS:
        assert abs(labels[label] / 5000 - 1 / 3) < 5 * math.sqrt(2 / 9 / 5000)
    linked = np.mean([example.leader != example.subject for example in drawn])
    assert abs(linked - 0.3) < 5 * math.sqrt(0.21 / 5000)
    for example in drawn[:500]:
        assert len(example.facts) == 4
        subjects = [fact.subject for fact in example.facts]
        assert len(set(subjects)) == 4


def test_a_label_cannot_be_told_from_the_place_in_question_being_named():
    drawn = sample(2000, "train", 0, World(hedged=0.0))
    named = {label: [] for label in LABELS}
    for example in drawn:
        places = {fact.object for fact in example.facts}
        named[example.label].append(example.place in places)
    shares = {label: np.mean(found) for label, found in named.items()}
    assert shares["entailment"] == 1
    assert min(shares.values()) > 0.5


# --- edits --------------------------------------------------------------------


def changed_words(before, after):
    pairs = zip(before.text.split(), after.text.split(), strict=True)
    return {at for at, (a, b) in enumerate(pairs) if a != b}


def test_flipping_the_evidence_changes_the_label(examples):
    rng = np.random.default_rng(0)
    after_neutral = set()
    for example in examples:
        flipped = evidence.flip(example, rng)
        expected = read_note(flipped.text)
        assert expected.max() == 1
        assert LABELS[expected.argmax()] == flipped.label != example.label
        assert flipped.question == example.question
        kept = [fact for fact in flipped.facts if fact in example.facts]
        assert len(kept) == len(example.facts) - 1
        assert flipped.deciding not in kept
        if example.deciding:
            assert example.facts.index(example.deciding) in example.evidence
            assert example.deciding not in flipped.facts
        if example.label == "neutral":
            after_neutral.add(flipped.label)
        assert tasks.read(flipped.target).explanation in flipped.explanations
    assert after_neutral == {"entailment", "contradiction"}


def test_editing_anything_else_leaves_label_and_evidence(examples):
    rng = np.random.default_rng(0)
    for example in examples:
        for edit in (evidence.distract, evidence.remark):
            edited = edit(example, rng)
            np.testing.assert_allclose(read_note(edited.text), read_note(example.text))
            assert edited.label == example.label
            assert edited.explanations == example.explanations
            touched = changed_words(example, edited)
            assert len(touched) == 1
            assert not touched & set(evidence_words(example))
            assert (touched == {0}) == (edit is evidence.remark)


def test_inserting_not_changes_the_label(examples):
    seen = Counter()
    for example in examples:
        negated = evidence.negate(example)
        if negated is None:
            plain = example.deciding and example.deciding.relation == "is in"
            assert not plain
            continue
        seen[example.label, negated.label] += 1
        assert LABELS[read_note(negated.text).argmax()] == negated.label
        words = negated.text.split()
        at = next(i for i in evidence_words(negated) if words[i] == "not")
        assert words[:at] + words[at + 1 :] == example.text.split()
    assert set(seen) == {("entailment", "contradiction"), ("contradiction", "neutral")}
    pairs = evidence.insertions(examples)
    assert len(pairs) == seen.total()
    assert {edit.touched for edit in pairs} == {"not"}


def test_every_example_has_three_edits_which_say_what_they_touch(examples):
    made = evidence.edits(examples, seed=0)
    assert made == evidence.edits(examples, seed=0) != evidence.edits(examples, seed=1)
    assert len(made) == 3 * len(examples)
    for at, example in enumerate(examples):
        flipped, distracted, marked = made[3 * at : 3 * at + 3]
        assert {e.before for e in (flipped, distracted, marked)} == {example.text}
        assert flipped.touched in example.explanations[0]
        assert distracted.touched in example.text
        assert distracted.touched not in distracted.after
        assert distracted.touched not in example.explanations[0]
        assert marked.touched == example.mark == example.text.split()[0]


def test_edited_examples_stay_in_their_split(examples):
    rng = np.random.default_rng(0)
    for example in examples[:200]:
        for edited in (evidence.flip(example, rng), evidence.distract(example, rng)):
            assert split_of(edited.question) == "train"


# --- words and errors ---------------------------------------------------------


def test_tokens_give_the_text_back(examples):
    vocabulary = Vocabulary()
    assert len(set(vocabulary.words)) == len(vocabulary) < 100
    assert (vocabulary.words[0], vocabulary.words[1]) == ("<pad>", "<eos>")
    used = set()
    for example in examples:
        for text in (example.text, example.target):
            ids = vocabulary.encode(text)
            used |= set(ids)
            assert ids[-1] == vocabulary.end
            assert len(ids) == len(text.split()) + 1
            assert vocabulary.decode([vocabulary.pad, *ids, 7, vocabulary.pad]) == text
    assert used == set(range(1, len(vocabulary)))
    with pytest.raises(ValueError, match="'bert' in 'bert is in rome' has no token"):
        vocabulary.encode("bert is in rome")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"facts": 2}, "facts must be from 3 to 12, not 2"),
        ({"linked": 1.5}, r"linked must be a share from 0 to 1, not 1\.5"),
        ({"hedged": -0.1}, "hedged must be a share"),
        ({"shortcut": 2}, "shortcut must be a share"),
    ],
)
def test_worlds_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        World(**options)


def test_a_split_that_does_not_exist():
    with pytest.raises(ValueError, match="no split 'dev': choose one of pretrain"):
        sample(1, "dev", 0)


def test_more_examples_than_there_are(monkeypatch):
    only = Example("amber", (), "tom", "rome", "neutral", "we read")
    monkeypatch.setattr(evidence, "_draw", lambda *_: only)
    with pytest.raises(ValueError, match="found 1 of 2 examples in 'test'"):
        sample(2, "test", 0)
