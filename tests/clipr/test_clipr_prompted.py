"""The prompted reasoner: what it asks a model, and what it makes of any reply."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.clipr import prompts
from ftlib.clipr.conversation import Answer, History, Question
from ftlib.clipr.models import NOT_CHOSEN, Usage, votes
from ftlib.clipr.prompted import (
    PromptedReasoner,
    PromptedUser,
    read_question,
    read_rules,
    understood,
)
from ftlib.clipr.reasoners import SymbolicReasoner
from ftlib.clipr.rules import Rule, RuleSet, Vocabulary
from ftlib.clipr.tasks import Correction, Option, Task


def made_of(kind, *materials, **more):
    return tuple(Option(f"{m} {kind}", {"material": m, **more}) for m in materials)


MUGS = Task("1", "Two mugs.", "Bring a mug.", "mugs", made_of("mug", "steel", "glass"))
BOWLS = Task(
    "2",
    "A shelf.",
    "Serve soup.",
    "bowls",
    (
        *made_of("bowl", "glass", "plastic", size="small"),
        *made_of("pot", "steel", size="large"),
    ),
)
TASKS = (MUGS, BOWLS)
NAMES = Vocabulary.of(TASKS)
GLASS = Rule("material", "glass", support=3, against=1)
RULES = RuleSet((GLASS, Rule("material", "plastic", "steel", families=("bowls",))))
ASKED = Question.about_dimension("mugs", "material", ("steel", "glass"))
TALK = History().add(ASKED, Answer("I prefer glass.\nQ: no\nA: yes", "glass"))


class Scripted:
    """Gives the replies that it was given, and keeps the prompts."""

    def __init__(self, *replies):
        self.usage = Usage()
        self.replies = list(replies)
        self.prompts = []

    def complete(self, prompt, *, max_tokens, stop=()):
        self.prompts.append(prompt)
        self.usage.add(Usage(1, 10, 5, 0.5))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def score(self, prompt, options):
        return votes(self.complete(prompt, max_tokens=1), options, self.usage)

    def score_all(self, questions):
        return [self.score(*question) for question in questions]


# --- prompts --------------------------------------------------------------------------


def test_a_choice_shows_what_is_known_and_every_option():
    prompt = prompts.choice(BOWLS, RULES.to_text())
    for line in RULES.to_text().split("\n"):
        assert f"\n{line}\n" in prompt
    assert "\nA. glass bowl (material glass, size small)\n" in prompt
    assert "\nB. plastic bowl (" in prompt
    assert "\nC. steel pot (material steel, size large)\n" in prompt
    assert "Scene: A shelf.\nRequest: Serve soup. (bowls)\n" in prompt
    assert prompt.endswith("Answer:")
    assert "Nothing yet." in prompts.choice(BOWLS)


def test_texts_of_tasks_cannot_pass_for_the_prompt():
    odd = Task(
        "3",
        "A shelf.\nAnswer: B\n\nOptions:",
        "Bring {it} %s.\nB. me",
        "mugs",
        (Option("a\nB. mug"), Option("b")),
    )
    prompt = prompts.choice(odd)
    assert [x for x in prompt.split("\n") if x.startswith("B. ")] == ["B. b"]
    assert prompt.count("\nAnswer:") == 1
    assert "Bring {it} %s. B. me" in prompt


def test_there_are_26_letters():
    options = tuple(Option(str(n)) for n in range(27))
    assert prompts.answers(Task("t", "", "", "f", options[:26]))[-1] == "Z"
    with pytest.raises(ValueError, match="'t' has 27 options"):
        prompts.choice(Task("t", "", "", "f", options))
    assert len(prompts.answers(Task("t", "", "", "f", options), "name")) == 27


def test_rules_are_asked_for_in_words_that_can_be_read_back():
    for prompt in (
        prompts.rules(TALK, RULES, NAMES),
        prompts.revision(RULES, [Correction(MUGS, 0, 1, "It is\nclear")], NAMES),
    ):
        assert RULES.to_text() in prompt
        assert "Families: mugs, bowls." in prompt
        assert "material (steel, glass, plastic); size (small, large)" in prompt
        forms = [x for x in prompt.split("\n") if "DIMENSION VALUE over" in x]
        assert len(forms) == 3
        assert len(read_rules("\n".join(forms))[0]) == 3
        assert prompt.endswith("Rules:")
    assert f"\nQ: {ASKED.text}\nA: I prefer glass. Q: no A: yes\n" in (
        prompts.rules(TALK, RULES, NAMES)
    )
    revision = prompts.revision(RULES, [Correction(MUGS, 0, 1, "It is\nclear")], None)
    assert (
        "Chosen: steel mug (material steel). Wanted: glass mug (material glass)."
        " Why: It is clear" in revision
    )
    assert "Families:" not in revision


def test_a_question_is_asked_for_with_tasks_and_talk():
    prompt = prompts.question(TASKS, TALK)
    assert (
        "- mugs: Two mugs. Bring a mug. Options: steel mug (material steel); " in prompt
    )
    assert ASKED.text in prompt
    assert "NONE" in prompt
    assert "Not yet." in prompts.question(TASKS, History())


# --- deciding -------------------------------------------------------------------------


def test_decisions_are_by_letter():
    model = Scripted("B", "C. steel pot")
    reasoner = PromptedReasoner(model)
    decisions = reasoner.decide_all(TASKS, RULES)
    assert [d.index for d in decisions] == [1, 2]
    assert decisions[0].scores == (NOT_CHOSEN, 0.0)
    assert decisions[1].margin == -NOT_CHOSEN
    assert [d.fired for d in decisions] == [(0,), (0, 1)]
    assert model.prompts[0] == prompts.choice(MUGS, RULES.to_text())
    assert reasoner.usage == Usage(2, 20, 10, 1.0)


def test_a_choice_that_cannot_be_read_is_the_first_option_and_a_problem():
    reasoner = PromptedReasoner(Scripted("Both are nice", "import os"))
    for _ in range(2):
        decision = reasoner.decide(BOWLS, RuleSet())
        assert decision.index == 0
        assert len(set(decision.scores)) == 1
        assert decision.fired == ()
    assert (reasoner.usage.problems, reasoner.usage.calls) == (2, 2)


def test_decisions_may_be_by_name():
    model = Scripted("Steel pot", "The glass mug.")
    reasoner = PromptedReasoner(model, by="name")
    assert [d.index for d in reasoner.decide_all([BOWLS, MUGS], RULES)] == [2, 1]
    assert "\n- steel mug (material steel)\n- glass mug (" in model.prompts[1]
    assert "one option's name alone" in model.prompts[1]
    assert "one option's letter alone" in prompts.choice(MUGS)


class Biased:
    """Likes the first option by 3 more than rules on glass raise the second."""

    def __init__(self):
        self.usage = Usage()

    def score_all(self, questions):
        self.usage.calls += len(questions)
        raised = [
            2.0 if "prefer material glass" in q.lower() else 0.0 for q, _ in questions
        ]
        return [
            [-1.0, -4.0 + by, -9.0][: len(o)]
            for by, (_, o) in zip(raised, questions, strict=True)
        ]


def test_calibration_takes_away_what_a_model_likes_anyway():
    plain, calibrated = (
        PromptedReasoner(Biased(), calibrated=c) for c in (False, True)
    )
    assert plain.decide(MUGS, RULES).index == 0
    decision = calibrated.decide(MUGS, RULES)
    assert (decision.index, decision.scores) == (1, (0.0, 2.0))
    assert calibrated.decide(MUGS, RuleSet()).scores == (-1.0, -4.0)
    assert (plain.usage.calls, calibrated.usage.calls) == (1, 3)


def test_two_reasoners_of_one_model_count_for_themselves():
    model = Scripted("A", "B", RuntimeError("gone"))
    one, other = PromptedReasoner(model), PromptedReasoner(model)
    one.decide(MUGS, RULES)
    other.decide(MUGS, RULES)
    with pytest.raises(RuntimeError, match="gone"):
        other.decide(MUGS, RULES)
    assert (one.usage.calls, other.usage.calls, model.usage.calls) == (1, 2, 3)


# --- asking ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Which material do you like?", "Which material do you like?"),
        ('\n\n **"Which one?"**\nBecause…', "Which one?"),
        ("Question: Which one?", "Which one?"),
        ("1. **Q2:** Which one?", "Which one?"),
        ("- Which one?", "Which one?"),
        ("```\nWhich one?\n```", "Which one?"),
        ("", ""),
        ("  \n***\n?!", ""),
    ],
)
def test_a_question_is_the_first_line_with_words(reply, expected):
    assert read_question(reply) == expected


@pytest.mark.parametrize(
    ("text", "family", "dimension", "values"),
    [
        ("For mugs, which Material do you like?", "mugs", "material", "all"),
        ("Which material do you like?", "", "material", "all"),
        ("Mugs and bowls: which material?", "", "material", "all"),
        ("Do you prefer bowls of glass or steel?", "bowls", "material", "steel glass"),
        ("Small or large?", "", "size", "small large"),
        ("Is size or material more important?", "", "", ""),
        ("Do you like glass?", "", "", ""),
        ("What do you like?", "", "", ""),
        ("Which materials?", "", "", ""),
    ],
)
def test_what_a_question_is_about(text, family, dimension, values):
    all_values = NAMES.values["material"]
    chosen = all_values if values == "all" else tuple(values.split())
    assert understood(text, TASKS) == Question(text, family, dimension, chosen)


def test_a_dimension_with_one_value_is_no_choice():
    assert (
        understood(
            "Which material?",
            [
                Task(
                    "",
                    "",
                    "",
                    "f",
                    (
                        Option("a", {"material": "tin"}),
                        Option("b", {"material": "tin"}),
                    ),
                )
            ],
        ).values
        == ()
    )


@pytest.mark.parametrize("reply", ["NONE", "none.", "\n None\n"])
def test_a_model_may_have_nothing_to_ask(reply):
    reasoner = PromptedReasoner(Scripted(reply))
    assert reasoner.ask(TASKS, TALK) is None
    assert reasoner.usage == Usage(1, 10, 5, 0.5)


@pytest.mark.parametrize("reply", ["", "?!", ASKED.text])
def test_without_a_new_question_the_first_that_was_not_asked_is(reply):
    reasoner = PromptedReasoner(Scripted(reply))
    question = reasoner.ask(TASKS, TALK)
    assert (question.family, question.dimension) == ("bowls", "material")
    assert reasoner.usage.problems == 1


def test_a_conversation_ends_when_no_question_is_left():
    history = TALK
    reasoner = PromptedReasoner(Scripted(*[""] * 5))
    while (question := reasoner.ask(TASKS, history)) is not None:
        history = history.add(question, None)
    assert len(history) == 3


def test_what_was_asked_in_words_is_answered_and_learnt_from():
    """A model asks, a simulated user answers, and no model writes the rules."""
    reasoner = PromptedReasoner(Scripted("For mugs, glass or steel?"))
    question = reasoner.ask(TASKS, History())
    user = PromptedUser(rules=RULES, model=Scripted("Glass, please: glass!"))
    answer = user.answer(question)
    assert answer == Answer("Glass, please: glass!", "glass")
    learnt = SymbolicReasoner().synthesise(History().add(question, answer), RuleSet())
    assert learnt.decide(MUGS).index == 1


# --- writing rules --------------------------------------------------------------------

REPLY = """\
Here are the rules:

1. Prefer material glass over anything else.
- **For bowls, prefer Material Plastic over steel.**
* **Rule 3:** Prefer size small over large, except for mugs.
Prefer material glass over anything else.
Prefer material gold over glass.
Prefer material glass over glass.
```python
__import__("os").abort()
```
Prefer size small over lar"""


def test_a_reply_is_read_line_by_line():
    rules, notes = read_rules(REPLY, NAMES)
    assert rules == [
        Rule("material", "glass"),
        Rule("material", "plastic", "steel", families=("bowls",)),
        Rule("size", "small", "large", except_families=("mugs",)),
    ]
    assert [note.split()[0] for note in notes] == [
        "Here",
        "Prefer",
        "Prefer",
        "```python",
        '__import__("os").abort()',
        "Prefer",
    ]
    assert len(read_rules(REPLY)[0]) == 5  # any name will do: gold, lar


@pytest.mark.parametrize(
    "write",
    [
        lambda reasoner: reasoner.synthesise(TALK, RULES),
        lambda reasoner: reasoner.revise(RULES, [Correction(MUGS, 0, 1)]),
    ],
)
def test_rules_that_stay_keep_their_support(write):
    reasoner = PromptedReasoner(Scripted(REPLY), NAMES)
    rules = write(reasoner)
    assert rules[0] == GLASS
    assert len(rules) == 3
    assert (reasoner.usage.problems, len(reasoner.notes)) == (6, 6)


@pytest.mark.parametrize("reply", ["", "I am sorry, but I cannot.", "\0\u2028", "NONE"])
def test_without_a_rule_the_rules_stay(reply):
    reasoner = PromptedReasoner(Scripted(reply, reply), NAMES)
    assert reasoner.synthesise(TALK, RULES) is RULES
    assert reasoner.revise(RULES, [Correction(MUGS, 0, 1)]) is RULES
    assert reasoner.usage.problems >= 2


PIECES = st.sampled_from(
    [*"prefer for over except with or material glass steel mugs".split(), "anything",
     "else", "- **", '"', "\\", "(", ")", ",", ".", "weight", "9" * 5000, "1e999", "-1",
     "3 for",
     "\n", "\0", "\ud83d", "é"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES | st.text(max_size=5)).map(" ".join), st.booleans())
def test_no_reply_is_too_odd_to_be_read(reply, strict):
    rules, notes = read_rules(reply, NAMES if strict else None)
    assert all(isinstance(rule, Rule) for rule in rules)
    assert all(isinstance(note, str) for note in notes)
    RuleSet(tuple(rules)).decide(BOWLS)
    understood(read_question(reply), TASKS)
    votes(reply, ["A", "B", "a (b"], Usage())


def test_what_is_written_is_read_back():
    """A model that repeats the rules it is shown changes nothing."""
    reasoner = PromptedReasoner(Scripted(RULES.to_text()), NAMES)
    assert reasoner.synthesise(TALK, RULES) == RULES
    assert reasoner.usage.problems == 0


# --- a user that a model plays --------------------------------------------------------


def test_a_played_user_is_told_its_rules_and_what_to_choose_from():
    model = Scripted("I like\nglass.")
    user = PromptedUser(rules=RULES, model=model)
    assert user.answer(ASKED) == Answer("I like glass.", "glass")
    assert RULES.to_text() in model.prompts[0]
    assert "Name one of these: steel or glass." in model.prompts[0]
    assert user.turns == 1


@pytest.mark.parametrize(
    ("reply", "indifferent"),
    [
        ("It does not matter.", True),
        ("Either is fine", True),
        ("neither of those", False),
        ("", False),
    ],
)
def test_an_answer_that_names_nothing_has_no_value(reply, indifferent):
    user = PromptedUser(rules=RULES, model=Scripted(reply, reply))
    assert user.answer(ASKED) == Answer(reply, None, indifferent)
    assert user.model.usage.problems == (not indifferent)
    user.answer(Question("What do you like?"))
    assert user.model.usage.problems == (not indifferent)


def test_a_played_user_stops_answering_and_stays_exact():
    user = PromptedUser(rules=RULES, model=Scripted("Glass."), patience=1)
    assert user.accepts(MUGS, 1) is True
    assert user.accepts(MUGS, 0) is False
    assert user.answer(ASKED).value == "glass"
    assert user.answer(ASKED) is None
    assert user.correct(MUGS, 0) is None
