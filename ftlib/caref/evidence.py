"""A world of short facts in which it is known why a label holds.

An input is a note of facts and a question about them; the output is a label and the
facts that decide it::

    amber : tom follows mia . ann is in oslo . mia is in rome . tom is in rome ?
    entailment because we read tom follows mia and mia is in rome

Who follows someone is where that one is. A name is the subject of at most one fact, so
one fact decides, or two, or none:

=================  =============  ==============
what is said       in rome?       in oslo?
=================  =============  ==============
is in rome         entailment     contradiction
is not in rome     contradiction  neutral
is likely in rome  one of both    one of both
nothing            neutral        neutral
=================  =============  ==============

Three things can be uncertain, all with known probabilities:

* The **label**: ``likely`` is one of four :data:`HEDGES`. With its probability the
  label is that of ``is in``, otherwise that of ``is not in`` (:func:`posterior`).
* The **wording** of an explanation: one of three, told apart by their first word
  (:data:`WORDINGS`).
* The **mark** in front of the note says nothing, unless a share of the notes, the
  ``shortcut``, is marked according to their labels. A model can then be right for a
  reason that no explanation names.

The split of a question is decided by a hash of its text, so a test asks what training
never asked, and an edited note stays in its split.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from ftlib.caref.faithfulness import Edit
from ftlib.caref.tasks import SEPARATOR
from ftlib.splits import Split, split_of
from ftlib.words import WordVocabulary

Choice = TypeVar("Choice")
Probabilities = npt.NDArray[np.float64]

ENTAILMENT, NEUTRAL, CONTRADICTION = LABELS = (
    "entailment",
    "neutral",
    "contradiction",
)
NAMES = (
    "ada ann ben bob cat dan eva finn gus hal ida ian jan kim leo lou "
    "mia max ned nia oli pam ray rob sam sue ted tim tom una val zoe"
).split()
PLACES = (
    "accra athens bergen bern cairo delhi dublin geneva hanoi kyoto lagos lima "
    "lisbon madrid milan nairobi oslo paris porto quito riga rome seoul turin"
).split()
HEDGES: Mapping[str, float] = MappingProxyType(
    {"maybe": 0.6, "probably": 0.7, "likely": 0.8, "surely": 0.9}
)
"""Words that make a fact uncertain, and the probability that it holds."""
WORDINGS: Mapping[str, float] = MappingProxyType(
    {"we read": 0.5, "it says": 0.3, "facts say": 0.2}
)
"""How explanations begin, and how often."""
WORDING_ENTROPY = -sum(p * math.log(p) for p in WORDINGS.values())
"""Entropy of an explanation's first word, in nats; the others are certain."""
MARKS = ("amber", "coral", "olive")
"""One for each label, in the order of ``LABELS``, where they mean anything."""

_PATIENCE = 1000


class Fact(NamedTuple):
    """One sentence.

    Attributes:
        subject: a name.
        relation: ``is in``, ``is not in``, ``is likely in`` with any hedge, or
            ``follows``.
        object: a place, or the name that the subject follows.
    """

    subject: str
    relation: str
    object: str

    @property
    def text(self) -> str:
        """The sentence, without its full stop."""
        return " ".join(self)

    @property
    def probability(self) -> float:
        """Probability that the subject is in the place."""
        return {"in": 1.0, "not": 0.0, **HEDGES}[self.relation.split()[1]]


@dataclass(frozen=True)
class World:
    """What examples are drawn from.

    Attributes:
        facts: in a note, 3 to 12.
        linked: share of questions about someone who follows another.
        hedged: share of questions that a hedged fact decides.
        shortcut: probability that the mark is that of the label; otherwise it is any
            of the three.
    """

    facts: int = 5
    linked: float = 0.5
    hedged: float = 0.25
    shortcut: float = 0.0

    def __post_init__(self) -> None:
        if not 3 <= self.facts <= 12:
            raise ValueError(f"facts must be from 3 to 12, not {self.facts}")
        for name in ("linked", "hedged", "shortcut"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must be a share from 0 to 1, not {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Example:
    """A note, a question, and what is right to write.

    Attributes:
        mark: the word in front.
        facts: in the order of the note.
        subject: whom the question is about.
        place: where it asks whether the subject is.
        label: the right label; of a hedged example, the side on which its coin fell.
        wording: how its explanation begins.
    """

    mark: str
    facts: tuple[Fact, ...]
    subject: str
    place: str
    label: str
    wording: str

    @property
    def question(self) -> str:
        """The question's text, without its mark."""
        return f"{self.subject} is in {self.place}"

    @property
    def text(self) -> str:
        """The input: words between spaces."""
        notes = " ".join(f"{fact.text} ." for fact in self.facts)
        return f"{self.mark} : {notes} {self.question} ?"

    @property
    def target(self) -> str:
        """The output to learn: label and explanation."""
        return f"{self.label} {SEPARATOR} {self.wording} {self._reason()}"

    @property
    def explanations(self) -> tuple[str, ...]:
        """The explanation in every wording; all are right."""
        return tuple(f"{wording} {self._reason()}" for wording in WORDINGS)

    @property
    def evidence(self) -> tuple[int, ...]:
        """Which facts are cited: whom the subject follows, then where that one is."""
        link, decides, _ = self._chain()
        return tuple(at for at in (link, decides) if at is not None)

    @property
    def deciding(self) -> Fact | None:
        """The fact that tells where the subject is, if there is one."""
        _, decides, _ = self._chain()
        return None if decides is None else self.facts[decides]

    @property
    def leader(self) -> str:
        """Whose place decides: the one whom the subject follows, or the subject."""
        return self._chain()[2]

    def _chain(self) -> tuple[int | None, int | None, str]:
        """Where the link and the fact that decides stand, and whose place it tells."""
        about = {fact.subject: at for at, fact in enumerate(self.facts)}
        first = about.get(self.subject)
        if first is None or self.facts[first].relation != "follows":
            return None, first, self.subject
        leader = self.facts[first].object
        return first, about.get(leader), leader

    def _reason(self) -> str:
        cited = [self.facts[at].text for at in self.evidence]
        if self.deciding is None:
            cited.append(_silence(self.leader))
        return " and ".join(cited)


def posterior(example: Example, shortcut: float = 0.0) -> Probabilities:
    """Probability of each label given the input, exactly.

    Args:
        example: its own label is not looked at.
        shortcut: of the world that the example is from. With one, the mark tells
            something about which side the coin of a hedged fact fell on.

    Returns:
        Probabilities of ``LABELS``, [3].

    Raises:
        ValueError: the input cannot be of a world with that shortcut.
    """
    coin = _coin(example.deciding, example.place)
    marks = np.full(3, (1 - shortcut) / 3)
    marks[MARKS.index(example.mark)] += shortcut
    joint = np.array([coin.get(label, 0.0) for label in LABELS]) * marks
    if not joint.sum():
        raise ValueError(
            f"with shortcut {shortcut} no note that begins with {example.mark!r} has "
            f"one of the labels {', '.join(coin)}: give the share its world has"
        )
    return joint / joint.sum()


def sample(
    n: int, split: Split, seed: int, world: World | None = None
) -> list[Example]:
    """Draw examples whose inputs are all different.

    Every label is the right one of a third of the examples without a hedge.

    Args:
        n: how many.
        split: whose questions are asked.
        seed: of the draw.
        world: shares of the kinds of examples; by default ``World()``.

    Raises:
        ValueError: there is no such split, or the world has not that many examples.
    """
    if split not in get_args(Split):
        raise ValueError(
            f"no split {split!r}: choose one of {', '.join(get_args(Split))}"
        )
    rng = np.random.default_rng(seed)
    chosen: dict[str, Example] = {}
    in_vain = 0
    while len(chosen) < n:
        example = _draw(split, world or World(), rng)
        in_vain = in_vain + 1 if example.text in chosen else 0
        if in_vain == _PATIENCE:
            raise ValueError(f"found {len(chosen)} of {n} examples in {split!r}")
        chosen[example.text] = example
    return list(chosen.values())


# --- editing ------------------------------------------------------------------


def flip(example: Example, rng: np.random.Generator) -> Example:
    """Edit the evidence so that another label is right.

    A plain ``is in`` takes the place of the fact that decides, or of a distracting one
    where nothing decides. It names the place in question, or another if that would
    leave the label as it is; after neutral, either.
    """
    elsewhere = _other(PLACES, {example.place}, rng)
    places = {
        ENTAILMENT: (elsewhere,),
        NEUTRAL: (example.place, elsewhere),
        CONTRADICTION: (example.place,),
    }
    new = Fact(example.leader, "is in", _any(places[example.label], rng))
    fact = example.deciding
    at = example.facts.index(fact) if fact else _any(_distracting(example), rng)
    return _with_fact(example, at, new)


def distract(example: Example, rng: np.random.Generator) -> Example:
    """Edit a fact that decides nothing: it names another place, or another name."""
    at = _any(_distracting(example), rng)
    fact = example.facts[at]
    taken = {*fact, example.subject, example.leader}
    others = NAMES if fact.relation == "follows" else PLACES
    return _with_fact(example, at, fact._replace(object=_other(others, taken, rng)))


def remark(example: Example, rng: np.random.Generator) -> Example:
    """Change the mark, which is no evidence."""
    return replace(example, mark=_other(MARKS, {example.mark}, rng))


def negate(example: Example) -> Example | None:
    """Insert ``not`` into the fact that decides, which changes the label.

    Returns:
        The edited example; ``None`` unless a plain ``is in`` decides.
    """
    fact = example.deciding
    if fact is None or fact.relation != "is in":
        return None
    at = example.facts.index(fact)
    return _with_fact(example, at, fact._replace(relation="is not in"))


def edits(examples: Iterable[Example], seed: int) -> list[Edit]:
    """Edit the evidence, a distracting fact and the mark of each example, in turn."""
    rng = np.random.default_rng(seed)
    made = []
    for example in examples:
        fact = example.deciding
        evidence = fact.text if fact else _silence(example.leader)
        distracted = distract(example, rng)
        (distracting,) = set(example.facts) - set(distracted.facts)
        made += [
            Edit(example.text, flip(example, rng).text, evidence),
            Edit(example.text, distracted.text, distracting.text),
            Edit(example.text, remark(example, rng).text, example.mark),
        ]
    return made


def insertions(examples: Iterable[Example]) -> list[Edit]:
    """Insert ``not`` wherever a plain ``is in`` decides; the label changes."""
    pairs = [(example, negate(example)) for example in examples]
    return [Edit(old.text, new.text, "not") for old, new in pairs if new]


def _distracting(example: Example) -> tuple[int, ...]:
    return tuple(at for at in range(len(example.facts)) if at not in example.evidence)


def _with_fact(example: Example, at: int, fact: Fact) -> Example:
    """Put a fact in the place of another; without a hedge it settles the label."""
    facts = (*example.facts[:at], fact, *example.facts[at + 1 :])
    edited = replace(example, facts=facts)
    if edited.deciding == example.deciding:
        return edited
    (label,) = _coin(edited.deciding, example.place)
    return replace(edited, label=label)


# --- tokens -------------------------------------------------------------------


class Vocabulary(WordVocabulary):
    """The words of this world as tokens; a T5's decoder starts with the padding too."""

    def __init__(self) -> None:
        wordings = [word for wording in WORDINGS for word in wording.split()]
        relations = ["is", "in", "not", "follows", *HEDGES]
        others = [SEPARATOR, "and", "nothing", "of", ".", ":", "?"]
        words = [*LABELS, *MARKS, *wordings, *relations, *others]
        super().__init__([*words, *NAMES, *PLACES])

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, the end included.

        Raises:
            ValueError: a word has no token.
        """
        return [*super().encode(text), self.end]


# --- drawing ------------------------------------------------------------------


@functools.cache
def _questions(split: Split) -> tuple[tuple[str, str], ...]:
    """Subjects and places of a split's questions."""
    return tuple(
        (name, place)
        for name in NAMES
        for place in PLACES
        if split_of(f"{name} is in {place}") == split
    )


def _draw(split: Split, world: World, rng: np.random.Generator) -> Example:
    subject, place = _any(_questions(split), rng)
    others = rng.permutation([name for name in NAMES if name != subject]).tolist()
    leader, facts = subject, []
    if rng.random() < world.linked:
        leader = others.pop()
        facts.append(Fact(subject, "follows", leader))
    deciding = _deciding(leader, place, world.hedged, rng)
    if deciding:
        facts.append(deciding)
    while len(facts) < world.facts:
        facts.append(_distraction(others.pop(), others, place, rng))
    label = _weighted(_coin(deciding, place), rng)
    marked = rng.random() < world.shortcut
    return Example(
        mark=MARKS[LABELS.index(label)] if marked else _any(MARKS, rng),
        facts=tuple(facts[at] for at in rng.permutation(len(facts))),
        subject=subject,
        place=place,
        label=label,
        wording=_weighted(WORDINGS, rng),
    )


def _deciding(
    leader: str, place: str, hedged: float, rng: np.random.Generator
) -> Fact | None:
    """Draw the fact that decides; without a hedge every label is as likely."""
    elsewhere = _other(PLACES, {place}, rng)
    there = rng.random() < 0.5
    if rng.random() < hedged:
        hedge = _any(tuple(HEDGES), rng)
        return Fact(leader, f"is {hedge} in", place if there else elsewhere)
    label = _any(LABELS, rng)
    if label == ENTAILMENT:
        return Fact(leader, "is in", place)
    if label == CONTRADICTION and not there:
        return Fact(leader, "is in", elsewhere)
    if label == CONTRADICTION:
        return Fact(leader, "is not in", place)
    return None if there else Fact(leader, "is not in", elsewhere)


def _distraction(
    subject: str, others: Sequence[str], place: str, rng: np.random.Generator
) -> Fact:
    """Draw a fact about another, of any form; every third names the place asked for."""
    if rng.random() < 0.25:
        return Fact(subject, "follows", _any(others, rng))
    word = _any(("", "", "not ", f"{_any(tuple(HEDGES), rng)} "), rng)
    named = place if rng.random() < 1 / 3 else _any(PLACES, rng)
    return Fact(subject, f"is {word}in", named)


def _coin(fact: Fact | None, place: str) -> dict[str, float]:
    """Probabilities of the possible labels, given the fact that decides."""
    if fact is None:
        return {NEUTRAL: 1.0}
    here = fact.object == place
    sides = {
        ENTAILMENT if here else CONTRADICTION: fact.probability,
        CONTRADICTION if here else NEUTRAL: 1 - fact.probability,
    }
    return {label: p for label, p in sides.items() if p}


def _silence(name: str) -> str:
    return f"nothing of {name}"


def _any(choices: Sequence[Choice], rng: np.random.Generator) -> Choice:
    return choices[int(rng.integers(len(choices)))]


def _other(
    choices: Sequence[str], taken: Collection[str], rng: np.random.Generator
) -> str:
    return _any([choice for choice in choices if choice not in taken], rng)


def _weighted(choices: Mapping[str, float], rng: np.random.Generator) -> str:
    return str(rng.choice(list(choices), p=list(choices.values())))
