"""The pair of languages against a solver that reads nothing but the text."""

import itertools
import math
import re
from collections import Counter

import numpy as np
import pytest

from ftlib.ctsft import languages, tasks
from ftlib.ctsft.languages import (
    FEELINGS,
    LABELS,
    NAMES,
    PROXY,
    REACTIONS,
    THINGS,
    Language,
    Opinion,
    Sentence,
    Story,
    Vocabulary,
    World,
    plain,
    sample,
    sentiment,
    speakers,
)
from ftlib.splits import split_of

WORLDS = (World(), World(people=1, mixed=0), World(people=8, mixed=1, negated=0.6))
SHARES = (0.0, 0.25, 0.5, 0.99, 1.0)
SPLITS = ("pretrain", "train", "validation", "test")


def solve(prompt, shared=1.0):
    """Answer a prompt from its words: a name's running total, and who said what."""
    kinds = [THINGS, languages.ADVERBS, ["not"], ["and"], *REACTIONS.values()]
    kinds += [[w for w, v in FEELINGS.items() if v == level] for level in range(-2, 3)]
    back = {}
    for kind in kinds:
        for at, word in enumerate(kind):
            back[word if at + 1 <= shared * len(kind) else word[::-1]] = word
    *text, what, _, asked, _ = [back.get(word, word) for word in prompt.split()]
    totals, speaker, who, sign = {}, {}, None, 1
    for word in text:
        if word in NAMES:
            who, totals[word] = word, 0
        elif word == "not":
            sign = -1
        elif word in FEELINGS:
            totals[who] += sign * FEELINGS[word]
            sign = 1
        elif word in THINGS:
            speaker[word] = who
    if what == "voice":
        return speaker[asked]
    return LABELS[1 - int(np.sign(totals[asked]))]


@pytest.fixture(scope="module")
def stories():
    drawn = [sample(300, "train", seed, world) for seed, world in enumerate(WORLDS)]
    return list(itertools.chain(*drawn))


# --- what is right ------------------------------------------------------------


@pytest.mark.parametrize("shared", SHARES)
def test_labels_are_those_of_the_solver_in_every_language(stories, shared):
    language = Language(shared)
    for ask, words in ((sentiment, LABELS), (speakers, NAMES)):
        items = ask(stories, language)
        assert {item.label for item in items} == set(words)
        assert all(solve(item.prompt, shared) == item.label for item in items)


def test_the_examples_of_the_module():
    story = Story(
        (
            Sentence("mia", (Opinion("fancies", "soup"),)),
            Sentence(
                "tom",
                (Opinion("loathes", "rain", negated=True), Opinion("hates", "tea")),
            ),
        ),
        asked=1,
        thing="rain",
    )
    (item,) = sentiment([story])
    assert solve(item.prompt) == item.label == story.label == "neutral"
    (about,) = speakers([story._replace(asked=0, thing="soup")])
    (foreign,) = sentiment([story], Language(0.25))
    for shown in (item, about):
        assert f"    {shown.prompt} {shown.label}\n" in languages.__doc__
    assert f"    {foreign.prompt}\n" in languages.__doc__


def test_not_turns_the_next_word_only_and_grades_add_up():
    def label(*opinions):
        return Sentence("mia", tuple(Opinion(w, "tea", n) for w, n in opinions)).label

    assert label(("adores", False), ("dislikes", False)) == "positive"
    assert label(("likes", False), ("dislikes", False)) == "neutral"
    assert label(("likes", False), ("hates", False)) == "negative"
    assert label(("hates", True), ("dislikes", False)) == "positive"
    assert label(("meets", True)) == label(("meets", False)) == "neutral"


def test_everybody_reacts_as_they_feel_or_says_it_again(stories):
    language = Language(0.25)
    reaction = {
        language.words[word]: label
        for label, words in REACTIONS.items()
        for word in words
    }
    orders, kinds = set(), Counter()
    for story, text in zip(stories, plain(stories, 3, language), strict=True):
        told, _, end = text.rpartition(f"{language.translate(story.text)} ")
        assert told == ""
        people = {sentence.name: sentence for sentence in story.sentences}
        found = re.findall(r"\w[^.]* \.", end)
        assert " ".join(found) == end
        for ending in found:
            name, word, *rest = ending.split()
            if rest == ["."]:
                assert reaction[word] == people[name].label
            else:
                assert ending == language.translate(people[name].text)
            kinds[rest == ["."]] += 1
        names = [ending.split()[0] for ending in found]
        assert sorted(names) == sorted(people)
        orders.add(names == list(people))
    assert orders == {True, False}
    share = kinds[True] / kinds.total()
    assert abs(share - 0.5) < 5 * math.sqrt(0.25 / kinds.total())
    assert plain(stories[:9], 3) == plain(stories[:9], 3) != plain(stories[:9], 4)


# --- no way around ------------------------------------------------------------


def test_labels_are_balanced_and_the_others_feelings_say_nothing():
    drawn = sample(2000, "pretrain", 0)
    pairs = Counter(
        (story.label, other.label)
        for story in drawn
        for at, other in enumerate(story.sentences)
        if at != story.asked
    )
    n = sum(pairs.values())
    assert len(pairs) == 9
    for count in pairs.values():
        assert abs(count / n - 1 / 9) < 5 * math.sqrt(8 / 81 / n)
    places = Counter(story.asked for story in drawn)
    assert all(
        abs(c / 2000 - 1 / 3) < 5 * math.sqrt(2 / 9 / 2000) for c in places.values()
    )


def test_counting_feelings_in_the_whole_text_is_not_enough():
    drawn = sample(1500, "pretrain", 0)
    votes = [
        int(np.sign(sum(o.value for s in story.sentences for o in s.opinions)))
        for story in drawn
    ]
    right = [
        LABELS[1 - vote] == story.label
        for vote, story in zip(votes, drawn, strict=True)
    ]
    assert 0.4 < np.mean(right) < 0.65


def test_ignoring_not_or_grades_costs_what_there_is_of_them():
    def accuracy(value):
        drawn = sample(1500, "pretrain", 0, World(mixed=0.5, negated=0.5))
        right = [
            np.sign(sum(value(o) for o in story.sentences[story.asked].opinions))
            == 1 - LABELS.index(story.label)
            for story in drawn
        ]
        return np.mean(right)

    assert accuracy(lambda opinion: opinion.value) == 1
    assert accuracy(lambda opinion: FEELINGS[opinion.word]) < 0.75
    assert accuracy(lambda opinion: np.sign(opinion.value)) < 0.95


def test_a_thing_has_one_speaker_and_a_name_one_sentence(stories):
    for story in stories:
        names = [sentence.name for sentence in story.sentences]
        things = [o.thing for s in story.sentences for o in s.opinions]
        assert len(set(names)) == len(names)
        assert len(set(things)) == len(things)
        assert story.thing in story.sentences[story.asked].text.split()


def test_shares_of_the_world_are_kept():
    drawn = sample(1500, "pretrain", 0, World(people=2, mixed=0.4, negated=0.0))
    sentences = [sentence for story in drawn for sentence in story.sentences]
    mixed = np.mean([len(sentence.opinions) == 2 for sentence in sentences])
    assert abs(mixed - 0.4) < 5 * math.sqrt(0.24 / len(sentences))
    assert not any(opinion.negated for s in sentences for opinion in s.opinions)
    assert {len(story.sentences) for story in drawn} == {2}


# --- languages ----------------------------------------------------------------


def test_the_share_of_common_words_is_kept_for_every_kind():
    for shared in SHARES:
        words = Language(shared).words
        assert len(set(words.values())) == len(words)  # nothing gets lost
        for kind in (THINGS, *([w for w in FEELINGS if FEELINGS[w] == 2],)):
            common = sum(words[word] == word for word in kind)
            assert common == int(shared * len(kind))
    assert all(new != old for old, new in Language(0.0).words.items())
    assert PROXY.translate("mia not likes soup .") == "mia not likes soup ."


def test_a_translation_keeps_names_and_length(stories):
    for shared in SHARES:
        for ask in (sentiment, speakers):
            pairs = zip(ask(stories), ask(stories, Language(shared)), strict=True)
            for here, there in pairs:
                a, b = here.prompt.split(), there.prompt.split()
                assert [w for w in a if w in NAMES] == [w for w in b if w in NAMES]
                assert len(a) == len(b)
                assert here.label == there.label


# --- samples ------------------------------------------------------------------


def test_samples_are_different_reproducible_and_of_their_split():
    told = {}
    for split in SPLITS:
        drawn = sample(300, split, seed=3)
        told[split] = {story.text for story in drawn}
        assert len(told[split]) == 300
        assert {split_of(story.text) for story in drawn} == {split}
    assert len(set().union(*told.values())) == 1200
    assert sample(20, "test", 3) == sample(20, "test", 3) != sample(20, "test", 4)


def test_more_stories_than_there_are(monkeypatch):
    only = Story((Sentence("mia", (Opinion("likes", "soup"),)),), 0, "soup")
    monkeypatch.setattr(languages, "_draw", lambda *_: only)
    split = split_of(only.text)
    with pytest.raises(ValueError, match=f"found 1 of 2 stories in '{split}'"):
        sample(2, split, 0)


# --- words and errors ---------------------------------------------------------


def test_tokens_give_the_text_back_and_all_are_used(stories):
    vocabulary = Vocabulary()
    assert len(set(vocabulary.words)) == len(vocabulary) < 150
    used = set()
    for shared in (0.0, 1.0):
        language = Language(shared)
        texts = plain(stories, 0, language)
        items = sentiment(stories, language) + speakers(stories, language)
        texts += [f"{item.prompt} {item.label}" for item in items]
        for text in texts:
            ids = vocabulary.encode(text)
            used |= set(ids)
            assert len(ids) == len(text.split())
            assert vocabulary.decode([*ids, vocabulary.end, 7]) == text
    assert used == set(range(2, len(vocabulary)))


def test_labels_of_both_tasks_are_single_tokens(stories):
    vocabulary = Vocabulary()
    for ask, words in ((sentiment, LABELS), (speakers, NAMES)):
        items = ask(stories, Language(0.0))
        tokens = tasks.label_tokens(vocabulary, words, items[0].prompt)
        assert [vocabulary.words[token] for token in tokens] == list(words)
        encoding = tasks.encode(items, vocabulary, words, max_length=100)
        assert encoding.truncated == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: World(people=0), "people must be from 1 to 8, not 0"),
        (lambda: World(people=9), "people must be from 1 to 8, not 9"),
        (lambda: World(mixed=1.5), r"mixed must be a share from 0 to 1, not 1\.5"),
        (lambda: World(negated=-1), "negated must be a share"),
        (lambda: Language(2), "shared must be a share from 0 to 1, not 2"),
        (lambda: sample(1, "dev", 0), "no split 'dev': choose one of pretrain"),
        (lambda: Vocabulary().encode("mia likes bert"), "'bert' in .* has no token"),
    ],
)
def test_what_cannot_be_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
