import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from clipr_toys import KNOWN, NEW, draw

from ftlib.clipr.loop import LearningInterrupted, State, accuracy, learn
from ftlib.clipr.reasoners import SymbolicReasoner
from ftlib.clipr.rules import RuleSet, Vocabulary
from ftlib.clipr.settings import ConversationSettings, GateSettings, Settings
from ftlib.clipr.users import SimulatedUser, UserSettings, draw_rules

TALK = ConversationSettings(questions=4, candidates=200)
ADAPTIVE = Settings(conversation=TALK)
FIXED = replace(ADAPTIVE, adaptive=False)
MUTE = replace(ADAPTIVE, conversation=replace(TALK, questions=0))
EXAMPLES = draw(8, seed=1)
TASKS = draw(64, seed=2)
UNSEEN = draw(50, seed=3)
STRANGE = draw(50, seed=4, families=NEW)
VOCABULARY = Vocabulary.of([*EXAMPLES, *TASKS])


def hidden(seed):
    return draw_rules(VOCABULARY, seed, UserSettings(exceptions=0))


def score(state, user, tasks=UNSEEN):
    return accuracy(state.rules.decide, user.right, tasks)


def alike(a, b):
    """Equal but for the time that was used."""
    return untimed(a) == untimed(b)


def untimed(state):
    return replace(state, usage=replace(state.usage, seconds=0.0))


def finished(user, settings=ADAPTIVE, state=None, tasks=TASKS, save=None):
    saved = [] if save is None else save
    reasoner = SymbolicReasoner(settings)
    return learn(reasoner, user, EXAMPLES, tasks, settings, state, saved.append)


# --- CLIPR --------------------------------------------------------------------------


def test_without_a_gate_the_rules_of_the_conversation_stay():
    saved = []
    user = SimulatedUser(hidden(0))
    state = finished(user, FIXED, save=saved)
    written = [s.rules for s in saved if s.phase == "decide" and not s.decisions]
    assert len(written) == 1
    assert written[0] == state.rules
    assert len(state.rules) > 0
    assert state.turns == user.turns == len(state.history) == 4
    assert state.corrected == 0
    assert state.reactions == user.reactions == len(TASKS) == 64
    assert [batch.decided for batch in state.batches] == [8] * 8
    assert state.phase == "done"
    # 4 questions, one synthesis, 64 decisions
    assert state.usage.calls == 4 + 1 + 64


def test_a_conversation_is_better_than_none():
    fixed, mute = [], []
    for seed in range(6):
        user = SimulatedUser(hidden(seed))
        fixed.append(score(finished(user, FIXED, tasks=[]), user))
        mute.append(accuracy(RuleSet().decide, user.right, UNSEEN))
    assert np.mean(fixed) > np.mean(mute) + 0.2


def test_with_no_tasks_to_decide_there_are_rules_and_no_batches():
    state = finished(SimulatedUser(hidden(0)), tasks=[])
    assert state.batches == ()
    assert len(state.rules) > 0
    assert state.phase == "done"


# --- Adaptive-CLIPR -----------------------------------------------------------------


def test_with_a_gate_rules_get_better_also_for_new_families():
    seen, new = [], []
    for seed in range(6):
        user = SimulatedUser(hidden(seed))
        state = finished(user)
        seen.append(score(state, user))
        new.append(score(state, user, STRANGE))
        assert state.turns == user.turns <= 4 + 3 * 8
    assert np.mean(seen) > 0.93
    assert np.mean(new) > 0.93


def test_a_wrong_start_is_recovered_from():
    """Hidden rules turned over: nothing can be worse to begin with."""
    start, end = [], []
    for seed in range(5):
        user = SimulatedUser(hidden(seed))
        inverted = [
            replace(rule, preferred=values[-1], over=rule.preferred, support=2)
            for rule in user.rules
            if (values := VOCABULARY.values[rule.dimension])[-1] != rule.preferred
        ]
        begin = State(rules=RuleSet(tuple(inverted)))
        start.append(score(begin, user))
        end.append(score(finished(user, MUTE, begin), user))
    assert np.mean(start) < 0.4
    assert np.mean(end) > 0.9


def test_rules_are_frozen_after_enough_good_batches():
    user = SimulatedUser(hidden(0))
    quick = replace(MUTE, gate=GateSettings(patience=2))
    saved = []
    state = finished(user, quick, State(rules=hidden(0)), save=saved)
    assert state.frozen
    assert state.corrected == 0
    frozen = [one for one in saved if one.frozen]
    assert len(frozen[0].batches) == 2
    assert {one.rules for one in frozen} == {state.rules}
    assert {one.rules for one in saved} != {state.rules}  # counted before


def test_a_user_who_changes_is_followed_if_rules_are_not_frozen():
    settings = replace(MUTE, gate=GateSettings(patience=None))
    tasks = [*TASKS, *draw(64, seed=5)]
    followed = []
    for seed in range(5):
        user = SimulatedUser(hidden(seed), later=hidden(seed + 50), changes_after=64)
        first = finished(SimulatedUser(hidden(seed)), settings)
        before = accuracy(
            first.rules.decide, SimulatedUser(hidden(seed + 50)).right, UNSEEN
        )
        state = finished(user, settings, tasks=tasks)
        followed.append((before, score(state, user)))
    before, after = np.mean(followed, axis=0)
    assert before < 0.7
    assert after > 0.85


def test_errors_of_the_user_do_not_undo_what_was_learnt():
    scores = []
    for seed in range(5):
        user = SimulatedUser(hidden(seed), seed, noise=0.1)
        scores.append(score(finished(user), user))
    assert np.mean(scores) > 0.85


def test_a_user_who_contradicts_himself_at_every_turn_breaks_nothing():
    state = finished(SimulatedUser(hidden(0), noise=1.0))
    assert state.phase == "done"
    assert len(state.decisions) == 64


# --- budgets and silence --------------------------------------------------------------


@pytest.mark.parametrize("patience", [0, 1, 3, 6])
def test_a_user_who_stops_answering_is_not_asked_again(patience):
    user = SimulatedUser(hidden(1), patience=patience)
    state = finished(user)
    assert state.phase == "done"
    assert state.turns == user.turns <= patience
    assert len(state.decisions) == 64
    if patience <= 3:
        assert state.history.stopped
        assert {batch.observed for batch in state.batches} == {0}
    full = finished(SimulatedUser(hidden(1)))
    assert (
        state.history.answered == full.history.answered[: len(state.history.answered)]
    )


@pytest.mark.parametrize("turns", [0, 2, 5, 9])
def test_no_more_turns_are_used_than_there_are(turns):
    user = SimulatedUser(hidden(1))
    state = finished(user, replace(ADAPTIVE, turns=turns))
    assert user.turns == state.turns <= turns
    assert state.turns >= min(turns, 5)


# --- failures -------------------------------------------------------------------------


class Failing:
    """An endpoint that fails at some calls: what it was asked there is not answered."""

    def __init__(self, reasoner, at):
        self.reasoner = reasoner
        self.at = set(at)
        self.calls = 0

    @property
    def usage(self):
        return self.reasoner.usage

    def __getattr__(self, name):
        def method(*args):
            self.calls += 1
            if self.calls in self.at:
                self.usage.calls += 1
                raise TimeoutError("the server does not answer")
            return getattr(self.reasoner, name)(*args)

        return method


def test_after_any_failure_learning_goes_on_as_if_there_had_been_none(tmp_path):
    whole = finished(SimulatedUser(hidden(2), seed=2, noise=0.05))
    assert whole.corrected > 0
    calls = whole.usage.calls
    failures = [1, 3, 6, 7, 20, 21, calls // 2, calls - 1]
    reasoner = Failing(SymbolicReasoner(ADAPTIVE), failures)
    user = SimulatedUser(hidden(2), seed=2, noise=0.05)
    failed = []
    state = None
    while state is None or state.phase != "done":
        try:
            state = learn(reasoner, user, EXAMPLES, TASKS, ADAPTIVE, state)
        except LearningInterrupted as interrupted:
            failed.append(interrupted)
            interrupted.state.save(tmp_path / "state.json")
            state = State.load(tmp_path / "state.json")
    assert len(failed) == len(failures)
    assert all(isinstance(error.__cause__, TimeoutError) for error in failed)
    assert {error.state.phase for error in failed} >= {"converse", "decide"}
    assert "failed at 'converse', after 0 questions and 0 dec" in str(failed[0])
    assert state.usage.calls == calls + len(failures)  # what failed was paid for
    assert alike(replace(state, usage=whole.usage), whole)
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_learning_goes_on_from_any_state_that_was_saved():
    saved = []
    whole = finished(SimulatedUser(hidden(3)), save=saved)
    assert {s.phase for s in saved} == {
        *("converse", "write", "decide", "review", "correct", "revise", "done")
    }
    every = [s for s in saved if s.phase not in ("decide", "review")] + saved[::40]
    for state in every:
        again = State.from_json(json.loads(json.dumps(state.to_json())))
        assert again == state
        user = SimulatedUser(hidden(3), turns=state.turns, reactions=state.reactions)
        assert alike(finished(user, state=again), whole)


def test_every_step_takes_at_most_one_turn_and_forgets_nothing():
    saved = [State()]
    finished(SimulatedUser(hidden(3)), save=saved)
    for before, after in itertools.pairwise(saved):
        gained = (after.turns - before.turns) + (
            len(after.decisions) - len(before.decisions)
        )
        assert 0 <= gained <= 1
        assert after.history.turns[: len(before.history)] == before.history.turns
        assert after.decisions[: len(before.decisions)] == before.decisions
        assert after.usage.calls - before.usage.calls <= 1


def test_a_state_of_other_tasks_is_refused():
    state = finished(SimulatedUser(hidden(0)))
    with pytest.raises(ValueError, match="decisions about other tasks"):
        finished(SimulatedUser(hidden(0)), state=state, tasks=TASKS[1:])
    begun = State(rules=state.rules)
    assert finished(SimulatedUser(hidden(0)), state=begun, tasks=TASKS[1:])


def test_keyboard_interrupts_pass_and_the_saved_state_is_whole():
    saved = []

    class Stopped(SimulatedUser):
        def correct(self, task, index):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finished(Stopped(hidden(3)), save=saved)
    assert saved[-1].phase == "correct"
    user = SimulatedUser(hidden(3), turns=4, reactions=saved[-1].reactions)
    whole = finished(SimulatedUser(hidden(3)))
    assert alike(finished(user, state=saved[-1]), whole)


def test_rules_are_handed_to_another_reasoner():
    """What one has learnt another decides by, with no more than the text."""
    user = SimulatedUser(hidden(4))
    state = finished(user)
    handed = RuleSet.from_text(state.rules.to_text(), VOCABULARY)
    other = SymbolicReasoner(seed=9)
    assert accuracy(lambda t: other.decide(t, handed), user.right, UNSEEN) == (
        score(state, user)
    )
    assert other.usage.calls == len(UNSEEN)
    assert other.usage.tokens == 0
    assert {t.family for t in UNSEEN} <= set(KNOWN)
