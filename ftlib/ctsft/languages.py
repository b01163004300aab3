"""Two languages of one grammar, in which it is known who feels what.

A text is what a few people say of things, the narrator among them, who says ``i``. One
question asks how the narrator feels, the other of what::

    fancies soup says mia . not loathes rain says i . mood : positive
    fancies soup says mia . not loathes rain says i . topic : rain

A word of feeling is ``positive``, ``neutral`` or ``negative``, and ``not`` turns one
into its opposite. What the others say is no evidence: it counts who said it.

The **proxy** language is written as above. A **target** language has the same grammar
and other words: those of the proxy, spelt backwards, except for the share of them that
the two have in common. Names, ``says`` and ``i``, and the words of the questions are
the same everywhere::

    fancies soup says mia . ton sehtaol niar says i . mood :

Plain texts of a language end with how the narrator looks (``so i smiles .``). Who has
read them knows what the words mean, but not what a question asks for.

The split of a text is decided by a hash of its words in the proxy, so that no text of a
test is the translation of one that was trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeVar, get_args

import numpy as np

from ftlib.ctsft.tasks import Item
from ftlib.splits import Split, split_of
from ftlib.words import WordVocabulary

Choice = TypeVar("Choice")

POSITIVE, NEUTRAL, NEGATIVE = LABELS = ("positive", "neutral", "negative")
NAMES = "ann ben eva kim leo mia sue tom".split()
NARRATOR = "i"
THINGS = "soup bread chess coffee jazz maths opera paint rain snow tea yoga".split()
FEELINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        POSITIVE: ("fancies", "adores", "enjoys", "likes", "loves", "treasures"),
        NEUTRAL: ("notes", "meets", "passes", "finds", "studies", "views"),
        NEGATIVE: ("avoids", "despises", "dislikes", "hates", "loathes", "resents"),
    }
)
"""Words of feeling, by what they say without ``not``."""
REACTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        POSITIVE: ("smiles", "laughs"),
        NEUTRAL: ("shrugs", "nods"),
        NEGATIVE: ("frowns", "groans"),
    }
)
"""How the narrator looks at the end of plain texts, by what he feels."""
NOT = "not"
_OPPOSITE = {POSITIVE: NEGATIVE, NEUTRAL: NEUTRAL, NEGATIVE: POSITIVE}
_MOOD, _TOPIC = " mood :", " topic :"
_FEELING = {word: label for label, words in FEELINGS.items() for word in words}

_PATIENCE = 1000


class Sentence(NamedTuple):
    """What somebody says of a thing.

    Attributes:
        name: who.
        word: of feeling.
        thing: what it is about.
        negated: whether ``not`` stands before the word.
    """

    name: str
    word: str
    thing: str
    negated: bool = False

    @property
    def label(self) -> str:
        """What the person feels: one of ``LABELS``."""
        label = _FEELING[self.word]
        return _OPPOSITE[label] if self.negated else label

    @property
    def text(self) -> str:
        """The sentence, with its full stop."""
        before = f"{NOT} " if self.negated else ""
        return f"{before}{self.word} {self.thing} says {self.name} ."


class Story(NamedTuple):
    """A text of the proxy language.

    Attributes:
        sentences: each of somebody else and about another thing; one is the narrator's.
    """

    sentences: tuple[Sentence, ...]

    @property
    def text(self) -> str:
        """The sentences."""
        return " ".join(sentence.text for sentence in self.sentences)

    @property
    def own(self) -> Sentence:
        """What the narrator says."""
        return next(s for s in self.sentences if s.name == NARRATOR)


class Lesson(NamedTuple):
    """A text to learn from, and how it goes on.

    Attributes:
        text: what is read.
        turns: what is given next, and the words to learn that follow it.
    """

    text: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class World:
    """What stories are drawn from.

    Attributes:
        people: in a story, the narrator included, 1 to 8.
        negated: share of sentences with ``not``.
    """

    people: int = 3
    negated: float = 0.25

    def __post_init__(self) -> None:
        if not 1 <= self.people <= 8:
            raise ValueError(f"people must be from 1 to 8, not {self.people}")
        if not 0 <= self.negated <= 1:
            raise ValueError(f"negated must be a share from 0 to 1, not {self.negated}")


@dataclass(frozen=True)
class Language:
    """A language with the proxy's grammar.

    Attributes:
        shared: share of the proxy's words that it has too, of every kind of words
            the first ones, rounded down. With all of them it is the proxy.
    """

    shared: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.shared <= 1:
            raise ValueError(f"shared must be a share from 0 to 1, not {self.shared}")

    @functools.cached_property
    def words(self) -> dict[str, str]:
        """The language's words, by those of the proxy."""
        return {
            word: word if at < int(self.shared * len(kind)) else word[::-1]
            for kind in _kinds()
            for at, word in enumerate(kind)
        }

    def translate(self, text: str) -> str:
        """Write a text of the proxy in this language; names and labels stay."""
        return " ".join(self.words.get(word, word) for word in text.split())


PROXY = Language(shared=1.0)


def sample(n: int, split: Split, seed: int, world: World | None = None) -> list[Story]:
    """Draw stories whose texts are all different.

    Everybody feels each of the labels in a third of the stories, whatever the others
    feel.

    Args:
        n: how many.
        split: of the texts.
        seed: of the draw.
        world: what they are drawn from; by default ``World()``.

    Raises:
        ValueError: there is no such split, or the world has not that many stories.
    """
    if split not in get_args(Split):
        raise ValueError(
            f"no split {split!r}: choose one of {', '.join(get_args(Split))}"
        )
    rng = np.random.default_rng(seed)
    chosen: dict[str, Story] = {}
    in_vain = 0
    while len(chosen) < n:
        story = _draw(world or World(), rng)
        is_new = story.text not in chosen and split_of(story.text) == split
        in_vain = 0 if is_new else in_vain + 1
        if in_vain == _PATIENCE:
            raise ValueError(f"found {len(chosen)} of {n} stories in {split!r}")
        if is_new:
            chosen[story.text] = story
    return list(chosen.values())


# --- what is asked ------------------------------------------------------------


def sentiment(stories: Iterable[Story], language: Language = PROXY) -> list[Item]:
    """Ask how the narrator feels; the label words are ``LABELS``."""
    return [
        Item(language.translate(story.text), _MOOD, story.own.label)
        for story in stories
    ]


def topics(stories: Iterable[Story], language: Language = PROXY) -> list[Item]:
    """Ask what the narrator speaks of, the related task.

    The label words are ``THINGS``, in the language.
    """
    return [
        Item(
            language.translate(story.text),
            _TOPIC,
            language.translate(story.own.thing),
        )
        for story in stories
    ]


# --- what is learnt before ----------------------------------------------------


def lessons(stories: Sequence[Story], language: Language = PROXY) -> list[Lesson]:
    """Ask both questions about each story, each of them first every other time."""
    asked = zip(sentiment(stories, language), topics(stories, language), strict=True)
    return [
        Lesson(mood.text, _turns(mood, topic) if at % 2 else _turns(topic, mood))
        for at, (mood, topic) in enumerate(asked)
    ]


def _turns(*items: Item) -> tuple[tuple[str, str], ...]:
    return tuple((item.question, item.label) for item in items)


def plain(
    stories: Iterable[Story], seed: int, language: Language = PROXY
) -> list[Lesson]:
    """Write texts without questions, which end with how the narrator looks.

    Args:
        stories: one text each.
        seed: of which of a feeling's looks it is.
        language: of the texts.
    """
    rng = np.random.default_rng(seed)
    return [
        Lesson(
            language.translate(story.text),
            ((f" so {NARRATOR}", language.translate(_look(story, rng))),),
        )
        for story in stories
    ]


def _look(story: Story, rng: np.random.Generator) -> str:
    return _any(REACTIONS[story.own.label], rng)


# --- tokens -------------------------------------------------------------------


class Vocabulary(WordVocabulary):
    """The words of the proxy, and of every target language, as tokens."""

    def __init__(self) -> None:
        proxy = [word for kind in _kinds() for word in kind]
        common = [*LABELS, *NAMES, NARRATOR, *"says mood topic so : .".split()]
        super().__init__([*common, *proxy, *(word[::-1] for word in proxy)])


# --- drawing ------------------------------------------------------------------


def _kinds() -> list[list[str]]:
    """The words that languages differ in, by kind; each feeling is a kind."""
    labelled = [*FEELINGS.values(), *REACTIONS.values()]
    return [THINGS, [NOT], *(list(words) for words in labelled)]


def _draw(world: World, rng: np.random.Generator) -> Story:
    names = [NARRATOR, *rng.permutation(NAMES)[: world.people - 1].tolist()]
    things = rng.permutation(THINGS)[: world.people].tolist()
    sentences = [
        _sentence(name, thing, world, rng)
        for name, thing in zip(names, things, strict=True)
    ]
    return Story(tuple(sentences[at] for at in rng.permutation(world.people)))


def _sentence(
    name: str, thing: str, world: World, rng: np.random.Generator
) -> Sentence:
    label, negated = _any(LABELS, rng), bool(rng.random() < world.negated)
    word = _any(FEELINGS[_OPPOSITE[label] if negated else label], rng)
    return Sentence(name, word, thing, negated)


def _any(choices: Sequence[Choice], rng: np.random.Generator) -> Choice:
    return choices[int(rng.integers(len(choices)))]
