import pytest
from clipr_toys import DIMENSIONS, KNOWN, NEW, draw, of_materials, option, task

from ftlib.clipr.conversation import Question
from ftlib.clipr.rules import RuleSet, Vocabulary, parse_rule
from ftlib.clipr.users import SimulatedUser, UserSettings, draw_rules

HIDDEN = RuleSet.from_text(
    """
    Prefer material glass over anything else, except for boxes. (weight 4)
    For boxes, prefer material plastic over glass. (weight 4)
    Prefer colour red over blue.
    """
)
MATERIALS = DIMENSIONS["material"]


def test_a_user_says_what_is_best_in_the_family():
    user = SimulatedUser(HIDDEN)
    for family, best in [("cups", "glass"), ("boxes", "plastic"), ("plates", "glass")]:
        question = Question.about_dimension(family, "material", ("plastic", "glass"))
        assert user.answer(question).value == best
    size = user.answer(Question.about_dimension("cups", "size", ("big", "small")))
    assert size.indifferent
    assert size.value is None
    assert user.turns == 4


def test_a_user_chooses_among_options():
    user = SimulatedUser(HIDDEN)
    blue, red = (option(material="steel", colour=c) for c in ("blue", "red"))
    assert user.answer(Question.about_task(task(blue, red))).value == red.name
    same = task(option(size="big"), option(size="small"))
    assert user.answer(Question.about_task(same)).indifferent
    assert user.right(same, 0)
    assert user.right(same, 1)


def test_to_an_open_question_a_user_tells_the_rules_it_names():
    user = SimulatedUser(HIDDEN)
    told = user.answer(Question("What about colour, and size?"))
    assert told.text == "Prefer colour red over blue."
    assert told.value is None
    assert not told.indifferent
    assert user.answer(Question("Hello?")).text == "I have no view on that."


def test_corrections_say_why_and_the_reason_is_true():
    user = SimulatedUser(HIDDEN)
    for tried in draw(60, seed=1):
        for wrong in range(len(tried.options)):
            correction = user.correct(tried, wrong)
            if user.right(tried, wrong):
                assert correction.chosen == wrong
                continue
            assert user.right(tried, correction.chosen)
            both = tried.options[correction.chosen], tried.options[wrong]
            if HIDDEN.margin(tried.family, *both) == 0:  # better on average only
                assert correction.reason == ""
                continue
            chosen, decided = (one.attributes for one in both)
            reason = parse_rule(correction.reason)
            assert reason.compare(tried.family, chosen, decided) == 1
    silent = SimulatedUser(HIDDEN, gives_reasons=False)
    assert silent.correct(of_materials("steel", "glass"), 0).reason == ""


def test_errors_are_as_frequent_as_set_and_the_same_when_asked_again():
    tasks = draw(600, seed=2)
    user = SimulatedUser(HIDDEN, seed=3, noise=0.2)
    reactions = [user.accepts(t, 0) for t in tasks]
    wrong = [said != user.right(t, 0) for said, t in zip(reactions, tasks, strict=True)]
    assert sum(wrong) / 600 == pytest.approx(0.2, abs=0.05)
    assert reactions == [user.accepts(t, 0) for t in tasks]
    assert user.reactions == 1200
    questions = [
        Question.about_dimension(f"family {at}", "material", MATERIALS)
        for at in range(400)
    ]
    said = [user.answer(question).value for question in questions]
    assert said.count("glass") / 400 == pytest.approx(0.8, abs=0.06)
    assert said.count("steel") / 400 == pytest.approx(0.1, abs=0.05)
    assert said == [user.answer(question).value for question in questions]


def test_patience_ends():
    user = SimulatedUser(HIDDEN, patience=2)
    drinks = of_materials("steel", "glass")
    assert user.answer(Question.about_task(drinks)) is not None
    assert user.accepts(drinks, 0) is False
    assert user.correct(drinks, 0) is not None
    assert user.answer(Question.about_task(drinks)) is None
    assert user.accepts(drinks, 0) is None
    assert user.correct(drinks, 0) is None
    assert (user.turns, user.reactions) == (2, 1)


def test_a_change_of_mind():
    later = RuleSet.from_text("Prefer material steel over glass.")
    user = SimulatedUser(HIDDEN, later=later, changes_after=2)
    drinks = of_materials("steel", "glass")
    assert [user.accepts(drinks, 0) for _ in range(4)] == [False, False, True, True]
    assert user.right(drinks, 0)


def test_drawn_users_differ_and_keep_to_what_is_set():
    vocabulary = Vocabulary.of(draw(200, seed=0, families=KNOWN + NEW))
    drawn = [draw_rules(vocabulary, seed, families=KNOWN) for seed in range(40)]
    assert drawn == [draw_rules(vocabulary, seed, families=KNOWN) for seed in range(40)]
    assert len(set(drawn)) > 30
    for rules in drawn:
        assert len({rule.dimension for rule in rules}) == 2
        excepted = {f for rule in rules for f in rule.except_families}
        assert len(excepted) == 1
        assert excepted <= set(KNOWN)
        (family,) = excepted
        special = [rule for rule in rules if rule.families]
        assert [rule.families for rule in special] == [(family,)]
    plain = draw_rules(vocabulary, 0, UserSettings(dimensions=1, exceptions=0))
    assert not any(rule.families or rule.except_families for rule in plain)


def test_the_first_dimension_outweighs_the_others():
    vocabulary = Vocabulary((), DIMENSIONS)
    for seed in range(10):
        rules = draw_rules(vocabulary, seed, UserSettings(3, 2, 0))
        first = rules[0].dimension
        ranked = {
            rule.preferred: rule.weight for rule in rules if rule.dimension == first
        }
        for one in draw(20, seed=seed):
            best = max(ranked.get(o.attributes[first], 0) for o in one.options)
            chosen = one.options[rules.decide(one).index]
            assert ranked.get(chosen.attributes[first], 0) == best


def test_without_anything_to_prefer_no_user_is_drawn():
    with pytest.raises(ValueError, match="no dimension has two values"):
        draw_rules(Vocabulary(("cups",), {"material": ("glass",)}), seed=0)
