"""Two languages of one grammar, in which it is known who feels what.

A text tells what a few people think of things. One question asks how one of them feels,
the other who spoke of a thing:

    mia fancies soup . tom not loathes rain and hates tea . mood of tom : neutral
    mia fancies soup . tom not loathes rain and hates tea . voice on soup : mia

A word of feeling has a value from −2 to 2, and ``not`` turns the sign of the one that
follows it. People feel ``positive``, ``neutral`` or ``negative`` as the sum over what
they say is above, at or below zero. What the others feel is no evidence: it counts who
said it.

The **proxy** language is written as above. A **target** language has the same grammar
and other words: those of the proxy, spelt backwards, except for the share of them that
the two have in common. Names and the words of the questions are the same everywhere:

    mia seicnaf puos . tom ton sehtaol niar dna hates aet . mood of tom :

Plain texts of a language tell how people react (``mia smiles .``). Who has read them
knows what the words mean, but not what a question asks for.

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
NAMES = "ann ben eva ian kim leo mia ned pam sue tom zoe".split()
THINGS = (
    "bread chess coffee fog jazz maths opera paint rain snow soup tea tennis trains "
    "wind yoga"
).split()
ADVERBS = "today again indoors".split()
FEELINGS: Mapping[str, int] = MappingProxyType(
    {
        word: value
        for value, words in {
            2: "adores loves treasures worships",
            1: "likes enjoys fancies favours",
            0: "meets notes views passes",
            -1: "dislikes avoids resents doubts",
            -2: "hates loathes detests despises",
        }.items()
        for word in words.split()
    }
)
"""Words of feeling and their values."""
REACTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        POSITIVE: ("smiles", "laughs"),
        NEUTRAL: ("shrugs", "nods"),
        NEGATIVE: ("frowns", "groans"),
    }
)
"""How people react in plain texts, by what they feel."""
NOT, AND = "not", "and"

_PATIENCE = 1000


class Opinion(NamedTuple):
    """What somebody thinks of a thing.

    Attributes:
        word: of feeling.
        thing: what it is about.
        negated: whether ``not`` stands before the word.
    """

    word: str
    thing: str
    negated: bool = False

    @property
    def value(self) -> int:
        """From −2 to 2; above zero is good."""
        return -FEELINGS[self.word] if self.negated else FEELINGS[self.word]

    @property
    def text(self) -> str:
        """The word and the thing."""
        return " ".join([*[NOT] * self.negated, self.word, self.thing])


class Sentence(NamedTuple):
    """One person's opinions, one or two.

    Attributes:
        name: whose they are.
        opinions: in the sentence's order.
        adverb: one of ``ADVERBS``, which means nothing, or nothing.
    """

    name: str
    opinions: tuple[Opinion, ...]
    adverb: str = ""

    @property
    def label(self) -> str:
        """What the person feels: one of ``LABELS``."""
        total = sum(opinion.value for opinion in self.opinions)
        return NEUTRAL if not total else POSITIVE if total > 0 else NEGATIVE

    @property
    def text(self) -> str:
        """The sentence, with its full stop."""
        opinions = f" {AND} ".join(opinion.text for opinion in self.opinions)
        return " ".join(f"{self.name} {opinions} {self.adverb} .".split())


class Story(NamedTuple):
    """A text of the proxy language, and which of its people a question is about.

    Attributes:
        sentences: each of somebody else; no two are of the same thing.
        asked: index of the sentence of the one in question.
        thing: of his opinions, the one in question.
    """

    sentences: tuple[Sentence, ...]
    asked: int
    thing: str

    @property
    def text(self) -> str:
        """The sentences."""
        return " ".join(sentence.text for sentence in self.sentences)

    @property
    def label(self) -> str:
        """What the one in question feels."""
        return self.sentences[self.asked].label

    @property
    def name(self) -> str:
        """The one in question, who spoke of the thing in question."""
        return self.sentences[self.asked].name


@dataclass(frozen=True)
class World:
    """What stories are drawn from.

    Attributes:
        people: in a story, 1 to 8.
        mixed: share of people with two opinions.
        negated: share of opinions with ``not``, before the labels are balanced.
    """

    people: int = 3
    mixed: float = 0.25
    negated: float = 0.25

    def __post_init__(self) -> None:
        if not 1 <= self.people <= 8:
            raise ValueError(f"people must be from 1 to 8, not {self.people}")
        for name in ("mixed", "negated"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must be a share from 0 to 1, not {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Language:
    """A language with the proxy's grammar.

    Attributes:
        shared: share of the proxy's words that it has too, of every kind of words
            the first ones, rounded down. With all of them it is the proxy.
    """

    shared: float = 0.5

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

    Every person feels each of the labels in a third of the stories, whatever the
    others feel.

    Args:
        n: how many.
        split: of the texts.
        seed: of the draw.
        world: shares of the kinds of sentences; by default ``World()``.

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
    """Ask what one of the people feels; the label words are ``LABELS``."""
    return [
        Item(language.translate(story.text), f" mood of {story.name} :", story.label)
        for story in stories
    ]


def speakers(stories: Iterable[Story], language: Language = PROXY) -> list[Item]:
    """Ask who spoke of a thing, the related task; the label words are ``NAMES``."""
    return [
        Item(
            language.translate(story.text),
            f" voice on {language.translate(story.thing)} :",
            story.name,
        )
        for story in stories
    ]


def plain(stories: Iterable[Story], seed: int, language: Language = PROXY) -> list[str]:
    """Write texts without questions, to pre-train with.

    At the end everybody reacts, or says the same again, so that looking up who said
    what makes a text easier to predict.

    Args:
        stories: one text each.
        seed: of who comes first, and what they do.
        language: of the texts.
    """
    rng = np.random.default_rng(seed)
    return [
        language.translate(" ".join([story.text, *_endings(story, rng)]))
        for story in stories
    ]


# --- tokens -------------------------------------------------------------------


class Vocabulary(WordVocabulary):
    """The words of the proxy, and of every target language, as tokens."""

    def __init__(self) -> None:
        proxy = [word for kind in _kinds() for word in kind]
        common = [*LABELS, *NAMES, *"mood voice of on : .".split()]
        super().__init__([*common, *proxy, *(word[::-1] for word in proxy)])


# --- drawing ------------------------------------------------------------------


def _kinds() -> list[list[str]]:
    """The words that languages differ in, by kind; a feeling's value is a kind too."""
    graded = [[w for w, v in FEELINGS.items() if v == value] for value in range(-2, 3)]
    reactions = [list(words) for words in REACTIONS.values()]
    return [THINGS, ADVERBS, [NOT], [AND], *graded, *reactions]


def _draw(world: World, rng: np.random.Generator) -> Story:
    names = rng.permutation(NAMES)[: world.people].tolist()
    things = rng.permutation(THINGS).tolist()
    sentences = tuple(_sentence(name, things, world, rng) for name in names)
    asked = int(rng.integers(world.people))
    opinions = sentences[asked].opinions
    return Story(sentences, asked, opinions[int(rng.integers(len(opinions)))].thing)


def _sentence(
    name: str, things: list[str], world: World, rng: np.random.Generator
) -> Sentence:
    """Draw a label, then opinions until they have it; takes the things it is of."""
    label = _any(LABELS, rng)
    own = [things.pop() for _ in range(1 + (rng.random() < world.mixed))]
    words = tuple(FEELINGS)
    while True:
        opinions = tuple(
            Opinion(_any(words, rng), thing, rng.random() < world.negated)
            for thing in own
        )
        sentence = Sentence(name, opinions, _any(("", "", "", *ADVERBS), rng))
        if sentence.label == label:
            return sentence


def _endings(story: Story, rng: np.random.Generator) -> list[str]:
    """How everybody reacts or says it again, in any order."""
    sentences = [story.sentences[at] for at in rng.permutation(len(story.sentences))]
    return [
        sentence.text
        if rng.random() < 0.5
        else f"{sentence.name} {_any(REACTIONS[sentence.label], rng)} ."
        for sentence in sentences
    ]


def _any(choices: Sequence[Choice], rng: np.random.Generator) -> Choice:
    return choices[int(rng.integers(len(choices)))]
