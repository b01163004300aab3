import numpy as np
import pytest
from clipr_toys import KNOWN, draw, of_materials, option, task

from ftlib.clipr.reasoners import SymbolicReasoner
from ftlib.clipr.refinement import (
    confirm,
    generalised,
    lesson_guessed,
    lesson_said,
    revise,
)
from ftlib.clipr.rules import Rule, RuleSet, Vocabulary
from ftlib.clipr.settings import RefinementSettings
from ftlib.clipr.tasks import Correction, Option
from ftlib.clipr.users import SimulatedUser, draw_rules

SETTINGS = RefinementSettings()
GLASS, STEEL = option(material="glass"), option(material="steel")


def corrected(family="cups", reason="Prefer material steel over glass.", **kinds):
    """Steel instead of glass."""
    return Correction(task(GLASS, STEEL, family=family), 0, 1, reason)


def revised(text, *corrections, settings=SETTINGS):
    return revise(RuleSet.from_text(text), corrections, settings).to_text()


def test_a_rule_is_added_where_none_spoke():
    assert revised("", corrected()) == (
        "Prefer material steel over glass. (1 for, 0 against)"
    )


def test_a_wrong_rule_without_support_is_deleted():
    for support in ("", "(1 for, 0 against)", "(3 for, 2 against)"):
        text = f"Prefer material glass over anything else. {support}"
        assert revised(text, corrected()) == (
            "Prefer material steel over glass. (1 for, 0 against)"
        )


def test_a_rule_with_support_gets_an_exception_and_the_family_its_own():
    text = "Prefer material glass over steel. (4 for, 0 against)"
    assert revised(text, corrected("kids")) == (
        "Prefer material glass over steel, except for kids. (4 for, 1 against)\n"
        "For kids, prefer material steel over glass. (1 for, 0 against)"
    )


def test_an_exception_that_was_an_error_goes_again():
    text = """
    Prefer material steel over glass, except for kids. (4 for, 1 against)
    For kids, prefer material glass over steel. (1 for, 0 against)
    """
    assert revised(text, corrected("kids")) == (
        "Prefer material steel over glass. (5 for, 1 against)"
    )


def test_what_a_rule_with_exceptions_says_is_not_said_twice():
    text = "Prefer material steel over glass, except for kids. (4 for, 1 against)"
    assert revised(text, corrected("cups")) == text.replace("4 for", "5 for")
    text = "Prefer material steel over glass, except with material glass."
    assert revised(text, corrected("cups")) == (
        f"{text}\nPrefer material steel over glass. (1 for, 0 against)"
    )


def test_a_rule_of_the_family_outvotes_a_correction():
    text = "For kids, prefer material glass over steel. (4 for, 0 against)"
    assert revised(text, corrected("kids")) == (
        "For kids, prefer material glass over steel. (4 for, 1 against)"
    )


def test_a_rule_on_another_dimension_is_outweighed_and_keeps_its_support():
    small, big = (
        option(material="glass", size="small"),
        option(material="steel", size="big"),
    )
    wanted = Correction(task(big, small), 0, 1, "Prefer size small over big.")
    text = "Prefer material steel over glass. (weight 3, 2 for, 0 against)"
    assert revised(text, wanted) == (
        f"{text}\nPrefer size small over big. (weight 4, 1 for, 0 against)"
    )
    light = RefinementSettings(max_weight=2)
    assert "size small over big. (weight 2," in revised(text, wanted, settings=light)


def test_what_agreed_is_counted_up_to_the_memory():
    text = "Prefer material steel over anything else. (3 for, 0 against)"
    assert revised(text, corrected()).startswith(text.replace("3 for", "4 for"))
    full = revised(text, *[corrected()] * 20)
    assert f"({SETTINGS.memory} for, 0 against)" in full


@pytest.mark.parametrize(
    "reason",
    [
        "",
        "Because.",
        "Prefer material glass over steel.",  # the contrary of what was chosen
        "For bowls, prefer material steel over glass.",  # of another family
        "Prefer smell fresh.",
        "import os; prefer (",
        'Prefer "',
    ],
)
def test_a_reason_that_explains_nothing_is_replaced_by_a_guess(reason):
    correction = corrected(reason=reason)
    assert lesson_said(correction) is None
    assert revised("", correction) == (
        "Prefer material steel over glass. (1 for, 0 against)"
    )
    reasoner = SymbolicReasoner()
    reasoner.revise(RuleSet(), [correction, corrected()])
    assert reasoner.usage.problems == bool(reason)


def test_the_guess_prefers_wrong_rules_then_silent_dimensions():
    red, blue = (
        option(material="glass", colour="red", size="big"),
        option(material="steel", colour="blue", size="big"),
    )
    wanted = Correction(task(red, blue), 0, 1)

    def guessed(text):
        return lesson_guessed(RuleSet.from_text(text), wanted, SETTINGS)

    assert guessed("") == Rule("material", "steel", "glass")
    assert guessed("Prefer colour red.") == Rule("colour", "blue", "red")
    assert guessed("Prefer material glass. (3 for, 0 against)") == (
        Rule("colour", "blue", "red")
    )
    bare = Correction(task(Option("a"), Option("b", {"kind": "cup"})), 0, 1)
    assert lesson_guessed(RuleSet(), bare, SETTINGS) == Rule("kind", "cup")


def test_equal_attributes_teach_nothing():
    same = task(Option("one", GLASS.attributes), Option("two", GLASS.attributes))
    rules = RuleSet.from_text("Prefer material glass over steel.")
    assert revise(rules, [Correction(same, 0, 1)], SETTINGS) == rules


def test_no_corrections_change_nothing():
    rules = RuleSet.from_text("Prefer material glass over steel.")
    assert revise(rules, [], SETTINGS) == rules


def test_an_accepted_decision_counts_for_the_rules_that_spoke_for_it():
    rules = RuleSet.from_text(
        """
        Prefer material steel over glass.
        Prefer material plastic over steel.
        Prefer material plastic over glass.
        Prefer colour red.
        """
    )
    three = of_materials("glass", "steel", "plastic")
    assert [r.support for r in confirm(rules, three, 1, SETTINGS)] == [1, 0, 0, 0]
    assert [r.support for r in confirm(rules, three, 2, SETTINGS)] == [0, 1, 1, 0]
    confirmation = Correction(three, 2, 2)
    assert revise(rules, [confirmation], SETTINGS) == confirm(rules, three, 2, SETTINGS)
    forgetful = RefinementSettings(memory=1)
    again = confirm(confirm(rules, three, 1, forgetful), three, 1, forgetful)
    assert again[0].support == 1


# --- from families to all -----------------------------------------------------------


def test_what_holds_in_enough_families_is_said_of_all():
    rules = RuleSet.from_text(
        """
        For cups, prefer material steel over glass. (2 for, 0 against)
        For bowls, prefer material steel over glass. (weight 3, 1 for, 0 against)
        Prefer material glass over steel, except for cups or bowls. (4 for, 2 against)
        Prefer colour red over blue.
        """
    )
    assert generalised(rules, spread=2).to_text() == (
        "Prefer colour red over blue.\n"
        "Prefer material steel over glass. (weight 3, 3 for, 0 against)"
    )
    assert generalised(rules, spread=3) == rules


def test_what_more_answers_speak_against_is_said_of_none():
    rules = RuleSet.from_text(
        """
        For cups or bowls, prefer material steel over glass. (2 for, 0 against)
        Prefer material glass over anything else, except for cups. (5 for, 1 against)
        """
    )
    assert generalised(rules, spread=2) == rules


def test_a_rule_for_all_that_says_the_same_takes_the_support():
    rules = RuleSet.from_text(
        """
        For cups or bowls, prefer material steel over glass. (2 for, 0 against)
        Prefer material steel over glass. (weight 2, 3 for, 0 against)
        """
    )
    assert generalised(rules, spread=2).to_text() == (
        "Prefer material steel over glass. (5 for, 0 against)"
    )


# --- whole runs ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_corrections_come_out_right_and_wrong_rules_are_mended(seed):
    tasks = draw(60, seed, KNOWN)
    vocabulary = Vocabulary.of(tasks)
    user = SimulatedUser(draw_rules(vocabulary, seed, families=KNOWN))
    rules = draw_rules(vocabulary, seed + 100, families=KNOWN)
    before = [user.right(one, rules.decide(one).index) for one in tasks]
    for one in tasks:
        decided = rules.decide(one).index
        if user.right(one, decided):
            rules = confirm(rules, one, decided, SETTINGS)
            continue
        correction = user.correct(one, decided)
        rules = revise(rules, [correction], SETTINGS)
        both = one.options[correction.chosen], one.options[decided]
        outvoted = any(
            rule.families and rule.against
            for rule in rules
            if rule.compare(one.family, *(o.attributes for o in both)) < 0
        )
        assert rules.margin(one.family, *both) > 0 or outvoted
    after = [user.right(one, rules.decide(one).index) for one in tasks]
    assert np.mean(before) < 0.7
    assert np.mean(after) > 0.9
