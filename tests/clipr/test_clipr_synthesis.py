import math

import numpy as np
import pytest
from clipr_toys import KNOWN, NEW, of_materials, option, task
from scipy.optimize import minimize

from ftlib.clipr.conversation import Answer, History, Question
from ftlib.clipr.rules import Rule, RuleSet
from ftlib.clipr.settings import SynthesisSettings
from ftlib.clipr.synthesis import (
    Comparison,
    Preferences,
    comparisons,
    counts,
    fit,
    lasso_bradley_terry,
    rounded,
    synthesise,
)

SETTINGS = SynthesisSettings()


def told(*answers, values=("glass", "steel", "plastic"), dimension="material"):
    """A history of (family, preferred value); None for indifference."""
    history = History()
    for family, value in answers:
        answer = Answer("…", value, indifferent=value is None)
        question = Question.about_dimension(family, dimension, values)
        history = history.add(question, answer)
    return history


# --- the model --------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "c"), [(1, 2.0), (3, 1.0), (7, 5.0)])
def test_one_feature_has_a_closed_form(wins, c):
    beta = lasso_bradley_terry(np.ones((wins, 1)), c)
    assert beta[0] == pytest.approx(math.log(c * wins - 1), abs=1e-6)
    assert lasso_bradley_terry(np.ones((1, 1)), 1.9)[0] == 0
    undecided = lasso_bradley_terry(np.array([[1.0], [-1.0]]), c)
    assert undecided[0] == 0


def test_the_fit_is_the_minimum_that_a_general_solver_finds():
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = rng.integers(-1, 2, (25, 8)).astype(float)

        def loss(halves, x=x):
            beta = halves[:8] - halves[8:]
            return halves.sum() + 2 * np.logaddexp(0, -x @ beta).sum()

        bounds = [(0, None)] * 16
        found = minimize(loss, np.full(16, 0.1), bounds=bounds, tol=1e-14)
        beta = lasso_bradley_terry(x, 2.0)
        ours = loss(np.concatenate([beta.clip(0), (-beta).clip(0)]))
        assert ours == pytest.approx(found.fun, abs=1e-6)
        assert ours <= found.fun + 1e-8
        assert (beta == 0).any()


def test_without_rows_or_features_nothing_is_fitted():
    assert lasso_bradley_terry(np.zeros((0, 0)), 1.0).shape == (0,)
    assert fit([], SETTINGS).common == {}


# --- what answers say -------------------------------------------------------------


def test_an_answer_compares_what_is_preferred_with_each_other():
    glass, steel, plastic = ({"material": m} for m in ("glass", "steel", "plastic"))
    assert comparisons(told(("cups", "steel"))) == [
        Comparison("cups", steel, glass),
        Comparison("cups", steel, plastic),
    ]
    either = comparisons(told(("cups", None)))
    assert len(either) == 3
    assert all(c.equal for c in either)
    assert comparisons(told(("cups", "gold"))) == []
    assert comparisons(History().add(Question("What?"), Answer("Hm."))) == []
    red, blue = option(colour="red"), option(colour="blue")
    chosen = History().add(Question.about_task(task(red, blue)), Answer("…", "blue"))
    assert comparisons(chosen) == [Comparison("cups", blue.attributes, red.attributes)]


# --- rules ------------------------------------------------------------------------


def test_one_answer_makes_a_rule_for_all_families():
    rules = synthesise(told(("cups", "steel")), RuleSet(), SETTINGS)
    assert [rule.claim for rule in rules] == [Rule("material", "steel")]
    assert rules[0].support == 2
    two = synthesise(told(("cups", "a"), values=("a", "b")), RuleSet(), SETTINGS)
    assert [rule.claim for rule in two] == [Rule("material", "a", "b")]


def test_a_family_that_says_otherwise_is_an_exception_with_a_rule_of_its_own():
    history = told(*((f, "glass") for f in (*KNOWN, "jugs")), ("kids", "plastic"))
    rules = synthesise(history, RuleSet(), SETTINGS)
    assert [rule.claim for rule in rules] == [
        Rule("material", "glass", except_families=("kids",)),
        Rule("material", "plastic", families=("kids",)),
    ]
    assert [(rule.support, rule.against) for rule in rules] == [(8, 0), (2, 0)]
    for family, best in [("cups", 0), ("plates", 0), ("kids", 1)]:
        one = of_materials("glass", "plastic", family=family)
        assert rules.decide(one).index == best


def test_a_family_to_which_it_does_not_matter_is_an_exception_only():
    history = told(*((f, "a") for f in (*KNOWN, *NEW)), ("kids", None), values="ab")
    rules = synthesise(history, RuleSet(), SETTINGS)
    assert [rule.claim for rule in rules] == [
        Rule("material", "a", "b", except_families=("kids",))
    ]


def test_contradictory_answers_make_no_rule():
    history = told(("cups", "a"), ("cups", "b"), values="ab")
    assert synthesise(history, RuleSet(), SETTINGS) == RuleSet()
    three_to_one = told(*[("cups", "a")] * 3, ("cups", "b"), values="ab")
    (rule,) = synthesise(three_to_one, RuleSet(), SETTINGS)
    assert rule.claim == Rule("material", "a", "b")
    assert (rule.support, rule.against) == (3, 1)


def test_indifference_and_silence_make_no_rule():
    assert synthesise(told(("cups", None)), RuleSet(), SETTINGS) == RuleSet()
    assert synthesise(History(), RuleSet(), SETTINGS) == RuleSet()


def test_a_choice_between_options_finds_the_attribute_that_explains_all():
    choices = [
        (
            option(material="glass", colour="red"),
            option(material="steel", colour="blue"),
        ),
        (
            option(material="glass", colour="blue"),
            option(material="steel", colour="red"),
        ),
        (
            option(material="glass", colour="red"),
            option(material="steel", colour="red"),
        ),
    ]
    history = History()
    for at, (better, worse) in enumerate(choices):
        question = Question.about_task(task(worse, better, id=str(at)))
        history = history.add(question, Answer("…", better.name))
    rules = synthesise(history, RuleSet(), SETTINGS)
    assert [rule.claim for rule in rules] == [Rule("material", "glass", "steel")]


def test_weights_keep_an_order_of_three():
    utilities = {"a": 2.04, "b": 0.96, "c": -1.0, "d": -1.0}
    rules = RuleSet(tuple(_of(utilities)))
    assert [rule.weight for rule in rules] == [3.0, 2.0]
    for order in ("abcd", "dcba", "bdca", "cb", "da"):
        assert order[rules.decide(of_materials(*order)).index] == min(order)


def _of(utilities):
    own = {"material": {"cups": utilities}}
    return rounded(Preferences({"material": utilities}, own), 0.2)


def test_rules_there_are_stay_unless_answers_speak_against_them():
    before = RuleSet.from_text(
        """
        Prefer material plastic over glass. (5 for, 4 against)
        Prefer material plastic over steel. (1 for, 0 against)
        Prefer colour red over blue. (1 for, 0 against)
        Prefer material glass over anything else. (weight 9, 2 for, 0 against)
        """
    )
    rules = synthesise(told(("cups", "glass"), ("bowls", "glass")), before, SETTINGS)
    assert [rule.claim for rule in rules] == [
        Rule("material", "glass"),
        Rule("material", "plastic", "steel"),
        Rule("colour", "red", "blue"),
    ]
    assert rules[0].support == 4


def test_counts_leave_indifference_out():
    observed = comparisons(told(("cups", "glass"), ("cups", None), ("bowls", "steel")))
    assert counts(Rule("material", "glass", "steel"), observed) == (1, 1)
    assert counts(Rule("material", "glass", "steel", ("cups",)), observed) == (1, 0)
