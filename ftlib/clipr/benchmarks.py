r"""CLIPR with small language models: rules that they read, and rules they are taught.

In :mod:`ftlib.clipr.experiment` no model takes part. Here rules that were learnt
without one are handed over: to models that read them in their prompt, to word
embeddings, and to a student that is trained by them (:mod:`ftlib.clipr.distillation`).

``distillation STUDENT``
    A user is asked 12 questions, and the rules from the answers label tasks that nobody
    was asked about. The student learns from the labels, with adapters, and decides
    without rules. Beside it: the student as it was; with rules in the prompt; taught by
    the hidden rules, which is what it can learn at all; tuned on 12 choices of the
    user, as many turns as the questions; and the rules themselves, which are the
    teacher. ``id`` and ``ood`` are accuracies, ``agreement id`` and ``agreement ood``
    the shares of tasks decided as by the teacher.

``distillation-learning-rate STUDENT``
    How the rate was chosen, on users that are not reported, by validation.

``reasoners MODEL``
    Learnt rules, read by other reasoners than the one that wrote them; and the model
    alone, which asks, writes rules and decides. ``problems`` are its lines and answers
    that could not be understood.

``tidybot words MODEL``
    Rules of text-davinci-003 read by a small model, and placements without any language
    model. A seed has every fifth of the 96 scenarios, so that seeds 0 to 4 have each
    once; ``accuracy`` is a mean over scenarios.

A small model reads an option at a time, and answers yes or no: whether a person would
take it (``one by one``). Rules in such a prompt are only those that speak about the
task, without their counts, for ``stories15m`` reads no more than 256 tokens. Where it
is ``calibrated``, what counts is by how much the rules raise log p(yes).

What was expected, before any of these arms was run in full, but after trials with users
of seeds from 1000 up: on validation the student was right in 39 to 58 per cent before
training, in 85 to 90 after 30 steps with hidden rules and in 99 after 60, and
embeddings read learnt rules at 59; most arms were timed with one user.

* ``stories15m``, whose words are those of stories for children, reads nothing in a
  prompt: rules there change its accuracy by less than five points.
* Taught by the hidden rules it is right in 85 to 95 per cent in distribution, and in 10
  to 20 points less out of distribution: it has seen every material, but no plate.
* Taught by learnt rules it agrees with them in 85 per cent in distribution and is
  within five points of their accuracy; out of distribution it is ten points below.
* Tuned on 12 choices it is at 50 to 60 per cent, ten or more below the student of the
  rules that came from as many turns.
* A decision of the student takes a third or less of the tokens of one with rules.
* ``smollm2-135m`` by letter is at chance, with and without rules. One by one, rules
  raise it by five to ten points if calibrated. It is far below the rules' own reading,
  and below embeddings. Alone it is at chance, and most of its lines are no rules.
* ``tidybot words``: nearest seen thing 70 to 80 per cent, zero-shot 50 to 55; a rule
  raises ``smollm2-135m`` by 5 to 15 points over none, to about 60, far below the 91 per
  cent that the model which wrote the rules makes of them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch

from ftlib import data, runtime
from ftlib.clipr import prompts, tidybot
from ftlib.clipr.baselines import ask, decided
from ftlib.clipr.conversation import task_questions
from ftlib.clipr.distillation import Lesson, Student, lessons, offer_scores
from ftlib.clipr.embedded import (
    ENCODER,
    EmbeddedReasoner,
    Words,
    like_places,
    like_seen,
)
from ftlib.clipr.loop import learn
from ftlib.clipr.models import LocalModel, RecordedReplies, Usage, raised
from ftlib.clipr.prompted import PromptedReasoner
from ftlib.clipr.reasoners import SymbolicReasoner
from ftlib.clipr.rules import RuleSet, Vocabulary
from ftlib.clipr.runs import (
    Clipr,
    Metrics,
    Person,
    people,
    person_metrics,
    scenario_metrics,
)
from ftlib.clipr.settings import (
    STUDENT_RATES,
    STUDENT_TURNS,
    TRIED_RATES,
    TUNING_SEED,
    ConversationSettings,
    DistillationSettings,
    Population,
    Settings,
    within,
)
from ftlib.clipr.tasks import Decision, Task
from ftlib.data.registry import checksums
from ftlib.experiments import Arm
from ftlib.models import load_causal_lm
from ftlib.models.registry import weights_checksums
from ftlib.results import Metric

Form = Literal["letter", "name", "one by one"]
"""How a model is asked: for a letter or a name out of a list, or yes or no."""


@dataclass(frozen=True)
class Reading:
    """How a model reads rules.

    Attributes:
        form: of the prompt.
        rules: whether there are any in it.
        calibrated: whether an option's score is by how much they raise it.
    """

    form: Form
    rules: bool = True
    calibrated: bool = False


_TRAINING = DistillationSettings()


@dataclass(frozen=True)
class Plan:
    """Users, and what is done with a model.

    Attributes:
        model: short name.
        taught: users who teach it; 0 if it is not trained.
        handed: users whose rules are handed to it.
        labelled: tasks of a user that rules label.
        test: of each kind, for a student, and
        read: for a reader of rules, which takes longer.
        scenarios: one in so many of TidyBot's is a seed's.
        distillation: of the student.
    """

    model: str
    taught: int
    handed: int
    labelled: int = 240
    test: int = 40
    read: int = 12
    scenarios: int = 5
    distillation: DistillationSettings = _TRAINING


STUDENT = Plan("stories15m", taught=2, handed=0)
READER = Plan("smollm2-135m", taught=0, handed=1)
"""At scale cpu. A student of smollm2-135m would take minutes for each user there."""

LARGE = tuple(
    Plan(model, taught=10, handed=10, test=100, read=100)
    for model in ("smollm2-135m", "qwen2.5-0.5b")
)
"""At scale gpu. The second is not tuned to follow instructions."""

READINGS: Mapping[str, Reading] = MappingProxyType(
    {
        "by letter": Reading("letter"),
        "by name": Reading("name"),
        "by name, calibrated": Reading("name", calibrated=True),
        "by name, no rules": Reading("name", rules=False),
        "one by one": Reading("one by one"),
        "one by one, calibrated": Reading("one by one", calibrated=True),
        "one by one, no rules": Reading("one by one", rules=False),
    }
)


def small_arms() -> list[Arm]:
    """The arms at scale cpu."""
    return [
        *_distillation_arms(STUDENT),
        *_reasoner_arms(READER),
        *_tidybot_arms(READER),
    ]


def benchmark_arms() -> list[Arm]:
    """The arms at scale gpu."""
    return [
        arm
        for plan in LARGE
        for arms in (_distillation_arms, _reasoner_arms, _tidybot_arms)
        for arm in arms(plan)
    ]


# --- users and their rules --------------------------------------------------------


class Case(NamedTuple):
    """A user, and the rules that were learnt from the user's answers."""

    person: Person
    rules: RuleSet


@lru_cache(maxsize=8)
def cases(population: Population, seed: int) -> tuple[Case, ...]:
    """Draw users, and learn their rules without a language model."""
    return tuple(_case(population, person) for person in people(population, seed))


def _case(population: Population, person: Person) -> Case:
    settings = within(STUDENT_TURNS, adaptive=False)
    clipr = Clipr(settings, population.examples, person.seed)
    clipr.learn(person.user, person.examples, STUDENT_TURNS)
    return Case(person, clipr.state.rules)


class Outcome(NamedTuple):
    """Decisions of a user's tests, by test, and what they used."""

    decisions: Mapping[str, Sequence[Decision]]
    usage: Usage


class Decider(Protocol):
    """Decides many tasks, and counts what that uses."""

    @property
    def usage(self) -> Usage:
        """What it has used so far."""
        ...

    def decide_all(self, tasks: Sequence[Task]) -> list[Decision]:
        """Choose an option of each task."""
        ...


def tested(decider: Decider, person: Person) -> Outcome:
    """Let something decide a user's tests."""
    before = replace(decider.usage)
    decisions = {
        test: decider.decide_all(tasks) for test, tasks in person.tests.items()
    }
    return Outcome(decisions, decider.usage - before)


def metrics(found: Sequence[tuple[Case, Outcome]]) -> Metrics:
    """Return the means over users, and the accuracies of each.

    Returns:
        ``id`` and ``ood``; ``agreement id`` and ``agreement ood`` with the learnt
        rules; ``calls``, ``tokens`` and ``seconds`` of a decision, on average; and
        ``problems`` of all.
    """
    measured: dict[str, Metric | float] = {}
    for test in found[0][1].decisions:
        right, same = {}, {}
        for at, (case, outcome) in enumerate(found):
            pairs = list(
                zip(case.person.tests[test], outcome.decisions[test], strict=True)
            )
            user, rules = case.person.user, case.rules
            right[str(at)] = _mean([user.right(t, d.index) for t, d in pairs])
            same[str(at)] = _mean([rules.decide(t).index == d.index for t, d in pairs])
        measured |= person_metrics(test, right)
        measured |= person_metrics(f"agreement {test}", same)
    n = sum(len(made) for _, outcome in found for made in outcome.decisions.values())
    used = sum((outcome.usage for _, outcome in found), start=Usage())
    return {
        **measured,
        "calls": Metric(used.calls / n, n),
        "tokens": Metric(used.tokens / n, n),
        "seconds": Metric(used.seconds / n, n),
        "problems": float(used.problems),
    }


def _mean(values: Sequence[bool]) -> float:
    return float(np.mean(values))


# --- models that read rules -------------------------------------------------------


@lru_cache(maxsize=2)
def _pretrained(name: str) -> LocalModel:
    return LocalModel(*load_causal_lm(name, dtype=torch.float32))


class Scored(NamedTuple):
    """Scores of each task's options, and what they took."""

    scores: list[list[float]]
    usage: Usage


@lru_cache(maxsize=128)
def scored(
    model: str, form: Form, tasks: tuple[Task, ...], known: tuple[str, ...]
) -> Scored:
    """Ask a model about tasks; the same question is asked once for all arms.

    Args:
        model: short name.
        form: of the prompts.
        tasks: to decide.
        known: what is told with each.
    """
    asked = _pretrained(model)
    before = replace(asked.usage)
    if form == "one by one":
        scores = offer_scores(asked, tasks, known)
    else:
        pairs = zip(tasks, known, strict=True)
        scores = asked.score_all(
            [(prompts.choice(t, k, form), prompts.answers(t, form)) for t, k in pairs]
        )
    return Scored(scores, asked.usage - before)


class Reader:
    """A model that reads what is known, and decides.

    Args:
        model: short name.
        reading: how.
        known: what is told of the person with a task, in words.
    """

    def __init__(
        self, model: str, reading: Reading, known: Callable[[Task], str]
    ) -> None:
        self.model = model
        self.reading = reading
        self.known = known
        self.usage = Usage()

    def decide_all(self, tasks: Sequence[Task]) -> list[Decision]:
        """Take the option with the highest score, the first of equal ones."""
        nothing = [""] * len(tasks)
        told = [self.known(task) for task in tasks] if self.reading.rules else nothing
        scores = self._scores(tasks, told)
        if self.reading.calibrated:
            scores = raised(scores, self._scores(tasks, nothing))
        return [Decision.highest(found) for found in scores]

    def _scores(self, tasks: Sequence[Task], told: Sequence[str]) -> list[list[float]]:
        found = scored(self.model, self.reading.form, tuple(tasks), tuple(told))
        self.usage.add(found.usage)
        return found.scores


def reader(model: str, reading: Reading, rules: RuleSet) -> Reader:
    """Return a model that reads rules: all of them, or one by one those that speak."""

    def speaking(task: Task) -> str:
        return "\n".join(rules[at].claim.to_text() for at in rules.fired(task))

    whole = rules.to_text()
    told = speaking if reading.form == "one by one" else partial(_always, whole)
    return Reader(model, reading, told)


class ByRules:
    """Decides by rules as a reasoner reads them.

    Args:
        reasoner: reads.
        rules: that are read.
    """

    def __init__(self, reasoner: SymbolicReasoner, rules: RuleSet) -> None:
        self.reasoner = reasoner
        self.rules = rules

    @property
    def usage(self) -> Usage:
        """What the reasoner has used so far."""
        return self.reasoner.usage

    def decide_all(self, tasks: Sequence[Task]) -> list[Decision]:
        """Choose an option of each task."""
        return [self.reasoner.decide(task, self.rules) for task in tasks]


# --- distillation -----------------------------------------------------------------


def own_choices(person: Person) -> list[Lesson]:
    """Have example tasks decided; to one that does not matter there is no answer."""
    history = ask(person.user, task_questions(person.examples), STUDENT_TURNS)
    return [Lesson(task, (index,)) for task, index in decided(history)]


TEACHERS: Mapping[str, Callable[[Case], list[Lesson]]] = MappingProxyType(
    {
        "learnt rules": lambda case: lessons(case.person.stream, case.rules),
        "hidden rules": lambda case: lessons(
            case.person.stream, case.person.user.rules
        ),
        "own choices": lambda case: own_choices(case.person),
    }
)
"""What a student is taught by."""

UNTAUGHT: Mapping[str, Callable[[str, RuleSet], Decider]] = MappingProxyType(
    {
        "student, untrained": lambda model, rules: reader(
            model, READINGS["one by one, no rules"], rules
        ),
        "rules in the prompt": lambda model, rules: reader(
            model, READINGS["one by one, calibrated"], rules
        ),
        "learnt rules, symbolic": lambda model, rules: ByRules(
            SymbolicReasoner(), rules
        ),
    }
)
"""What a taught student is compared with."""


def _distillation_arms(plan: Plan) -> Iterator[Arm]:
    def arm(experiment: str, name: str, run: Any, **more: Any) -> Arm:
        return _arm(plan, f"{experiment} {plan.model}", name, run, **more)

    for name in UNTAUGHT:
        yield arm("distillation", name, partial(compare, plan, name))
    rate = STUDENT_RATES[plan.model]
    for teacher in TEACHERS:
        run = partial(distil, plan, teacher, rate)
        yield arm(
            "distillation",
            f"taught by {teacher}",
            run,
            teacher=teacher,
            learning_rate=rate,
        )
    for tried in TRIED_RATES:
        yield arm(
            "distillation-learning-rate",
            f"{tried:g}",
            partial(search, plan, tried),
            student=plan.model,
            learning_rate=tried,
        )


def _taught(plan: Plan) -> Population:
    return Population(people=plan.taught, stream=plan.labelled, test=plan.test)


def compare(plan: Plan, name: str, seed: int) -> Metrics:
    """Test what is not trained; returns :func:`metrics`."""
    return metrics(
        [
            (case, tested(UNTAUGHT[name](plan.model, case.rules), case.person))
            for case in cases(_taught(plan), seed)
        ]
    )


def distil(plan: Plan, teacher: str, rate: float, seed: int) -> Metrics:
    """Teach a student for each user, and test it.

    Returns:
        :func:`metrics`, with the ``lessons`` that each had, the ``trained`` weights and
        the seconds that it took to ``learn``, all on average.
    """
    found, spent, taught = [], Usage(), []
    for case in runtime.progress(cases(_taught(plan), seed), desc=teacher, leave=False):
        given = TEACHERS[teacher](case)
        with spent.timed():
            student = teach(plan, given, rate, case.person.seed)
        found.append((case, tested(student, case.person)))
        taught.append(len(given))
    return {
        **metrics(found),
        "lessons": float(np.mean(taught)),
        "trained": float(sum(w.numel() for w in student.adapters.values())),
        "learn": spent.seconds / len(found),
    }


def teach(plan: Plan, given: Sequence[Lesson], rate: float, seed: int) -> Student:
    """Return a student that has had lessons; the pretrained model stays as it is."""
    local = _pretrained(plan.model)
    model = copy.deepcopy(local.model)
    student = Student(model, local.tokenizer, plan.distillation, seed)
    student.learn(given, rate)
    return student


def search(plan: Plan, rate: float, seed: int) -> Metrics:
    """Try a rate on a user who is not reported, without a look at a test.

    Returns:
        ``validation``, the accuracy by which rates are compared.
    """
    [case] = cases(replace(_taught(plan), people=1), seed + TUNING_SEED)
    given = TEACHERS["learnt rules"](case)
    student = teach(plan, given, rate, case.person.seed)
    tasks, user = case.person.validation, case.person.user
    made = zip(tasks, student.decide_all(tasks), strict=True)
    return {"validation": _mean([user.right(t, d.index) for t, d in made])}


# --- one learns rules, another reads them ------------------------------------------


def _reasoner_arms(plan: Plan) -> Iterator[Arm]:
    experiment = f"reasoners {plan.model}"
    yield _arm(plan, experiment, "symbolic", partial(hand_over, plan, "symbolic"))
    yield _arm(
        plan,
        experiment,
        "embeddings",
        partial(hand_over, plan, "embeddings"),
        encoder=ENCODER,
    )
    for name, reading in READINGS.items():
        yield _arm(
            plan,
            experiment,
            name,
            partial(hand_over, plan, name),
            **dataclasses.asdict(reading),
        )
    yield _arm(
        plan,
        experiment,
        "alone",
        partial(learn_alone, plan),
        clipr=dataclasses.asdict(ALONE),
        examples=_SHOWN,
    )


def _handed(plan: Plan) -> Population:
    return Population(people=plan.handed, stream=0, test=plan.read)


def hand_over(plan: Plan, reads: str, seed: int) -> Metrics:
    """Let one reasoner decide by rules that another has learnt; see :func:`metrics`."""
    return metrics(
        [
            (case, tested(_reads(plan.model, reads, case.rules), case.person))
            for case in cases(_handed(plan), seed)
        ]
    )


def _reads(model: str, reads: str, rules: RuleSet) -> Decider:
    if reads == "symbolic":
        return ByRules(SymbolicReasoner(), rules)
    if reads == "embeddings":
        return ByRules(EmbeddedReasoner(_words()), rules)
    return reader(model, READINGS[reads], rules)


@lru_cache(maxsize=1)
def _words() -> Words:
    return Words()


ALONE = Settings(adaptive=False, conversation=ConversationSettings(questions=3))
"""A small model repeats itself: more questions bring no more answers."""

_SHOWN = 4  # example tasks in its prompts


def learn_alone(plan: Plan, seed: int) -> Metrics:
    """Let a model ask, write rules and decide by them, by letter.

    Returns:
        :func:`metrics`, with agreement with the symbolic reasoner's rules; how many
        ``rules`` it wrote, on average; and ``learning problems``.
    """
    found, rules, problems = [], 0, 0
    for case in cases(_handed(plan), seed):
        person = case.person
        model = _pretrained(plan.model)
        reasoner = PromptedReasoner(model, Vocabulary.of(person.examples))
        state = learn(reasoner, person.user, person.examples[:_SHOWN], [], ALONE)
        rules += len(state.rules)
        problems += state.usage.problems
        by_letter = reader(plan.model, READINGS["by letter"], state.rules)
        found.append((case, tested(by_letter, person)))
    return {
        **metrics(found),
        "rules": rules / len(found),
        "learning problems": float(problems),
    }


# --- TidyBot ------------------------------------------------------------------------


def _tidybot_arms(plan: Plan) -> Iterator[Arm]:
    def arm(name: str, run: Any, **more: Any) -> Arm:
        return _arm(
            plan,
            f"tidybot words {plan.model}",
            name,
            run,
            files=("tidybot", "tidybot-replies"),
            **more,
        )

    for name in WITHOUT_MODEL:
        yield arm(name, partial(tidy_by_words, plan, name), encoder=ENCODER)
    for name in get_args(Told):
        yield arm(name, partial(tidy, plan, name))


Told = Literal["rule", "rule, calibrated", "no rule"]

WITHOUT_MODEL: Mapping[str, Callable[[Words, tidybot.Scenario], tidybot.Trial]] = (
    MappingProxyType({"nearest seen": like_seen, "nearest name": like_places})
)


def _share(plan: Plan, seed: int) -> list[tidybot.Scenario]:
    """Return a seed's scenarios, one in so many; they do not depend on chance."""
    each = plan.scenarios
    return [s for s in tidybot.scenarios() if s.number % each == seed % each]


def tidy_by_words(plan: Plan, name: str, seed: int) -> Metrics:
    """Place unseen things without a language model.

    Returns:
        ``accuracy``, the mean over scenarios, with that of each by its number.
    """
    rooms = _share(plan, seed)
    return scenario_metrics(WITHOUT_MODEL[name](_words(), room) for room in rooms)


def tidy(plan: Plan, told: Told, seed: int) -> Metrics:
    """Place unseen things by the rule that text-davinci-003 wrote, or by none.

    Returns:
        As :func:`tidy_by_words`, with ``tokens`` and ``seconds`` of a decision.
    """
    replies = data.tidybot_replies()
    shown, author = tidybot.Prompts.recorded(replies), RecordedReplies(replies)
    reading = Reading("one by one", told != "no rule", told == "rule, calibrated")
    trials, used = [], Usage()
    for scenario in _share(plan, seed):
        written = author.complete(shown.to_write(scenario), max_tokens=0)
        rule = tidybot.read_rule(written) if reading.rules else ""
        model = Reader(plan.model, reading, partial(_always, rule))
        trials.append(_tidied(scenario, model, rule))
        used.add(model.usage)
    n = sum(trial.asked for trial in trials)
    return {
        **scenario_metrics(trials),
        "tokens": Metric(used.tokens / n, n),
        "seconds": Metric(used.seconds / n, n),
    }


def _always(rule: str, task: Task) -> str:
    return rule


def _tidied(scenario: tidybot.Scenario, model: Decider, rule: str) -> tidybot.Trial:
    decisions = model.decide_all(tidybot.tasks(scenario, "unseen"))
    placements = {
        thing: scenario.receptacles[decision.index]
        for (thing, _), decision in zip(scenario.unseen, decisions, strict=True)
    }
    condition: tidybot.Condition = "llm-rule" if rule else "zero-shot"
    return tidybot.Trial(scenario, "unseen", condition, rule, placements, skipped=0)


# --- arms -----------------------------------------------------------------------------


def _arm(
    plan: Plan,
    experiment: str,
    name: str,
    run: Callable[[int], Metrics],
    files: Sequence[str] = (),
    **more: Any,
) -> Arm:
    needed = [ENCODER[0] if "encoder" in more else plan.model]
    return Arm(
        experiment,
        name,
        {**dataclasses.asdict(plan), "turns": STUDENT_TURNS, "arm": name, **more},
        run,
        data=checksums(*files) | weights_checksums(*needed),
        requires=needed,
    )
