import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from clipr_toys import DIMENSIONS, KNOWN, draw, of_materials, option, task
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftlib.clipr.rules import Rule, RuleError, RuleSet, Vocabulary, parse_rule
from ftlib.clipr.tasks import Option

# --- text -------------------------------------------------------------------------

AWKWARD = st.sampled_from(
    (
        *("over", "Or", "a or b", "anything else", 'say "hi"', "x, y", "a.b", "prefer"),
        *("(1 for, 2", "  two", "line\nbreak", "\\", "\u2028", "ÄÖ", "#", "1.", "-"),
    )
)
NAMES = st.one_of(
    st.sampled_from(["glass", "steel mug", "serving drinks", "a-b", "7"]),
    AWKWARD,
    st.text(min_size=1, max_size=8),
)
PAIRS = st.tuples(NAMES, NAMES)


@st.composite
def any_rule(draw):
    preferred = draw(NAMES)
    return Rule(
        draw(NAMES),
        preferred,
        draw(st.none() | NAMES.filter(lambda name: name != preferred)),
        tuple(draw(st.lists(NAMES, max_size=3))),
        tuple(draw(st.lists(NAMES, max_size=2))),
        tuple(draw(st.lists(PAIRS, max_size=2))),
        draw(st.just(1.0) | st.floats(1e-3, 1e6)),
        draw(st.integers(0, 99)),
        draw(st.integers(0, 99)),
    )


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(any_rule(), max_size=3))
def test_any_rules_are_read_back_from_their_words_and_from_json(rules):
    rules = RuleSet(tuple(rules))
    assert RuleSet.from_text(rules.to_text()) == rules
    assert RuleSet.from_json(json.loads(json.dumps(rules.to_json()))) == rules


def test_what_a_rule_looks_like():
    rule = Rule(
        "material",
        "glass",
        "plastic",
        ("drinks", "a snack"),
        ("children",),
        (("brand", "Old & Co."),),
        weight=2,
        support=3,
    )
    assert rule.to_text() == (
        "For a snack or drinks, prefer material glass over plastic, except for children"
        ' or with brand "Old & Co.". (weight 2, 3 for, 0 against)'
    )
    assert Rule("kind", "tea").to_text() == "Prefer kind tea over anything else."


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (
            "When serving drinks, prefer material glass over plastic, except for"
            " children. (3 for, 0 against)",
            Rule(
                "material",
                "glass",
                "plastic",
                ("serving drinks",),
                ("children",),
                support=3,
            ),
        ),
        ("2. PREFER kind green tea", Rule("kind", "green tea")),
        ("- always prefer kind: tea rather than coffee", Rule("kind", "tea", "coffee")),
        ("If late prefer kind tea instead of coffee;", None),
        (
            "For late, prefer kind tea unless with brand Acme or guests (weight .5)",
            Rule(
                "kind", "tea", None, ("late",), ("guests",), (("brand", "Acme"),), 0.5
            ),
        ),
    ],
)
def test_people_write_them_differently(line, rule):
    assert parse_rule(line) == (rule or Rule("kind", "tea", "coffee", ("late",)))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("I like glass.", "expected 'prefer', found 'I'"),
        ("Prefer material", "expected a name, found the end"),
        ("Prefer material glass over", "expected a name, found the end"),
        ("Prefer material glass over plastic over steel", "expected the end, found"),
        ("Prefer material glass over glass", "prefers 'glass' over itself"),
        ('Prefer material "glass', "a quote is not closed"),
        (r'Prefer material "\q"', "not well quoted"),
        ("Prefer material glass (2 votes)", "cannot read the note '2 votes'"),
        ("Prefer material glass (weight 0)", "weight is 0.0: it must be above 0"),
        ("Prefer material glass (weight 1e999)", "weight is inf"),
        ("Prefer material glass (weight 1.2.3)", "is not a number"),
        ('Prefer material ""', "empty name"),
        ("__import__('os')", "cannot read the note \"'os'\""),
    ],
)
def test_other_lines_are_refused_by_number(line, problem):
    with pytest.raises(RuleError, match="line 3: ") as refused:
        RuleSet.from_text(f"# mine\n\n{line}\nPrefer kind tea.")
    assert problem in str(refused.value)


def test_unknown_names_are_refused_with_a_guess_and_case_is_mended():
    vocabulary = Vocabulary.of([of_materials("Glass", "plastic", family="drinks")])
    known = RuleSet.from_text(
        "For DRINKS, prefer Material glass over plastic, except with material PLASTIC.",
        vocabulary,
    )
    assert known.rules == (
        Rule(
            "material",
            "Glass",
            "plastic",
            ("drinks",),
            except_values=(("material", "plastic"),),
        ),
    )
    for line, problem in [
        ("Prefer material glas", "unknown material 'glas'; did you mean 'Glass'?"),
        ("Prefer color red", "unknown dimension 'color'; known: ['material']"),
        ("For drink, prefer material glass", "did you mean 'drinks'?"),
    ]:
        with pytest.raises(RuleError) as refused:
            RuleSet.from_text(line, vocabulary)
        assert str(refused.value).startswith("line 1: unknown")
        assert problem in str(refused.value)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"dimension": "kind"},
        {"dimension": "kind", "preferred": 3},
        {"dimension": "kind", "preferred": "tea", "colour": "red"},
        {"dimension": "kind", "preferred": "tea", "weight": "heavy"},
        {"dimension": "kind", "preferred": "tea", "families": [1]},
        {"dimension": "kind", "preferred": "tea", "except_values": ["ab", "abc"]},
        "tea",
    ],
)
def test_json_that_is_no_rule_is_refused(data):
    with pytest.raises(RuleError, match="not a rule"):
        RuleSet.from_json([data])


# --- deciding ---------------------------------------------------------------------


def test_a_rule_is_silent_where_it_does_not_hold():
    rule = Rule(
        "material",
        "glass",
        "plastic",
        ("cups", "bowls"),
        ("bowls",),
        (("brand", "Acme"),),
    )
    glass, plastic = {"material": "glass"}, {"material": "plastic"}
    assert rule.compare("cups", glass, plastic) == 1
    assert rule.compare("cups", plastic, glass) == -1
    assert rule.compare("bowls", glass, plastic) == 0
    assert rule.compare("plates", glass, plastic) == 0
    assert rule.compare("cups", glass, {"material": "steel"}) == 0
    assert rule.compare("cups", glass, {**plastic, "brand": "Acme"}) == 0
    anything = Rule("material", "glass")
    assert anything.compare("cups", glass, {}) == 1
    assert anything.compare("cups", glass, glass) == 0


def test_no_rules_tie_and_the_first_is_taken():
    decision = RuleSet().decide(of_materials("glass", "steel", "plastic"))
    assert decision.index == 0
    assert decision.scores == (0, 0, 0)
    assert decision.fired == ()
    assert decision.margin == 0
    assert RuleSet().best(of_materials("a", "b")) == (0, 1)


def test_a_chain_holds_whatever_its_weights():
    chain = RuleSet(
        (
            Rule("material", "a", "b", weight=1),
            Rule("material", "b", "c", weight=9),
            Rule("material", "b", "d", weight=9),
        )
    )
    for order in itertools.permutations("abcd"):
        assert order[chain.decide(of_materials(*order)).index] == "a"


def test_what_is_known_to_be_good_goes_before_what_is_unknown():
    rules = RuleSet((Rule("material", "glass", "plastic"),))
    unknown_first = of_materials("steel", "plastic", "glass")
    assert rules.decide(unknown_first).index == 2
    assert rules.best(unknown_first) == (2,)


def test_a_cycle_of_equals_is_a_tie():
    rules = RuleSet(tuple(Rule("material", *pair) for pair in ("ab", "bc", "ca")))
    assert rules.best(of_materials("a", "b", "c")) == (0, 1, 2)


def test_the_more_specific_rule_decides_whatever_the_weights():
    rules = RuleSet.from_text(
        """
        Prefer material glass over anything else. (weight 9)
        Prefer material steel over glass.
        For cups, prefer material plastic over anything else.
        For cups, prefer material steel over plastic.
        """
    )
    materials = ("glass", "steel", "plastic")
    assert rules.decide(of_materials(*materials, family="cups")).index == 1
    assert rules.decide(of_materials(*materials, family="plates")).index == 1
    assert rules.decide(of_materials("plastic", "glass", family="plates")).index == 1
    assert rules.decide(of_materials("glass", "plastic", family="cups")).index == 1


def test_dimensions_add_up():
    rules = RuleSet.from_text(
        """
        Prefer material glass over steel. (weight 3)
        Prefer colour red over blue. (weight 2)
        Prefer size big over small. (weight 2)
        """
    )
    glass = option(material="glass", colour="blue", size="small")
    steel = option(material="steel", colour="red", size="big")
    assert rules.margin("cups", steel, glass) == 1
    assert rules.decide(task(glass, steel)).scores == (-1, 1)


def test_decimal_weights_that_are_equal_tie():
    rules = RuleSet(
        (
            Rule("material", "a", "b", weight=0.1),
            Rule("colour", "red", "blue", weight=0.2),
            Rule("size", "big", "small", weight=0.3),
        )
    )
    one = option(material="a", colour="red", size="small")
    other = option(material="b", colour="blue", size="big")
    assert 0.1 + 0.2 != 0.3
    assert rules.best(task(one, other)) == (0, 1)
    assert rules.decide(task(other, one)).index == 0


def by_hand(rules, task):
    """The definition, option by option, in exact fractions."""

    def says(rule, a, b):
        value, other = (o.attributes.get(rule.dimension) for o in (a, b))
        if rule.families and task.family not in rule.families:
            return False
        if task.family in rule.except_families:
            return False
        for d, v in rule.except_values:
            if a.attributes.get(d) == v or b.attributes.get(d) == v:
                return False
        return value == rule.preferred and (
            other == rule.over if rule.over is not None else other != value
        )

    def margin(a, b):
        total = Fraction(0)
        for dimension in DIMENSIONS:
            for families, over in itertools.product((True, False), repeat=2):
                level = [
                    (Fraction(rule.weight), says(rule, a, b) - says(rule, b, a))
                    for rule in rules
                    if rule.dimension == dimension
                    and bool(rule.families) == families
                    and (rule.over is not None) == over
                ]
                if any(sign for _, sign in level):
                    total += sum(weight * sign for weight, sign in level)
                    break
        return total

    keys = []
    for a in task.options:
        margins = [margin(a, b) for b in task.options if b is not a]
        keys.append((min(margins), sum(margins)))
    return tuple(i for i, key in enumerate(keys) if key == max(keys)), keys


def test_decisions_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    ties = 0
    for tried in range(150):
        rules = []
        for _ in range(int(rng.integers(0, 8))):
            dimension = str(rng.choice(list(DIMENSIONS)))
            values = [str(v) for v in rng.permutation(DIMENSIONS[dimension])]
            some = [str(f) for f in rng.permutation(KNOWN)]
            other = str(rng.choice(list(DIMENSIONS)))
            rules.append(
                Rule(
                    dimension,
                    values[0],
                    values[1] if rng.random() < 0.5 else None,
                    tuple(some[: rng.integers(0, 3)]) if rng.random() < 0.5 else (),
                    tuple(some[2:]) if rng.random() < 0.3 else (),
                    ((other, DIMENSIONS[other][0]),) if rng.random() < 0.2 else (),
                    weight=int(rng.integers(1, 4)),
                )
            )
        rules = RuleSet(tuple(rules))
        for one in draw(4, seed=tried):
            best, keys = by_hand(rules, one)
            decision = rules.decide(one)
            assert rules.best(one) == best
            assert decision.index == best[0]
            assert decision.scores == tuple(float(worst) for worst, _ in keys)
            ties += len(best) > 1
            margins = rules.margins(one)
            np.testing.assert_array_equal(margins, -margins.T)
    assert 50 < ties < 550


def test_options_without_attributes_tie():
    rules = RuleSet((Rule("material", "glass"),))
    bare = task(Option("a"), Option("b"))
    assert rules.best(bare) == (0, 1)
    assert rules.fired(bare) == ()
    assert rules.fired(of_materials("glass", "steel")) == (0,)
