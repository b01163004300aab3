import itertools
import json
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from clipr_toys import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.clipr import kitchens
from ftlib.clipr.loop import State, learn
from ftlib.clipr.reasoners import SymbolicReasoner
from ftlib.clipr.rules import Rule, RuleSet, Vocabulary
from ftlib.clipr.settings import ConversationSettings, GateSettings, Settings
from ftlib.clipr.tasks import Option, Task
from ftlib.clipr.users import SimulatedUser, draw_rules
from ftlib.clipr.walkthrough import (
    Choice,
    Line,
    Note,
    Step,
    Walkthrough,
    compared,
    walkthrough,
)

TALK = ConversationSettings(questions=4, candidates=200)
ADAPTIVE = Settings(conversation=TALK)
MUTE = replace(ADAPTIVE, conversation=replace(TALK, questions=0))
EXAMPLES = draw(8, seed=1)
TASKS = draw(40, seed=2)
WATCHED = draw(3, seed=3)


def hidden(seed):
    vocabulary = Vocabulary.of([*EXAMPLES, *TASKS])
    return draw_rules(vocabulary, seed)


def held(user, s=ADAPTIVE, state=None, tasks=TASKS):
    """All states of a conversation, and its walk."""
    states = []
    learn(SymbolicReasoner(s), user, EXAMPLES, tasks, s, state, states.append)
    return states, walkthrough(states, tasks, s, WATCHED, user.right)


def titled(walk, beginning):
    return [step for step in walk.steps if step.title.startswith(beginning)]


def noted(step, label):
    return [note.text for note in step.notes if note.label == label]


def below(target, accepted, rejected):
    """P(share < target) under a uniform prior, by coins instead of Betas.

    The a-th smallest of n = accepted + rejected + 1 uniform numbers has the posterior;
    it is below the target if at least a of them are.
    """
    n, a = accepted + rejected + 1, accepted + 1
    return sum(
        math.comb(n, k) * target**k * (1 - target) ** (n - k) for k in range(a, n + 1)
    )


# --- steps --------------------------------------------------------------------


def test_before_anything_was_said_there_are_no_rules_and_the_first_option_is_taken():
    _, walk = held(SimulatedUser(hidden(1)))
    first = walk.steps[0]
    assert (first.title, first.rules) == ("Start", ())
    assert noted(first, "Rules") == ["none yet: the first option is taken."]
    assert [choice.taken for choice in first.choices] == [0, 0, 0]
    assert [choice.task for choice in first.choices] == WATCHED


def test_each_question_is_a_step_with_its_answer():
    states, walk = held(SimulatedUser(hidden(1)))
    turns = list(states[-1].history)
    assert len(turns) == 4
    steps = titled(walk, "Question")
    assert [step.title for step in steps] == [f"Question {n}" for n in (1, 2, 3, 4)]
    assert [noted(s, "Question") for s in steps] == [[t.question.text] for t in turns]
    assert [noted(s, "Answer") for s in steps] == [[t.answer.text] for t in turns]
    written = walk.steps[5]
    assert written.title == "Rules written"
    assert noted(written, "Answers") == ["4"]
    assert {line.change for line in written.rules} == {"added"}


def test_each_batch_is_a_step_with_what_was_rejected_and_why_the_gate_opened():
    user = SimulatedUser(hidden(4))
    states, walk = held(user)
    steps = titled(walk, "Batch")
    assert len(steps) == 5
    accepted, opened = [], []
    for at, step in enumerate(steps):
        batch = states[-1].decisions[8 * at : 8 * at + 8]
        wrong = [
            f"{task.goal} Taken: {task.options[made.index].name}."
            for task, made in zip(TASKS[8 * at :], batch, strict=False)
            if not user.right(task, made.index)
        ]
        accepted.append(8 - len(wrong))
        a = sum(accepted[-2:])
        low = below(0.9, a, 8 * len(accepted[-2:]) - a)
        best = max(accepted)
        opened.append(low >= 0.7 or best - accepted[-1] > 0.2 * 8)
        assert noted(step, "Rejected") == wrong
        words = f"Batch {at + 1}: {accepted[-1]} of 8 accepted"
        assert step.title == words + (", gate open" if opened[-1] else "")
        (why,) = noted(step, "Gate")
        assert why.startswith("open: " if opened[-1] else "closed: ")
        if "fell" not in why:
            assert f"below 90% with probability {low:.0%}." in why
        n = 8 * len(accepted[-2:])
        assert why.endswith(f" Lately, {a} of {n} were accepted.")
    assert set(opened) == {True, False}


def test_a_fall_below_the_best_batch_is_the_reason():
    user = SimulatedUser(hidden(0), later=hidden(1), changes_after=16)
    eager = GateSettings(target=0.5, patience=None)
    _, walk = held(user, replace(MUTE, gate=eager), State(rules=hidden(0)))
    whys = [noted(step, "Gate")[0] for step in titled(walk, "Batch")]
    assert whys[0].startswith("closed: below 50% with probability")
    assert any(re.fullmatch(r"open: fell from 100% to \d+%\. .*", why) for why in whys)


def test_a_revision_shows_each_correction_with_its_reason():
    class Noting(SimulatedUser):
        def correct(self, task, index):
            said.append(super().correct(task, index))
            return said[-1]

    said = []
    states, walk = held(Noting(hidden(4)))
    notes = [note for step in titled(walk, "Rules revised") for note in step.notes]
    assert len(said) == states[-1].corrected == len(notes) > 3
    for number, (note, correction) in enumerate(zip(notes, said, strict=True), start=1):
        options = correction.task.options
        assert note.label == f"Correction {number}"
        assert note.text == (
            f"{correction.task.goal} Taken: {options[correction.decided].name}."
            f" Wanted: {options[correction.chosen].name}. {correction.reason}"
        )
        assert correction.reason.startswith("Prefer ")


def test_a_correction_without_a_reason_or_without_a_change_says_so():
    _, walk = held(SimulatedUser(hidden(4), gives_reasons=False))
    texts = [n.text for step in titled(walk, "Rules revised") for n in step.notes]
    assert texts
    assert all(text.endswith("No reason was given.") for text in texts)

    class Forgiving(SimulatedUser):
        def correct(self, task, index):
            self.turns += 1
            return replace(super().correct(task, index), chosen=index, reason="")

    _, walk = held(Forgiving(hidden(4)))
    texts = [n.text for step in titled(walk, "Rules revised") for n in step.notes]
    assert texts
    assert all(text.endswith("It will do after all.") for text in texts)


@pytest.mark.parametrize("seed", range(4))
def test_decisions_and_flips_are_those_of_the_rules_in_the_states(seed):
    """Against the states' own rules, whatever steps were made of them."""
    user = SimulatedUser(hidden(seed))
    states, walk = held(user)
    for place, task in enumerate(WATCHED):
        everywhere = [0, *(state.rules.decide(task).index for state in states)]
        changes = [(a, b) for a, b in itertools.pairwise(everywhere) if a != b]
        choices = [step.choices[place] for step in walk.steps]
        flips = [
            (c.flipped_from, c.taken) for c in choices if c.flipped_from is not None
        ]
        assert flips == changes
        assert choices[-1].taken == everywhere[-1]
        assert all(c.right == user.right(task, c.taken) for c in choices)
    assert walk.steps[-1].rules_in_words.startswith(f"{len(states[-1].rules)} rule")


def test_flips_occur_and_are_counted_in_words():
    _, walk = held(SimulatedUser(hidden(1)))
    flipped = [
        s for s in walk.steps if any(c.flipped_from is not None for c in s.choices)
    ]
    assert flipped
    for step in flipped:
        n = sum(choice.flipped_from is not None for choice in step.choices)
        assert step.choices_in_words.endswith(f", {n} flipped")


def test_given_rules_are_there_from_the_start():
    _, walk = held(SimulatedUser(hidden(0)), MUTE, State(rules=hidden(0)))
    assert [line.text for line in walk.steps[0].rules] == [
        rule.to_text() for rule in hidden(0)
    ]
    assert {line.change for line in walk.steps[0].rules} == {"kept"}
    assert noted(walk.steps[0], "Rules") == ["given."]
    assert noted(walk.steps[1], "Answers") == ["0"]


def test_frozen_rules_are_a_step_and_the_gate_is_not_looked_at_after_it():
    quick = replace(MUTE, gate=GateSettings(patience=2))
    states, walk = held(SimulatedUser(hidden(0)), quick, State(rules=hidden(0)))
    assert states[-1].frozen
    titles = [step.title for step in walk.steps]
    at = titles.index("Rules frozen")
    assert titles[at - 1] == "Batch 2: 8 of 8 accepted"
    assert "2 batches in a row had at least 90%" in walk.steps[at].notes[0].text
    whys = [noted(step, "Gate") for step in titled(walk, "Batch")]
    assert whys[1:] == [["not looked at: the rules are frozen."]] * 4


def test_without_adaptation_there_is_no_gate():
    _, walk = held(SimulatedUser(hidden(4)), replace(ADAPTIVE, adaptive=False))
    whys = [noted(step, "Gate") for step in titled(walk, "Batch")]
    assert whys == [["none: the rules stay as they are."]] * 5
    assert not titled(walk, "Rules revised")


def test_a_user_who_says_nothing_is_shown_saying_nothing():
    _, walk = held(SimulatedUser(hidden(1), patience=2))
    assert noted(titled(walk, "Question")[2], "Answer") == ["The user gives none."]
    assert {step.title.split(": ")[1] for step in titled(walk, "Batch")} == {
        "no reaction"
    }
    for step in titled(walk, "Batch"):
        assert noted(step, "No reaction") == ["to 8 of 8 decisions."]
        assert noted(step, "Rejected") == []
        assert noted(step, "Gate") == [
            "closed: nobody reacted, so nobody would answer."
        ]


def test_a_gate_that_brings_no_corrections_is_a_step():
    states, walk = held(SimulatedUser(hidden(4)), replace(ADAPTIVE, turns=4))
    assert states[-1].corrected == 0
    opened = [step for step in titled(walk, "Batch") if "gate open" in step.title]
    assert len(opened) == len(titled(walk, "Nothing corrected")) > 0


# --- what became of the rules -------------------------------------------------


def lines(before, after):
    read = [RuleSet.from_text("\n".join(rules)) for rules in (before, after)]
    return compared(*read)


GLASS = "Prefer material glass over plastic."
STEEL = "Prefer material steel over plastic."


def test_rules_are_added_kept_and_removed():
    assert lines([GLASS], [STEEL]) == [Line("added", STEEL), Line("removed", GLASS)]
    assert lines([GLASS], [STEEL, GLASS]) == [Line("added", STEEL), Line("kept", GLASS)]


def test_more_answers_for_a_rule_are_no_change_but_its_weight_is():
    more = "Prefer material glass over plastic. (5 for, 1 against)"
    heavy = "Prefer material glass over plastic. (weight 3)"
    assert lines([GLASS], [more]) == [Line("kept", more)]
    assert lines([GLASS], [heavy]) == [Line("changed", heavy, GLASS)]


def test_an_exception_and_a_rule_for_all_are_changes_of_what_was_there():
    but = "Prefer material glass over plastic, except for cups."
    assert lines([GLASS], [but]) == [Line("changed", but, GLASS)]
    cups = "For cups, prefer material glass over plastic."
    bowls = "For bowls, prefer material glass over plastic."
    assert lines([cups, bowls], [GLASS]) == [
        Line("changed", GLASS, cups),
        Line("removed", bowls),
    ]


def test_of_like_rules_each_is_compared_with_the_most_like():
    cups = "For cups, prefer material glass over plastic."
    heavy = "Prefer material glass over plastic. (weight 3)"
    assert lines([cups, GLASS], [heavy, cups]) == [
        Line("changed", heavy, GLASS),
        Line("kept", cups),
    ]


RULES = st.lists(
    st.builds(
        Rule,
        dimension=st.sampled_from(["size", "colour"]),
        preferred=st.sampled_from(["a", "b"]),
        over=st.sampled_from(["c", None]),
        families=st.sampled_from([(), ("cups",)]),
        weight=st.sampled_from([1.0, 2.0]),
        support=st.integers(0, 2),
    ),
    max_size=5,
)


@given(RULES, RULES)
@settings(deadline=None)
def test_from_the_lines_one_can_tell_both_sets_of_rules(before, after):
    found = compared(before, after)
    there = [line.text for line in found if line.change != "removed"]
    assert there == [rule.to_text() for rule in after]
    former = Counter(sense(line.before or line.text) for line in found)
    former -= Counter(sense(line.text) for line in found if line.change == "added")
    assert former == Counter(sense(rule.to_text()) for rule in before)
    for line in found:
        if line.change == "changed":
            assert sense(line.before) != sense(line.text)


def sense(text):
    (rule,) = RuleSet.from_text(text)
    return replace(rule, support=0, against=0)


# --- what is refused ----------------------------------------------------------


def test_what_does_not_belong_together_is_refused():
    user = SimulatedUser(hidden(4))
    states, _ = held(user)

    def walk(states=states, tasks=TASKS, s=ADAPTIVE, watched=WATCHED):
        return walkthrough(states, tasks, s, watched, user.right)

    with pytest.raises(ValueError, match="0 states and 3 watched"):
        walk(states=[])
    with pytest.raises(ValueError, match="and 0 watched"):
        walk(watched=[])
    with pytest.raises(ValueError, match="other tasks"):
        walk(tasks=TASKS[1:])
    with pytest.raises(ValueError, match=r"states\[2\] does not come next"):
        walk(states=[*states[:2], *states[4:]])
    with pytest.raises(ValueError, match=r"states\[0\] does not come next"):
        walk(states=states[5:])
    with pytest.raises(ValueError, match=r"states\[\d+\] does not come next"):
        walk(states=[*states, *held(SimulatedUser(hidden(1)))[0]])
    with pytest.raises(ValueError, match="after batch 1: give the settings"):
        walk(s=replace(ADAPTIVE, adaptive=False))
    assert walk([State(), *states]).steps == walk().steps
    assert walk(states[:20]).steps == walk().steps[: len(walk(states[:20]).steps)]


# --- as text and as HTML --------------------------------------------------------


class Table(HTMLParser):
    """Reads a table into cells of text; every tag must be closed where it belongs."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.rows, self.said = [], Counter(), [], []
        self.attributes = Counter()
        self.scopes = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        if tag == "tr":
            self.rows.append([])
            self.said += [value for name, value in attrs if name == "data-said"]
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.scopes.append(dict(attrs).get("scope"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data


def test_html_is_a_table_of_all_steps():
    _, walk = held(SimulatedUser(hidden(4)))
    table = Table(walk._repr_html_())
    head, *rows = table.rows
    n = len(walk.steps)
    assert head == ["Step", "What happened", "Rules", "Decisions"]
    assert len(rows) == n
    assert table.tags["table"] == table.tags["caption"] == table.tags["thead"] == 1
    assert Counter(table.scopes) == {"col": 4, "row": n, None: 3 * n}
    for number, (row, step) in enumerate(zip(rows, walk.steps, strict=True), start=1):
        where, happened, rules, decisions = row
        assert where == f"{number}. {step.title}"
        for note in step.notes:
            assert f"{note.label}: {note.text}" in happened
        for line in step.rules:
            sign = {"added": "+ added: ", "changed": "~ changed: ", "kept": ""}
            assert sign.get(line.change, "− removed: ") + line.text in rules
            assert line.before in rules
        for choice in step.choices:
            word = "✓ right" if choice.right else "✗ wrong"
            name = choice.task.options[choice.taken].name
            assert f"▸ {name} (taken: {word}" in decisions
            assert all(option.name in decisions for option in choice.task.options)
        flips = [c for c in step.choices if c.flipped_from is not None]
        assert decisions.count("⇄ flipped from") == len(flips)
    assert "⇄ flipped from" in "".join(row[3] for row in rows)
    changes = {line.change for step in walk.steps for line in step.rules}
    assert changes == {"added", "changed", "removed", "kept"}


def test_a_choice_is_shown_with_what_it_was():
    task = WATCHED[0]
    _, walk = held(SimulatedUser(hidden(1)))
    step = replace(walk.steps[0], choices=(Choice(task, 1, False, 0),))
    html = replace(walk, steps=(step,))._repr_html_()
    was, now = (option.name for option in task.options[:2])
    assert f"▸ {now}</b> (taken: ✗ wrong; <b>⇄ flipped</b> from {was})" in html


def test_nothing_has_an_id_and_nothing_is_fetched():
    """So that two of them, also twice the same, can be on one page."""
    html = held(SimulatedUser(hidden(4)))[1]._repr_html_()
    assert not {"id", "for", "name", "src", "href", "style"} & set(
        Table(html).attributes
    )
    assert "url(" not in html
    assert "http" not in html
    assert "@import" not in html


def test_the_same_conversation_gives_the_same_page():
    first, again = (held(SimulatedUser(hidden(4)))[1] for _ in range(2))
    assert first is not again
    assert first._repr_html_() == again._repr_html_()
    assert repr(first) == repr(again)
    assert first._repr_html_() != held(SimulatedUser(hidden(1)))[1]._repr_html_()


def test_states_that_were_written_and_read_give_the_same_page():
    states, walk = held(SimulatedUser(hidden(4)))
    read = [State.from_json(json.loads(json.dumps(s.to_json()))) for s in states]
    again = walkthrough(read, TASKS, ADAPTIVE, WATCHED, SimulatedUser(hidden(4)).right)
    assert again._repr_html_() == walk._repr_html_()


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror=hacked()>",
    "</table></td></div>",
    '" onclick="hacked()" x=\'',
    "&lt;b&gt; & {style} %s <!--",
]


def hostile_walk():
    """A conversation in which every name and text would like to be markup."""

    def worse(task):
        bad = HOSTILE[len(task.options[0].name) % len(HOSTILE)]
        options = tuple(
            replace(
                option,
                name=f"{option.name} {bad}",
                attributes={d: f"{v} {bad}" for d, v in option.attributes.items()},
            )
            for option in task.options
        )
        return replace(task, goal=bad, scene=bad, family=bad, options=options)

    examples, tasks, watched = (
        [worse(task) for task in some] for some in (EXAMPLES, TASKS, WATCHED)
    )
    rules = draw_rules(Vocabulary.of(tasks), 4)
    user = SimulatedUser(rules)
    states = []
    learn(
        SymbolicReasoner(ADAPTIVE), user, examples, tasks, ADAPTIVE, None, states.append
    )
    return walkthrough(states, tasks, ADAPTIVE, watched, user.right)


def test_no_text_becomes_markup():
    walk = hostile_walk()
    table = Table(walk._repr_html_())
    benign = Table(held(SimulatedUser(hidden(4)))[1]._repr_html_())
    assert set(table.tags) <= set(benign.tags)
    assert set(table.attributes) <= set(benign.attributes)
    assert table.tags["script"] == table.tags["table"] == table.tags["style"] == 1
    assert len(table.rows) == len(walk.steps) + 1
    shown = "".join(cell for row in table.rows for cell in row)
    for step in walk.steps:
        for text in [
            *(note.text for note in step.notes),
            *(r.text for r in step.rules),
        ]:
            assert text in shown
    assert all(bad in shown for bad in HOSTILE)
    assert titled(walk, "Rules revised")  # with reasons, from the user


TAGS = set(
    "div style table caption thead tbody tr th td p b i ul li ins del script".split()
)
ATTRIBUTES = set(
    "class role aria-label tabindex scope data-label data-said".split(),
)


@pytest.mark.parametrize("bad", HOSTILE)
def test_no_text_becomes_markup_wherever_it_stands(bad):
    options = (Option(bad, {}), Option(f"{bad} too", {}))
    choice = Choice(Task("t", bad, bad, bad, options), 0, True, 1)
    rules = (
        Line("added", bad),
        Line("changed", bad, bad),
        Line("kept", bad),
        Line("removed", bad),
    )
    step = Step(bad, (Note(bad, bad),), rules, (choice,))
    table = Table(Walkthrough((step,))._repr_html_())
    assert set(table.tags) == TAGS
    assert set(table.attributes) == ATTRIBUTES
    assert table.said == [
        f"Step 1 of 1: {bad}. 3 rules: 1 added, 1 changed, 1 removed."
        " 1 of 1 right, 1 flipped."
    ]
    title, notes, lines, decisions = table.rows[1]
    assert title == f"1. {bad}"
    assert notes == f"{bad}: {bad}"
    assert lines.count(bad) == 4 + 1  # each, and before the change
    assert decisions.count(bad) == 1 + 2 + 1  # goal, options, flipped from


def test_text_is_a_line_for_each_step():
    states, walk = held(SimulatedUser(hidden(4)))
    text = str(walk).split("\n")
    assert text == repr(walk).split("\n")
    assert len(text) == len(walk.steps)
    assert re.fullmatch(r"  1  Start +0 rules +\d of 3 right", text[0])
    assert re.fullmatch(r"  2  Question 1 +0 rules +\d of 3 right", text[1])
    n = len(states[-1].rules)
    written = next(s.rules for s in states if s.phase == "decide")
    assert re.fullmatch(
        rf"  6  Rules written +{len(written)} rules?: {len(written)} added .*", text[5]
    )
    assert f"  {n} rule" in text[-1]


def test_the_demonstration_in_the_kitchen_is_light():
    parts = kitchens.draw(seed=1002, train=48, validation=20, test=0, strange=0)
    examples, tasks = parts.train[:8], parts.train[8:]
    user, s, states = SimulatedUser(kitchens.preferences(1002)), Settings(), []
    learn(SymbolicReasoner(s), user, examples, tasks, s, save=states.append)
    walk = walkthrough(states, tasks, s, parts.validation[:3], user.right)
    assert len(walk.steps) >= 15
    assert len(walk._repr_html_().encode()) <= 60_000
