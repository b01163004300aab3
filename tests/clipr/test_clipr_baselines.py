import numpy as np
import pytest
from clipr_toys import KNOWN, NEW, draw, of_materials, option, task
from scipy.optimize import minimize

from ftlib.clipr.baselines import (
    AskFirst,
    BradleyTerry,
    CorrectedReward,
    CorrectedSummary,
    FrozenSummary,
    Memory,
    NearestExamples,
    Oracle,
    ZeroShot,
    alike,
    ask,
    corrections,
)
from ftlib.clipr.conversation import Question, task_questions
from ftlib.clipr.loop import accuracy
from ftlib.clipr.reasoners import SymbolicReasoner
from ftlib.clipr.rules import Rule, RuleSet, Vocabulary
from ftlib.clipr.settings import ConversationSettings, Settings, SynthesisSettings
from ftlib.clipr.synthesis import comparisons
from ftlib.clipr.tasks import Option
from ftlib.clipr.users import SimulatedUser, UserSettings, draw_rules

EXAMPLES = draw(30, seed=1)
UNSEEN = draw(50, seed=3)
STRANGE = draw(50, seed=4, families=NEW)
VOCABULARY = Vocabulary.of(EXAMPLES)
SETTINGS = Settings(conversation=ConversationSettings(candidates=300))


def reasoner():
    return SymbolicReasoner(SETTINGS)


ALL = {
    "zero-shot": lambda: ZeroShot(reasoner()),
    "nearest": NearestExamples,
    "summary": lambda: FrozenSummary(reasoner()),
    "ask": lambda: AskFirst(reasoner()),
    "memory": lambda: Memory(reasoner()),
    "reward": BradleyTerry,
    "corrected reward": CorrectedReward,
    "corrected summary": lambda: CorrectedSummary(reasoner(), SynthesisSettings()),
}


def hidden(seed):
    return draw_rules(VOCABULARY, seed, UserSettings(exceptions=0))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("turns", "patience"), [(0, None), (5, None), (9, 3), (4, 0)])
def test_turns_are_kept_to_and_silence_is_borne(name, turns, patience):
    user = SimulatedUser(hidden(0), patience=patience)
    baseline = ALL[name]()
    baseline.learn(user, EXAMPLES, turns)
    assert user.turns <= min(turns, turns if patience is None else patience)
    before = baseline.usage.calls
    for one in UNSEEN[:5]:
        decision = baseline.decide(one)
        assert len(decision.scores) == len(one.options)
        assert decision.scores[decision.index] == max(decision.scores)
        if user.turns == 0:
            assert decision.index == 0
    assert baseline.usage.calls >= before + 5


@pytest.mark.parametrize("name", [name for name in ALL if name != "zero-shot"])
def test_each_learns(name):
    gained = []
    for seed in range(6):
        user = SimulatedUser(hidden(seed))
        baseline = ALL[name]()
        baseline.learn(user, EXAMPLES[:15], 10)
        nothing = accuracy(RuleSet().decide, user.right, UNSEEN)
        gained.append(accuracy(baseline.decide, user.right, UNSEEN) - nothing)
    assert np.mean(gained) > 0.15


def test_the_oracle_is_always_right():
    for seed in range(4):
        user = SimulatedUser(draw_rules(VOCABULARY, seed))
        oracle = Oracle(user)
        oracle.learn(user, EXAMPLES, 9)
        assert user.turns == 0
        assert accuracy(oracle.decide, user.right, UNSEEN + STRANGE) == 1


def test_questions_end_with_the_turns_or_the_answers():
    questions = task_questions(EXAMPLES)
    assert len(ask(SimulatedUser(hidden(0)), questions, 4)) == 4
    assert len(ask(SimulatedUser(hidden(0)), questions[:2], 4)) == 2
    stopped = ask(SimulatedUser(hidden(0), patience=2), questions, 9)
    assert len(stopped) == 3
    assert stopped.stopped


def test_likeness_is_the_share_of_equal_attributes():
    a = option(material="glass", size="big")
    assert alike(a, a) == 1
    assert alike(a, option(material="glass", size="small")) == 0.5
    assert alike(a, option(material="glass")) == 0.5
    assert alike(a, Option("bare")) == 0
    assert alike(Option("bare"), Option("empty")) == 0


def test_nearest_examples_votes_by_hand():
    user = SimulatedUser(RuleSet((Rule("material", "steel"),)))
    nearest = NearestExamples(nearest=1)
    nearest.learn(
        user,
        [
            of_materials("glass", "steel", "plastic", family="cups", id="1"),
            of_materials("glass", "plastic", "steel", family="plates", id="2"),
        ],
        2,
    )
    decision = nearest.decide(of_materials("plastic", "steel", family="cups"))
    assert decision.scores == (0 - 1 / 2, 1 - 0)
    assert nearest.decide(of_materials("wood", "steel", family="cups")).index == 1


def test_bare_answers_that_contradict_one_another_cancel():
    class Fickle(SimulatedUser):
        def answer(self, question):
            self.rules = RuleSet((Rule("size", ("big", "small")[self.turns % 2]),))
            return super().answer(question)

    examples = [
        task(option(size="big"), option(size="small"), family=family, id=family)
        for family in KNOWN
    ]
    asked = AskFirst(reasoner())
    asked.learn(Fickle(RuleSet()), examples, 2)
    assert {rule.claim for rule in asked.rules} == {
        Rule("size", "big", "small"),
        Rule("size", "small", "big"),
    }
    assert asked.decide(examples[0]).scores == (0, 0)


def test_memory_uses_the_corrections_of_the_most_similar_tasks():
    rules = RuleSet.from_text(
        "For cups, prefer material steel over glass.\n"
        "For plates, prefer material glass over steel."
    )
    user = SimulatedUser(rules)
    examples = [
        of_materials("glass", "steel", family="cups", id="1"),
        of_materials("steel", "glass", family="plates", id="2"),
    ]
    memory = Memory(reasoner(), nearest=1)
    memory.learn(user, examples, 2)
    assert user.turns == len(memory.memory) == 2
    # two decisions of two calls each, and one call for each correction
    assert memory.usage.calls == 2 * 2 + 2
    for family, best in [("cups", 1), ("plates", 0)]:
        one = of_materials("glass", "steel", family=family)
        assert memory.decide(one).index == best


def test_a_summary_is_never_changed():
    user = SimulatedUser(hidden(1))
    summary = FrozenSummary(reasoner())
    summary.learn(user, EXAMPLES, 8)
    before = summary.rules
    for one in UNSEEN:
        summary.decide(one)
    assert summary.rules == before
    assert summary.usage.calls == 1 + len(UNSEEN)


def test_the_reward_is_the_minimum_that_a_general_solver_finds():
    user = SimulatedUser(hidden(2))
    model = BradleyTerry(inverse_penalty=0.7)
    model.learn(user, EXAMPLES, 12)
    history = ask(SimulatedUser(hidden(2)), task_questions(EXAMPLES), 12)
    observed = [c for c in comparisons(history) if not c.equal]

    def reward(weights, family, attributes):
        return sum(
            weights[model.columns[whose, *item]]
            for item in attributes.items()
            for whose in (None, family)
            if (whose, *item) in model.columns
        )

    def loss(weights):
        margins = np.array(
            [
                reward(weights, c.family, c.better) - reward(weights, c.family, c.worse)
                for c in observed
            ]
        )
        return weights @ weights / 2 + 0.7 * np.logaddexp(0, -margins).sum()

    found = minimize(loss, np.zeros(len(model.columns)), tol=1e-10)
    assert loss(model.reward) == pytest.approx(found.fun, abs=1e-4)
    np.testing.assert_allclose(model.reward, found.x, atol=2e-3)
    for one in [*UNSEEN, *STRANGE]:
        expected = [reward(model.reward, one.family, o.attributes) for o in one.options]
        assert model.decide(one).scores == pytest.approx(expected)


def test_an_attribute_that_was_never_seen_has_no_reward():
    model = BradleyTerry()
    model.learn(SimulatedUser(hidden(0)), EXAMPLES, 10)
    strange = task(option(material="gold"), option(material="tin"), family="vases")
    assert model.decide(strange).scores == (0, 0)


def test_indifferent_answers_teach_no_reward():
    model = BradleyTerry()
    model.learn(SimulatedUser(RuleSet()), EXAMPLES, 10)
    assert model.columns == {}
    assert model.decide(UNSEEN[0]).index == 0
    assert Question.about_task(UNSEEN[0]).task == UNSEEN[0]


def test_only_rejected_decisions_are_corrected():
    user = SimulatedUser(RuleSet((Rule("material", "steel"),)))
    examples = [
        of_materials("steel", "glass", id="1"),  # the first option is right
        of_materials("glass", "steel", id="2"),
        of_materials("plastic", "steel", id="3"),
        of_materials("wood", "steel", id="4"),
    ]
    first = ZeroShot(reasoner()).decide
    found = list(corrections(user, first, examples, turns=2))
    assert [(c.task.id, c.decided, c.chosen) for c in found] == [
        ("2", 0, 1),
        ("3", 0, 1),
    ]
    assert (user.turns, user.reactions) == (2, 3)


@pytest.mark.parametrize("gives_reasons", [True, False])
def test_a_reason_is_worth_more_than_a_choice_alone(gives_reasons):
    user = SimulatedUser(
        RuleSet((Rule("material", "steel"),)), gives_reasons=gives_reasons
    )
    examples = [
        task(
            option(material="glass", size="big"), option(material="steel", size="small")
        )
    ]
    for method in (ALL["corrected reward"](), ALL["corrected summary"]()):
        method.learn(user, examples, 1)
        by_material = method.decide(of_materials("glass", "steel"))
        by_size = method.decide(task(option(size="big"), option(size="small")))
        assert by_material.index == 1
        # Without a reason the size may have been why.
        assert by_size.margin < by_material.margin or not gives_reasons
        if not gives_reasons:
            assert by_size.index == 1


def test_what_a_model_would_read_is_what_was_learnt():
    user = SimulatedUser(hidden(1))
    told = {}
    for name, make in ALL.items():
        method = make()
        method.learn(user, EXAMPLES, 6)
        told[name] = method.told(UNSEEN[0])
    assert told["zero-shot"] == ""
    assert told["reward"] is told["corrected reward"] is None
    assert told["nearest"].count("\n") == 2 * 6 - 1
    assert told["ask"].startswith("Q: ")
    assert RuleSet.from_text(told["summary"])
    assert len(RuleSet.from_text(told["memory"])) <= 5
    assert Oracle(user).told(UNSEEN[0]) == hidden(1).to_text()
