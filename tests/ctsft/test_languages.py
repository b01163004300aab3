"""The pair of languages against a solver that reads nothing but the text."""

import itertools
import math
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
    Sentence,
    Story,
    Vocabulary,
    World,
    lessons,
    plain,
    sample,
    sentiment,
    topics,
)
from ftlib.splits import split_of

WORLDS = (World(), World(people=1), World(people=8, negated=0.6))
SHARES = (0.0, 0.25, 0.5, 0.99, 1.0)
SPLITS = ("pretrain", "train", "validation", "test")
KINDS = [THINGS, ["not"], *FEELINGS.values(), *REACTIONS.values()]


def proxys(words, shared):
    """Translate into the proxy, by a reading of the docs of its own."""
    back = {}
    for kind in KINDS:
        for at, word in enumerate(kind):
            back[word if at + 1 <= shared * len(kind) else word[::-1]] = word
    return [back.get(word, word) for word in words]


def solve(prompt, shared=1.0):
    """Answer a prompt from its words: of the sentence that ``i`` says."""
    words = proxys(prompt.split(), shared)
    what = words[-2]
    end = words.index("i")
    *_, word, thing, _ = words[:end]
    if what == "topic":
        return thing
    value = next(1 - at for at, name in enumerate(LABELS) if word in FEELINGS[name])
    turned = end > 3 and words[end - 4] == "not"
    return LABELS[1 + value if turned else 1 - value]


@pytest.fixture(scope="module")
def stories():
    drawn = [sample(100, "train", seed, world) for seed, world in enumerate(WORLDS)]
    return list(itertools.chain(*drawn))


# --- what is right ------------------------------------------------------------


@pytest.mark.parametrize("shared", SHARES)
def test_labels_are_those_of_the_solver_in_every_language(stories, shared):
    language = Language(shared)
    items = sentiment(stories, language)
    assert {item.label for item in items} == set(LABELS)
    assert all(solve(item.prompt, shared) == item.label for item in items)
    about = topics(stories, language)
    assert {item.label for item in about} == {language.words[w] for w in THINGS}
    for item in about:
        assert language.words[solve(item.prompt, shared)] == item.label


def test_the_examples_of_the_module():
    story = Story(
        (
            Sentence("mia", "fancies", "soup"),
            Sentence("i", "loathes", "rain", negated=True),
        )
    )
    (item,) = sentiment([story])
    (about,) = topics([story])
    (foreign,) = sentiment([story], Language(0.25))
    for shown in (item, about):
        assert f"    {shown.prompt} {shown.label}\n" in languages.__doc__
    assert f"    {foreign.prompt}\n" in languages.__doc__
    assert (item.label, about.label) == ("positive", "rain")


def test_not_turns_a_feeling_into_its_opposite():
    def label(word, negated):
        return Sentence("mia", word, "tea", negated).label

    assert label("hates", False) == label("likes", True) == "negative"
    assert label("likes", False) == label("hates", True) == "positive"
    assert label("meets", False) == label("meets", True) == "neutral"


def test_plain_texts_end_with_how_the_narrator_looks(stories):
    language = Language(0.25)
    seen = set()
    for story, lesson in zip(stories, plain(stories, 3, language), strict=True):
        assert lesson.text == language.translate(story.text)
        [(given, look)] = lesson.turns
        assert given == " so i"
        [proxy] = proxys([look], 0.25)
        assert proxy in REACTIONS[story.own.label]
        seen.add(proxy)
    assert seen == {word for words in REACTIONS.values() for word in words}
    assert plain(stories[:9], 3) == plain(stories[:9], 3) != plain(stories[:9], 4)


def test_lessons_ask_both_questions_in_either_order(stories):
    orders = Counter()
    for lesson in lessons(stories):
        for given, answer in lesson.turns:
            assert solve(lesson.text + given) == answer
        orders[tuple(given for given, _ in lesson.turns)] += 1
    assert sorted(orders) == [(" mood :", " topic :"), (" topic :", " mood :")]
    assert abs(orders.most_common()[0][1] - len(stories) / 2) <= 1


# --- no way around ------------------------------------------------------------


def test_labels_are_balanced_and_the_others_feelings_say_nothing():
    drawn = sample(2000, "pretrain", 0)
    pairs = Counter(
        (story.own.label, other.label)
        for story in drawn
        for other in story.sentences
        if other.name != "i"
    )
    n = sum(pairs.values())
    assert len(pairs) == 9
    for count in pairs.values():
        assert abs(count / n - 1 / 9) < 5 * math.sqrt(8 / 81 / n)
    places = Counter(story.sentences.index(story.own) for story in drawn)
    assert all(
        abs(places[at] / 2000 - 1 / 3) < 5 * math.sqrt(2 / 9 / 2000) for at in range(3)
    )


def test_counting_feelings_in_the_whole_text_is_not_enough():
    drawn = sample(1500, "pretrain", 0)
    votes = [
        int(np.sign(sum(1 - LABELS.index(s.label) for s in story.sentences)))
        for story in drawn
    ]
    right = [
        LABELS[1 - vote] == story.own.label
        for vote, story in zip(votes, drawn, strict=True)
    ]
    assert 0.4 < np.mean(right) < 0.65


def test_ignoring_not_costs_what_there_is_of_it():
    drawn = sample(1500, "pretrain", 0, World(negated=0.5))
    right = [s.own._replace(negated=False).label == s.own.label for s in drawn]
    # A third of the labels are neutral, which "not" leaves alone.
    assert abs(np.mean(right) - 2 / 3) < 5 * math.sqrt(2 / 9 / 1500)


def test_everybody_says_one_thing_of_his_own(stories):
    for story in stories:
        names = [sentence.name for sentence in story.sentences]
        things = [sentence.thing for sentence in story.sentences]
        assert len(set(names)) == len(names)
        assert len(set(things)) == len(things)
        assert names.count("i") == 1


def test_shares_of_the_world_are_kept():
    drawn = sample(1500, "pretrain", 0, World(people=2, negated=0.4))
    sentences = [sentence for story in drawn for sentence in story.sentences]
    negated = np.mean([sentence.negated for sentence in sentences])
    assert abs(negated - 0.4) < 5 * math.sqrt(0.24 / len(sentences))
    assert {len(story.sentences) for story in drawn} == {2}
    assert not any(s.own.negated for s in sample(99, "pretrain", 0, World(2, 0.0)))


# --- languages ----------------------------------------------------------------


def test_the_share_of_common_words_is_kept_for_every_kind():
    for shared in SHARES:
        words = Language(shared).words
        assert len(set(words.values())) == len(words)  # nothing gets lost
        for kind in KINDS:
            common = sum(words[word] == word for word in kind)
            assert common == int(shared * len(kind))
    assert all(new != old for old, new in Language(0.0).words.items())
    assert PROXY.translate("not likes soup says mia .") == "not likes soup says mia ."


def test_a_translation_keeps_names_and_length(stories):
    for shared in SHARES:
        for ask in (sentiment, topics):
            pairs = zip(ask(stories), ask(stories, Language(shared)), strict=True)
            for here, there in pairs:
                a, b = here.prompt.split(), there.prompt.split()
                kept = {*NAMES, "i", "says"}
                assert [w for w in a if w in kept] == [w for w in b if w in kept]
                assert len(a) == len(b)


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
    only = Story((Sentence("i", "likes", "soup"),))
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
        told = plain(stories, 0, language) + lessons(stories, language)
        for text, turns in told:
            whole = text + "".join(f"{given} {answer} ." for given, answer in turns)
            ids = vocabulary.encode(whole)
            used |= set(ids)
            assert len(ids) == len(whole.split())
            assert vocabulary.decode([*ids, vocabulary.end, 7]) == whole
    assert used == set(range(2, len(vocabulary)))


def test_labels_of_both_tasks_are_single_tokens(stories):
    vocabulary, foreign = Vocabulary(), Language(0.0)
    things = [foreign.words[word] for word in THINGS]
    for ask, words in ((sentiment, LABELS), (topics, things)):
        items = ask(stories, foreign)
        tokens = tasks.label_tokens(vocabulary, words, items[0].prompt)
        assert [vocabulary.words[token] for token in tokens] == list(words)
        encoding = tasks.encode(items, vocabulary, words, max_length=100)
        assert encoding.truncated == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: World(people=0), "people must be from 1 to 8, not 0"),
        (lambda: World(people=9), "people must be from 1 to 8, not 9"),
        (lambda: World(negated=1.5), r"negated must be a share from 0 to 1, not 1\.5"),
        (lambda: World(negated=-1), "negated must be a share"),
        (lambda: Language(2), "shared must be a share from 0 to 1, not 2"),
        (lambda: sample(1, "dev", 0), "no split 'dev': choose one of pretrain"),
        (lambda: Vocabulary().encode("mia likes bert"), "'bert' in .* has no token"),
    ],
)
def test_what_cannot_be_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
