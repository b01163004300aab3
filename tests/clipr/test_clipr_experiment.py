"""The plan runs at toy size, people differ, and what is counted is what happened."""

import dataclasses
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ftlib import results
from ftlib.clipr import experiment, runs, tidybot
from ftlib.clipr.division import choice
from ftlib.clipr.loop import State
from ftlib.clipr.rules import Vocabulary
from ftlib.clipr.settings import BUDGETS, Population, Temper, within
from ftlib.data import DataUnavailable, fetch
from ftlib.results import Metric, NotRecordedError

TOY = Population(people=2, examples=6, stream=10, test=9)
LEARNING = [n for n in experiment.methods(0) if n not in ("zero-shot", "hidden rules")]
ARMS = {str(arm): arm for arm in experiment.symbolic_arms(TOY)}


def skip_unless_here(arm):
    for path in arm.data:
        try:
            fetch(path)
        except DataUnavailable:
            pytest.skip(f"{path} is not here")


# --- the plan -----------------------------------------------------------------


def test_arms_have_distinct_names_and_settings():
    names = [str(arm) for arm in experiment.plan("cpu")]
    assert len(names) == len(set(names))
    for name in experiment.methods(0):
        for world in ("kitchens", "manipulation"):
            learns = name in LEARNING
            wanted = [f"{name} {turns}" for turns in BUDGETS] if learns else [name]
            assert {f"{world}/{one}" for one in wanted} < set(names)
    described = [json.dumps({**a.settings, "e": a.experiment}) for a in ARMS.values()]
    assert len(set(described)) == len(described)


@pytest.mark.parametrize(
    "name",
    [
        "kitchens/zero-shot",
        "kitchens/hidden rules",
        *(f"kitchens/{name} 12" for name in LEARNING),
        "manipulation/CLIPR 6",
        "feedback/no reasons",
        "feedback/gate always open",
        "recovery/inverted, both",
        "recovery/another's, kept",
        "tempers/Adaptive-CLIPR, changes",
        "tempers/memory, silent after 6",
    ],
)
def test_arms_run_and_say_what_was_used(name):
    arm = ARMS[name]
    skip_unless_here(arm)
    found = arm.run(0)
    assert arm.run(0) == found
    assert 0 <= found["id"].value <= 1
    assert found["id"].n == TOY.people
    assert found["turns"].value <= arm.settings["turns"]
    record = _record(found)
    for test in ("id", "ood"):
        each = runs.by_person([record], test)
        assert each.mean() == pytest.approx(found[test].value)
        assert len(each) == TOY.people
    if name == "kitchens/hidden rules":
        assert found["id"].value == found["ood"].value == 1
    if "zero-shot" in name:
        assert found["learning calls"].value == found["turns"].value == 0


def _record(metrics, seed=0):
    """As much of a record as is read here."""
    found = {
        name: value if isinstance(value, Metric) else Metric(value, None)
        for name, value in metrics.items()
    }
    return SimpleNamespace(seed=seed, metrics=found)


# --- people -------------------------------------------------------------------


def test_people_differ_and_their_tests_are_new():
    one, other = runs.people(TOY, 0)
    assert one.user.rules != other.user.rules
    again = runs.people(TOY, 0)[0]
    assert again.user.rules == one.user.rules
    assert again.examples == one.examples
    met = {choice(task) for task in [*one.examples, *one.stream]}
    families = {task.family for task in [*one.examples, *one.stream]}
    assert len(one.examples) == TOY.examples
    assert len(one.stream) == TOY.stream
    assert len(one.tests["id"]) == len(one.tests["ood"]) == TOY.test
    assert not met & {choice(task) for task in one.tests["id"]}
    assert not met & {choice(task) for task in one.validation}
    assert not families & {task.family for task in one.tests["ood"]}


def test_inverted_rules_are_wrong_wherever_the_user_cares_for_two_things():
    person = runs.people(TOY, 0)[0]
    names = Vocabulary.of([*person.examples, *person.stream])
    wrong = runs.inverted(person.user.rules, names)
    tasks = [task for task in person.tests["id"] if len(task.options) == 2]
    assert tasks
    for task in tasks:
        liked = person.user.rules.best(task)
        if len(liked) == 1:
            assert wrong.decide(task).index != liked[0]


def test_another_persons_rules_are_not_the_users():
    person = runs.people(TOY, 0)[0]
    start = experiment.STARTS["another's"](person)
    assert {rule.claim for rule in start} != {r.claim for r in person.user.rules}
    assert all(rule.support > 0 for rule in start)


# --- what is counted ------------------------------------------------------------


def test_calls_turns_and_tokens_are_those_of_the_state():
    person = runs.people(TOY, 1)[0]
    settings = within(8, adaptive=True)
    settings = replace(
        settings, conversation=replace(settings.conversation, candidates=100)
    )
    method = experiment.clipr(settings, person)
    trial = runs.try_out(method, person, 8)
    state = method.state
    assert isinstance(state, State)
    assert trial.turns == state.turns <= 8
    assert trial.reactions == len(state.decisions) == TOY.stream
    # Asks, one writing and the revisions: everything but the decisions on the way.
    assert trial.learning_calls == state.usage.calls - TOY.stream
    assert trial.calls == 1
    assert trial.rules == len(state.rules)
    assert trial.accepted == tuple(batch.share for batch in state.batches)
    right = [
        person.user.right(task, state.rules.decide(task).index)
        for task in person.tests["ood"]
    ]
    assert trial.accuracy["ood"] == pytest.approx(np.mean(right))


def test_who_changes_is_tested_on_the_new_preferences():
    population = replace(TOY, temper=Temper(changes_after=10**6))
    person = runs.people(population, 0)[0]
    oracle = experiment.methods(0)["hidden rules"](person)
    before = dataclasses.replace(person.user)
    trial = runs.try_out(oracle, person, 0)
    assert trial.accuracy["id"] == 1
    assert person.user.preferences == person.user.later != before.preferences


def test_a_longer_prompt_has_more_tokens():
    person = runs.people(TOY, 0)[0]
    few = runs.try_out(experiment.methods(0)["zero-shot"](person), person, 0)
    person = runs.people(TOY, 0)[0]
    many = runs.try_out(experiment.methods(6)["nearest examples"](person), person, 6)
    assert many.tokens > few.tokens
    person = runs.people(TOY, 0)[0]
    assert (
        runs.try_out(experiment.methods(6)["reward"](person), person, 6).tokens is None
    )


def test_numbers_of_people_come_seed_by_seed_in_order():
    records = [
        _record(runs.person_metrics("id", {str(n): s + n / 100 for n in range(12)}), s)
        for s in (1, 0)
    ]
    expected = [s + n / 100 for s in (0, 1) for n in range(12)]
    np.testing.assert_allclose(runs.by_person(records, "id"), expected)


# --- TidyBot --------------------------------------------------------------------


def test_replayed_rows_are_the_published_ones():
    arm = ARMS["tidybot/llm-rule, unseen"]
    found = arm.run(0)
    assert found["accuracy"].value == pytest.approx(10507 / 11520, abs=1e-12)
    assert found["accuracy"].n == len(tidybot.scenarios())
    assert found["pooled"].n == 672


def test_what_is_recorded_is_what_the_plan_runs():
    try:
        recorded = results.load("clipr", "cpu")
    except NotRecordedError:
        pytest.skip("clipr is not recorded at scale cpu yet")
    plan = {str(arm): arm for arm in experiment.plan("cpu")}
    for record in recorded:
        arm = plan[f"{record.experiment}/{record.arm}"]
        assert record.settings == arm.settings
    assert {f"{r.experiment}/{r.arm}" for r in recorded} == set(plan)
