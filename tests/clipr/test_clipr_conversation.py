import itertools
import json
import math
from collections import defaultdict

import numpy as np
import pytest
from clipr_toys import draw, of_materials, option, task

from ftlib.clipr.conversation import (
    Answer,
    Belief,
    History,
    Question,
    dimension_questions,
    mutual_information,
    next_question,
    task_questions,
)
from ftlib.clipr.rules import Vocabulary
from ftlib.clipr.settings import ConversationSettings
from ftlib.clipr.users import SimulatedUser, draw_rules

SETTINGS = ConversationSettings()


def test_questions_about_what_the_options_of_a_family_differ_on():
    examples = [
        task(
            option(material="glass", size="big"), option(material="steel", size="big")
        ),
        task(option(material="steel"), option(material="wood"), family="cups"),
        task(option(size="big"), option(size="small"), family="bowls"),
    ]
    asked = [(q.family, q.dimension, q.values) for q in dimension_questions(examples)]
    assert asked == [
        ("cups", "material", ("glass", "steel", "wood")),
        ("bowls", "size", ("big", "small")),
    ]
    first, *_ = dimension_questions(examples)
    assert first.text == "For cups, which material do you prefer: glass, steel or wood?"
    assert first.choices[1] == {"material": "steel"}
    assert task_questions(examples)[2].values == ("big", "small")
    assert task_questions(examples)[2].choices[0] == {"size": "big"}


def test_a_history_is_added_to_and_written():
    glasses = of_materials("glass", "steel")
    history = (
        History()
        .add(Question.about_dimension("cups", "size", ("s", "b")), Answer("b", "b"))
        .add(Question.about_task(glasses), Answer("All the same.", indifferent=True))
    )
    assert not history.stopped
    assert len(history.answered) == 2
    stopped = history.add(Question("Why?"), None)
    assert stopped.stopped
    assert len(history) == 2
    assert len(stopped.answered) == 2
    assert History.from_json(json.loads(json.dumps(stopped.to_json()))) == stopped
    assert stopped.to_text().endswith("A: All the same.\nQ: Why?\nA: …")


def information_by_hand(pairs):
    """Bits between two things, from weighted pairs, by its definition."""
    joint, first, second = defaultdict(float), defaultdict(float), defaultdict(float)
    for (a, b), weight in pairs:
        joint[a, b] += weight
        first[a] += weight
        second[b] += weight
    return sum(
        p * math.log2(p / (first[a] * second[b])) for (a, b), p in joint.items() if p
    )


def one_hot(labels):
    return np.eye(labels.max() + 1)[labels]


def test_mutual_information_is_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b, c = (rng.integers(0, n, 30) for n in (4, 3, 5))
        weights = rng.random(30)
        both = np.concatenate([one_hot(b), one_hot(c)], axis=1)
        found = mutual_information(one_hot(a), both, weights)
        expected = sum(
            information_by_hand(
                zip(zip(a, x, strict=True), weights / weights.sum(), strict=True)
            )
            for x in (b, c)
        )
        assert found == pytest.approx(expected, abs=1e-12)
    same, even = np.arange(8), np.ones(8)
    assert mutual_information(one_hot(same), one_hot(same), even) == pytest.approx(3)
    half = one_hot(same % 2)
    assert mutual_information(one_hot(same), half, even) == pytest.approx(1)
    assert mutual_information(one_hot(same), one_hot(same * 0), even) == 0


def every_user(examples):
    """All orders of two dimensions' values and of the dimensions, or of one alone."""
    belief = Belief(examples, SETTINGS, utilities=np.zeros((1, 1, 5)))
    users = []
    for materials in itertools.permutations(range(3)):
        for sizes in itertools.permutations(range(2)):
            for scale in ((9, 1), (1, 9), (1, 0), (0, 1)):
                utilities = np.zeros(len(belief.columns))
                for (dimension, _), column in belief.columns.items():
                    same = [c for (d, _), c in belief.columns.items() if d == dimension]
                    rank = same.index(column)
                    utilities[column] = (
                        scale[0] * (materials[rank] + 1)
                        if dimension == "material"
                        else scale[1] * (sizes[rank] + 1)
                    )
                users.append(utilities)
    return belief.columns, users


def taken(columns, user, choices):
    """What a user takes, by enumeration; None if all are worth the same."""
    worth = [sum(user[columns[item]] for item in c.items()) for c in choices]
    return None if len(set(worth)) == 1 else worth.index(max(worth))


def test_expected_information_is_that_of_enumerated_users():
    dimensions = {"material": ("glass", "steel", "wood"), "size": ("big", "small")}
    examples = draw(6, seed=4, families=("cups",), dimensions=dimensions)
    columns, users = every_user(examples)
    belief = Belief(examples, SETTINGS, utilities=np.array(users)[:, None])
    weights = np.full(len(users), 1 / len(users))
    questions = [*dimension_questions(examples), *task_questions(examples)]
    assert len(questions) == 8
    for round_ in range(2):
        for question in questions:
            expected = np.mean(
                [
                    information_by_hand(
                        [
                            (
                                (
                                    taken(columns, user, question.choices),
                                    taken(
                                        columns, user, [o.attributes for o in t.options]
                                    ),
                                ),
                                weight,
                            )
                            for user, weight in zip(users, weights, strict=True)
                        ]
                    )
                    for t in examples
                ]
            )
            assert belief.information(question) == pytest.approx(expected, abs=1e-12)
        if round_ == 0:  # Bayes by hand, then once more
            question = questions[0]
            at = 1
            belief.update(question, Answer("…", question.values[at]))
            for i, user in enumerate(users):
                right = taken(columns, user, question.choices) == at
                weights[i] *= (
                    1 - SETTINGS.error
                    if right
                    else SETTINGS.error / len(question.values)
                )
            weights /= weights.sum()
            np.testing.assert_allclose(belief.weights, weights)


def test_an_answer_that_is_none_of_the_values_changes_nothing():
    examples = [of_materials("glass", "steel")]
    belief = Belief(examples, SETTINGS)
    before = belief.weights.copy()
    belief.update(Question.about_task(examples[0]), Answer("Well, you see.", "gold"))
    np.testing.assert_array_equal(belief.weights, before)


def test_indifference_makes_users_likelier_to_whom_it_does_not_matter():
    examples = [of_materials("glass", "steel")]
    belief = Belief(examples, SETTINGS)
    question = dimension_questions(examples)[0]
    matters = belief.outcomes("cups", question.choices) < 2
    belief.update(question, Answer("Either.", indifferent=True))
    assert belief.weights[matters].sum() < 0.1


def test_users_are_renewed_around_those_who_are_left_and_stay_many():
    examples = draw(30, seed=6, families=("cups", "bowls"))
    settings = ConversationSettings(candidates=1000)
    belief = Belief(examples, settings)
    user = SimulatedUser(draw_rules(Vocabulary.of(examples), 3))
    renewed = 0
    for question in task_questions(examples):
        before = belief.utilities
        belief.update(question, user.answer(question))
        assert belief.weights.sum() == pytest.approx(1)
        assert 1 / np.square(belief.weights).sum() > 50
        renewed += belief.utilities is not before
    assert renewed > 2
    right = 0
    for one in draw(40, seed=7, families=("cups", "bowls")):
        taken = belief.outcomes(one.family, [o.attributes for o in one.options])
        likeliest = np.bincount(taken, belief.weights, len(one.options) + 1)[:-1]
        right += user.right(one, int(likeliest.argmax()))
    assert right >= 28  # chance is 14


def following(examples, questions, history, settings, seed=0):
    belief = Belief(examples, settings, seed)
    belief.hear(history)
    return next_question(belief, questions, history)


def test_a_belief_that_goes_on_is_one_that_hears_all_again():
    examples = draw(12, seed=6)
    user = SimulatedUser(draw_rules(Vocabulary.of(examples), 3))
    going, history = Belief(examples, SETTINGS), History()
    for question in task_questions(examples):
        history = history.add(question, user.answer(question))
        assert going.began(examples, history)
        going.hear(history)
    again = Belief(examples, SETTINGS)
    again.hear(history)
    np.testing.assert_array_equal(going.utilities, again.utilities)
    np.testing.assert_array_equal(going.weights, again.weights)
    assert not going.began(examples, History(history.turns[1:]))
    assert not going.began(examples[1:], history)


def test_the_dimension_that_tells_most_examples_apart_is_asked_about_first():
    examples = [
        task(option(a="1", b="1"), option(a="1", b="2"), id="0"),
        task(option(a="1", b="1"), option(a="2", b="1"), id="1"),
        task(option(a="2", b="2"), option(a="1", b="2"), id="2"),
    ]
    questions = dimension_questions(examples)
    first = following(examples, questions, History(), SETTINGS)
    assert first.dimension == "a"
    history = History().add(first, Answer("1", "1"))
    second = following(examples, questions, history, SETTINGS)
    assert second.dimension == "b"
    history = history.add(second, Answer("1", "1"))
    assert following(examples, questions, history, SETTINGS) is None


def test_nothing_is_asked_that_tells_too_little():
    examples = [of_materials("glass", "steel")]
    questions = [*dimension_questions(examples), *task_questions(examples)]
    history = History().add(questions[0], Answer("steel", "steel"))
    assert following(examples, questions, history, SETTINGS) is not None
    enough = ConversationSettings(enough=0.6)
    assert following(examples, questions, history, enough) is None
    assert following(examples, [], History(), SETTINGS) is None


def test_the_same_seed_asks_the_same():
    examples = draw(8, seed=5)
    questions = task_questions(examples)
    asked = [following(examples, questions, History(), SETTINGS, 1) for _ in "ab"]
    assert asked[0] == asked[1]
