"""What the experiments share: people with their tasks, and how methods are tested."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ftlib import runtime
from ftlib.clipr import kitchens, manipulation, prompts, tidybot
from ftlib.clipr.baselines import Baseline
from ftlib.clipr.division import Division, divide
from ftlib.clipr.loop import State, learn
from ftlib.clipr.models import Usage, estimated_tokens
from ftlib.clipr.reasoners import SymbolicReasoner
from ftlib.clipr.rules import RuleSet, Vocabulary
from ftlib.clipr.settings import Population, Settings
from ftlib.clipr.tasks import Decision, Task
from ftlib.clipr.users import SimulatedUser, User
from ftlib.results import PACKED_PREFIX, Metric, Record
from ftlib.streams import generator, stream

Metrics = Mapping[str, Metric | float]
Floats = npt.NDArray[np.float64]

_TRUSTED = 3  # answers for each given rule: as if it had been learnt

# --- people -------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """A simulated user, and the tasks of that user.

    Attributes:
        user: with hidden rules.
        seed: of this person.
        examples: to talk about before anything is decided.
        stream: to decide while something may still be learnt.
        validation: to choose settings with.
        tests: new tasks in families that were met (``id``), and in others (``ood``).
    """

    user: SimulatedUser
    seed: int
    examples: list[Task]
    stream: list[Task]
    validation: list[Task]
    tests: Mapping[str, list[Task]]


def people(population: Population, seed: int) -> list[Person]:
    """Draw the people of a seed; no two have the same tasks in the same order."""
    seeds = [stream(seed, f"person {n}") for n in range(population.people)]
    return [_person(population, each) for each in seeds]


def _person(population: Population, seed: int) -> Person:
    likes: Callable[[int], RuleSet] = manipulation.preferences
    if population.world == "kitchens":
        likes = kitchens.preferences
        parts = kitchens.draw(
            seed,
            train=population.examples + population.stream,
            validation=population.test // 2,
            test=population.test,
            strange=population.test,
        )
    else:
        parts = _of_manipulation(seed)
    temper = population.temper
    changes = temper.changes_after is not None
    user = SimulatedUser(
        likes(seed),
        seed,
        noise=temper.noise,
        patience=temper.patience,
        later=likes(stream(seed, "later")) if changes else None,
        changes_after=temper.changes_after or 0,
        gives_reasons=temper.gives_reasons,
    )
    n = population.examples
    return Person(
        user,
        seed,
        parts.train[:n],
        parts.train[n : n + population.stream],
        parts.validation,
        {"id": parts.test, "ood": parts.strange},
    )


def _of_manipulation(seed: int) -> Division:
    """Divide Mobile Manipulation, with the training tasks in a person's own order.

    Validation and test are one part: of both there are few, and nothing is chosen by
    either.
    """
    parts = _divided()
    order = generator(seed, "order").permutation(len(parts.train))
    return parts._replace(
        train=[parts.train[at] for at in order],
        validation=[],
        test=parts.validation + parts.test,
    )


@functools.cache
def _divided() -> Division:
    """Read and divide Mobile Manipulation, once for all people."""
    tasks = manipulation.object_tasks()
    return divide(tasks, manipulation.STRANGE_OBJECT_FAMILIES)


def inverted(rules: RuleSet, vocabulary: Vocabulary) -> RuleSet:
    """Return rules that prefer every other value over each that is preferred."""
    return RuleSet(
        tuple(
            replace(rule, preferred=other, over=rule.preferred, support=_TRUSTED)
            for rule in rules
            for other in vocabulary.values[rule.dimension]
            if other != rule.preferred
        )
    )


def trusted(rules: RuleSet) -> RuleSet:
    """Return rules with the support of rules that were learnt."""
    return RuleSet(tuple(replace(rule, support=_TRUSTED) for rule in rules))


# --- methods ------------------------------------------------------------------


class Clipr:
    """CLIPR or Adaptive-CLIPR without a language model, as other methods are tested.

    Args:
        settings: ``adaptive`` or not.
        examples: how many of the tasks given are for the conversation. The adaptive
            variant decides the others while it learns.
        seed: of the users that it imagines.
        start: rules to begin with.

    Attributes:
        state: all that was learnt.
    """

    def __init__(
        self, settings: Settings, examples: int, seed: int, start: RuleSet | None = None
    ) -> None:
        self.settings = settings
        self.examples = examples
        self.reasoner = SymbolicReasoner(settings, seed)
        self.state = State(rules=start or RuleSet())

    @property
    def usage(self) -> Usage:
        """What the reasoner has used so far."""
        return self.reasoner.usage

    @property
    def rules(self) -> RuleSet:
        """The rules as they are now."""
        return self.state.rules

    def learn(self, user: User, examples: Sequence[Task], turns: int) -> None:
        """Talk about the first tasks; the adaptive variant then decides the others."""
        settings = replace(self.settings, turns=turns)
        talk, rest = examples[: self.examples], examples[self.examples :]
        tasks = rest if settings.adaptive else []
        self.state = learn(self.reasoner, user, talk, tasks, settings, self.state)

    def decide(self, task: Task) -> Decision:
        """Choose an option by the rules."""
        return self.reasoner.decide(task, self.rules)

    def told(self, task: Task) -> str | None:
        """Return the rules."""
        return self.rules.to_text()


class Trial(NamedTuple):
    """What became of a method with a person.

    Attributes:
        accuracy: share of right decisions, by test.
        turns: answers and corrections that were asked of the person.
        reactions: decisions that the person accepted or rejected without a word.
        learning_calls: of the reasoner, but for one for each reaction: a decision that
            a person reacts to would have been made anyway.
        calls: of the reasoner for a decision afterwards, on average.
        tokens: that a language model would read for a decision, on average, estimated
            from the prompt; ``None`` for a method in which none reads anything.
        rules: how many were learnt; 0 for a method without.
        accepted: share of the decisions that were accepted, by batch.
    """

    accuracy: Mapping[str, float]
    turns: int
    reactions: int
    learning_calls: int
    calls: float
    tokens: float | None
    rules: int
    accepted: tuple[float, ...]


def try_out(method: Baseline, person: Person, turns: int) -> Trial:
    """Let a method learn from a person within so many turns, and test it.

    A person who changes has changed when the test comes.
    """
    user = person.user
    method.learn(user, [*person.examples, *person.stream], turns)
    learning_calls = method.usage.calls - user.reactions
    reactions = user.reactions
    user.reactions = max(reactions, user.changes_after)
    before = method.usage.calls
    accuracy = {
        name: float(np.mean([user.right(t, method.decide(t).index) for t in tasks]))
        for name, tasks in person.tests.items()
    }
    tests = [task for tasks in person.tests.values() for task in tasks]
    batches = method.state.batches if isinstance(method, Clipr) else ()
    return Trial(
        accuracy,
        user.turns,
        reactions,
        learning_calls,
        (method.usage.calls - before) / len(tests),
        _tokens(method, tests),
        len(getattr(method, "rules", ())),
        tuple(batch.share or 0.0 for batch in batches),
    )


def _tokens(method: Baseline, tasks: Sequence[Task]) -> float | None:
    told = [method.told(task) for task in tasks]
    read = [
        estimated_tokens(prompts.choice(task, known))
        for task, known in zip(tasks, told, strict=True)
        if known is not None
    ]
    return float(np.mean(read)) if read else None


def try_with_all(
    make: Callable[[Person], Baseline], population: Population, turns: int, seed: int
) -> Metrics:
    """Try a method out with every person of a seed.

    Returns:
        The metrics of :func:`trial_metrics`.
    """
    everybody = runtime.progress(people(population, seed), desc="people", leave=False)
    return trial_metrics([try_out(make(person), person, turns) for person in everybody])


def trial_metrics(trials: Sequence[Trial]) -> Metrics:
    """Return the means over people, and the accuracies of each person.

    ``id`` and ``ood`` are accuracies, as means over people; the other numbers are those
    of :class:`Trial`.
    """
    n = len(trials)
    found: dict[str, Metric | float] = {}
    for name in trials[0].accuracy:
        each = {str(at): trial.accuracy[name] for at, trial in enumerate(trials)}
        found |= person_metrics(name, each)
    for name in ("turns", "reactions", "learning_calls", "calls", "rules"):
        each_value = [getattr(trial, name) for trial in trials]
        found[name.replace("_", " ")] = Metric(float(np.mean(each_value)), n)
    tokens = [trial.tokens for trial in trials if trial.tokens is not None]
    if tokens:
        found["tokens"] = Metric(float(np.mean(tokens)), n)
    for batch in range(max(len(trial.accepted) for trial in trials)):
        shares = [t.accepted[batch] for t in trials if batch < len(t.accepted)]
        accepted = Metric(float(np.mean(shares)), len(shares))
        found[f"{PACKED_PREFIX}accepted/{batch}"] = accepted
    return found


def person_metrics(name: str, each: Mapping[str, float]) -> dict[str, Metric | float]:
    """Return the mean over people, or other units, and the number of each.

    :func:`by_person` gives the numbers back.
    """
    return {
        name: Metric(float(np.mean(list(each.values()))), len(each)),
        **{f"{PACKED_PREFIX}{name}/{who}": value for who, value in each.items()},
    }


def scenario_metrics(trials: Iterable[tidybot.Trial]) -> dict[str, Metric | float]:
    """Return the mean accuracy over TidyBot's scenarios, and that of each."""
    each = {str(trial.scenario.number): float(trial.accuracy) for trial in trials}
    return person_metrics("accuracy", each)


def by_person(records: Sequence[Record], name: str) -> Floats:
    """Return the numbers of all people, seed by seed: (seeds × people,).

    Args:
        records: of one arm, such as :meth:`ftlib.results.Results.select` gives.
        name: as of :func:`person_metrics`.
    """
    prefix = f"{PACKED_PREFIX}{name}/"
    return np.array(
        [
            metric.value
            for record in sorted(records, key=lambda record: record.seed)
            for key, metric in record.metrics.items()
            if key.startswith(prefix)
        ]
    )
