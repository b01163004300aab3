"""Small models as readers and students, at toy size: arms run, and count."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from clipr_toys import draw, right_options
from test_clipr_models import llama, tokenizer
from tiny_models import CHATML

from ftlib import data, results
from ftlib.clipr import benchmarks, prompts, tidybot
from ftlib.clipr.benchmarks import (
    LARGE,
    READER,
    READINGS,
    STUDENT,
    TEACHERS,
    UNTAUGHT,
    WITHOUT_MODEL,
    Plan,
    Reading,
)
from ftlib.clipr.embedded import Words
from ftlib.clipr.models import LocalModel
from ftlib.clipr.rules import RuleSet
from ftlib.clipr.runs import by_person
from ftlib.clipr.settings import (
    STUDENT_RATES,
    STUDENT_TURNS,
    TRIED_RATES,
    TUNING_SEED,
    DistillationSettings,
)
from ftlib.results import NotRecordedError

TOY = Plan(
    "stories15m",
    taught=2,
    handed=1,
    labelled=12,
    test=5,
    read=2,
    scenarios=48,
    distillation=DistillationSettings(steps=2, batch_size=2, rank=2),
)
RULES = RuleSet.from_text(
    "Prefer material glass over plastic, except for bowls. (weight 2, 3 for, 0 against)"
    "\nPrefer size big."
)
TASKS = draw(4, seed=6)


class Letters(Words):
    """Texts by how often each letter is in them."""

    def __init__(self):
        pass

    def embed(self, texts):
        counts = [[t.count(x) for x in "abcdefghijklmnopqrstuvwxyz"] for t in texts]
        return np.array(counts) / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Toy models in place of the real ones, that read long prompts."""
    words = tokenizer(CHATML)
    model = llama(len(words))
    model.config.max_position_embeddings = 8192
    local = LocalModel(model, words)
    monkeypatch.setattr(benchmarks, "_pretrained", lambda name: local)
    monkeypatch.setattr(benchmarks, "_words", Letters)
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    benchmarks.scored.cache_clear()
    return local


@pytest.fixture
def tidy_data():
    here = {row.name: row.where for row in data.catalogue()}
    if "not here" in (here["tidybot"], here["tidybot-replies"]):
        pytest.skip("TidyBot is not here")


def arms_of(plan=TOY):
    made = [
        *benchmarks._distillation_arms(plan),
        *benchmarks._reasoner_arms(plan),
        *benchmarks._tidybot_arms(plan),
    ]
    return {str(arm): arm for arm in made}


# --- the plan -----------------------------------------------------------------


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_arms_have_distinct_names_and_say_what_they_need(scale):
    arms = benchmarks.small_arms() if scale == "cpu" else benchmarks.benchmark_arms()
    names = [str(arm) for arm in arms]
    assert len(set(names)) == len(names)
    described = [json.dumps({**a.settings, "e": a.experiment}) for a in arms]
    assert len(set(described)) == len(described)
    for arm in arms:
        model = "minilm-l6" if "encoder" in arm.settings else arm.settings["model"]
        assert arm.requires == [model]
        assert arm.experiment.endswith(arm.settings["model"])
        assert ("tidybot/scenarios.yml" in arm.data) == ("tidybot" in arm.experiment)


def test_the_plan_at_cpu():
    found = Counter(arm.experiment for arm in benchmarks.small_arms())
    assert found == {
        "distillation stories15m": len(UNTAUGHT) + len(TEACHERS),
        "distillation-learning-rate stories15m": len(TRIED_RATES),
        "reasoners smollm2-135m": 2 + len(READINGS) + 1,
        "tidybot words smollm2-135m": len(WITHOUT_MODEL) + 3,
    }


def test_every_student_has_a_rate_that_is_tried():
    for plan in (STUDENT, *LARGE):
        assert STUDENT_RATES[plan.model] in TRIED_RATES
    assert READER.model in [plan.model for plan in LARGE]


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_learning_rates_are_the_best_of_the_records(scale, best_rates):
    """Without records there is nothing they could follow."""
    try:
        records = results.load("clipr", scale)
    except NotRecordedError:
        pytest.skip(f"clipr is not recorded at scale {scale} yet")
    found = [r for r in records if r.experiment.startswith("distillation-learning")]
    for student, rate in best_rates(found, "student").items():
        assert STUDENT_RATES[student] == rate


# --- users --------------------------------------------------------------------


def test_rules_and_own_choices_come_from_as_many_turns():
    population = benchmarks._taught(TOY)
    for case in benchmarks.cases(population, 3):
        assert case.person.user.turns == STUDENT_TURNS
        assert len(case.rules) > 0
        assert len(case.person.stream) == TOY.labelled
        before = case.person.user.turns
        given = benchmarks.own_choices(case.person)
        assert case.person.user.turns - before == STUDENT_TURNS
        asked = {one.id for one in case.person.examples[:STUDENT_TURNS]}
        assert 0 < len(given) <= STUDENT_TURNS
        for lesson in given:
            assert lesson.task.id in asked
            assert case.person.user.right(lesson.task, lesson.best[0])


def test_what_is_taught_is_no_test():
    for case in benchmarks.cases(benchmarks._taught(TOY), 3):
        tests = {
            (t.goal, t.options) for part in case.person.tests.values() for t in part
        }
        for teach in TEACHERS.values():
            given = teach(case)
            assert given
            assert not {(one.task.goal, one.task.options) for one in given} & tests


# --- reading ------------------------------------------------------------------


@pytest.mark.parametrize("name", READINGS)
def test_scores_are_the_models_own(name, toys):
    reading = READINGS[name]
    one = next(task for task in TASKS if RULES.fired(task))
    model = benchmarks.reader("toy", reading, RULES)
    [made] = model.decide_all([one])

    def score(known):
        if reading.form == "one by one":
            return [toys.score(p, ["yes"])[0] for p in prompts.offers(one, known)]
        form = reading.form
        return toys.score(prompts.choice(one, known, form), prompts.answers(one, form))

    if reading.form == "one by one":
        known = "\n".join(RULES[at].claim.to_text() for at in RULES.fired(one))
        assert known
    else:
        known = RULES.to_text()
    expected = np.array(score(known if reading.rules else ""))
    if reading.calibrated:
        expected = expected - score("")
    assert made.scores == pytest.approx(expected.tolist(), rel=1e-5)
    assert made.index == int(expected.argmax())
    each = len(one.options) if reading.form == "one by one" else 1
    assert model.usage.calls == each * (2 if reading.calibrated else 1)


def test_what_was_asked_is_not_asked_again_and_still_counts(toys):
    first = benchmarks.reader("toy", Reading("name"), RULES)
    again = benchmarks.reader("toy", Reading("name"), RULES)
    made = first.decide_all(TASKS)
    read = toys.usage.calls
    assert again.decide_all(TASKS) == made
    assert toys.usage.calls == read
    assert again.usage == first.usage
    assert first.usage.calls == len(TASKS)
    other = benchmarks.reader("toy", Reading("name"), RuleSet(RULES[1:]))
    other.decide_all(TASKS)
    assert toys.usage.calls == read + len(TASKS)


# --- runs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n for n in arms_of() if n.startswith(("distillation s", "reasoners"))]
)
def test_an_arm_runs_and_its_numbers_fit(name):
    arm = arms_of()[name]
    metrics = arm.run(0)
    people = TOY.taught if name.startswith("distillation") else TOY.handed
    for test in ("id", "ood", "agreement id", "agreement ood"):
        assert metrics[test].n == people
        each = [metrics[f"bits/{test}/{at}"] for at in range(people)]
        assert metrics[test].value == pytest.approx(np.mean(each))
        assert all(0 <= share <= 1 for share in each)
    decided = TOY.test if name.startswith("distillation") else TOY.read
    assert metrics["calls"].n == 2 * people * decided
    assert metrics["seconds"].value > 0
    by_rules = name.endswith("symbolic")
    assert (metrics["agreement id"].value == 1) or not by_rules
    assert (metrics["tokens"].value == 0) == (by_rules or name.endswith("embeddings"))
    if "taught" in name:
        assert metrics["trained"] > 0
        assert metrics["lessons"] >= 2
        assert metrics["learn"] > 0


def test_a_model_alone_without_rules_is_counted():
    """Random weights write no rules; nothing breaks."""
    metrics = arms_of()["reasoners stories15m/alone"].run(0)
    assert metrics["rules"] == 0
    assert metrics["learning problems"] > 0


def test_students_leave_the_pretrained_model_as_it_is(toys):
    before = {name: w.clone() for name, w in toys.model.state_dict().items()}
    [case, _] = benchmarks.cases(benchmarks._taught(TOY), 0)
    given = TEACHERS["hidden rules"](case)
    student = benchmarks.teach(TOY, given, 1e-2, 0)
    assert toys.model.state_dict().keys() == before.keys()
    assert all((w == before[n]).all() for n, w in toys.model.state_dict().items())
    again = benchmarks.teach(TOY, given, 1e-2, 0)
    tasks = case.person.validation
    assert student.decide_all(tasks) == again.decide_all(tasks)
    untaught = benchmarks.reader("toy", READINGS["one by one, no rules"], case.rules)
    assert [d.scores for d in untaught.decide_all(tasks)] != [
        d.scores for d in student.decide_all(tasks)
    ]


def test_the_search_looks_at_validation_of_other_users_alone(monkeypatch):
    seen, decided = [], []
    real = benchmarks.people

    def noted(population, seed):
        seen.append((population.people, seed))
        return real(population, seed)

    def decide_all(self, tasks):
        decided.append(tasks)
        return real_decide(self, tasks)

    real_decide = benchmarks.Student.decide_all
    monkeypatch.setattr(benchmarks, "people", noted)
    monkeypatch.setattr(benchmarks.Student, "decide_all", decide_all)
    benchmarks.cases.cache_clear()
    arm = arms_of()["distillation-learning-rate stories15m/0.001"]
    assert set(arm.run(2)) == {"validation"}
    assert seen == [(1, 2 + TUNING_SEED)]
    [person] = real(replace(benchmarks._taught(TOY), people=1), 2 + TUNING_SEED)
    assert decided == [person.validation]


# --- TidyBot ------------------------------------------------------------------


@pytest.mark.usefixtures("tidy_data")
def test_seeds_share_the_scenarios():
    shares = [benchmarks._share(READER, seed) for seed in range(5)]
    numbers = [scenario.number for share in shares for scenario in share]
    assert sorted(numbers) == list(range(1, 97))
    assert benchmarks._share(READER, 7) == shares[2]


@pytest.mark.usefixtures("tidy_data")
@pytest.mark.parametrize("name", [n for n in arms_of() if n.startswith("tidybot")])
def test_tidybot_arms_run(name):
    metrics = arms_of()[name].run(1)
    rooms = benchmarks._share(TOY, 1)
    assert [room.number for room in rooms] == [1, 49]
    each = [metrics[f"bits/accuracy/{room.number}"] for room in rooms]
    assert metrics["accuracy"].value == pytest.approx(np.mean(each))
    for room, share in zip(rooms, each, strict=True):
        assert Fraction(share).limit_denominator(50).denominator <= len(room.unseen)
    if "n" in metrics:
        assert metrics["tokens"].n == sum(len(room.unseen) for room in rooms)


@pytest.mark.usefixtures("tidy_data")
def test_the_rule_that_is_read_is_the_one_recorded(monkeypatch):
    told = []
    real = prompts.offers

    def noted(task, known=""):
        told.append((task.id, known))
        return real(task, known)

    monkeypatch.setattr(benchmarks.prompts, "offers", noted)
    benchmarks.tidy(TOY, "rule, calibrated", 1)
    room = tidybot.scenarios()[0]
    mine = [known for id, known in told if id.startswith("tidybot-1-")]
    replies = data.tidybot_replies()
    shown = tidybot.Prompts.recorded(replies)
    rule = tidybot.read_rule(replies[shown.to_write(room)])
    assert rule.startswith("Put ")
    assert mine == [rule] * len(room.unseen) + [""] * len(room.unseen)


def test_a_perfect_reader_is_right_everywhere():
    room = tidybot.Scenario(
        3,
        "kitchen",
        ("box", "bag", "shelf"),
        seen=(("pan", "box"),),
        unseen=(("cup", "shelf"), ("fork", "box")),
        note="",
        tags=(),
    )

    class Perfect:
        def decide_all(self, tasks):
            assert len(tasks) == 2
            right = right_options(room, "unseen")
            return [benchmarks.Decision(at, (0.0,) * 3) for at in right]

    trial = benchmarks._tidied(room, Perfect(), "Put all away.")
    assert (trial.accuracy, trial.condition) == (1, "llm-rule")
    assert benchmarks._tidied(room, Perfect(), "").condition == "zero-shot"


def test_numbers_of_people_are_found_again():
    metrics = benchmarks.compare(TOY, "learnt rules, symbolic", 0)
    record = type("R", (), {"seed": 0, "metrics": {}})()
    record.metrics = {
        k: results.Metric(getattr(v, "value", v)) for k, v in metrics.items()
    }
    assert by_person([record], "id").mean() == pytest.approx(metrics["id"].value)
    assert by_person([record], "agreement ood").tolist() == [1, 1]
