"""Prompts, draws and tokens of the real tasks, on rows and tokenizers made here."""

import doctest
from collections import Counter

import pytest
import torch
from tiny_models import byte_level_bpe
from transformers import PreTrainedTokenizerFast

from ftlib import data
from ftlib.ctsft import tasks
from ftlib.ctsft.batches import last_positions
from ftlib.ctsft.tasks import (
    INFERENCE_WORDS,
    SENTIMENT_WORDS,
    Collator,
    Encoded,
    Item,
    balanced,
    divide,
    encode,
    few_shot,
    label_tokens,
)

CORPUS = [
    "aku seneng banget karo film iki\nSentiment: positive",
    "ora apik blas, elek tenan\nSentiment: negative",
    "filme biasa wae\nSentiment: neutral",
] * 20


def byte_level(start=None, end=None):
    """A tokenizer such as GPT-2's, of a small corpus; adds tokens around if asked."""
    around = " ".join(filter(None, [start, "$A", end]))
    tokenizer = byte_level_bpe(CORPUS, ("<s>", "</s>"), 400, around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def items_of(counts):
    return [
        Item(f"{label} text {n}", "\nSentiment:", label)
        for label, count in counts.items()
        for n in range(count)
    ]


MANY = items_of({"positive": 189, "neutral": 119, "negative": 192})


# --- prompts ------------------------------------------------------------------


def test_an_opinion_is_asked_for_its_sentiment(monkeypatch):
    asked = []
    row = {"id": "7", "text": "Rotine enak.", "label": "positive"}
    monkeypatch.setattr(tasks, "load_nusax", lambda *a: asked.append(a) or [row])
    (item,) = tasks.nusax("javanese", "valid")
    assert item.prompt == "Rotine enak.\nSentiment:"
    assert item.label == "positive"
    assert asked == [("javanese", "valid")]


def test_inference_is_asked_with_yes_maybe_or_no(monkeypatch):
    rows = [
        {"premise": "Dia tidur.", "hypothesis": "Dia bangun.", "label": label}
        for label in ("entailment", "neutral", "contradiction")
    ]
    monkeypatch.setattr(tasks, "load_indonli", lambda split: rows)
    monkeypatch.setattr(tasks, "load_xnli", lambda language, split: rows)
    items = tasks.indonli("val")
    assert items == tasks.xnli("sw", "dev")
    assert [item.label for item in items] == ["yes", "maybe", "no"]
    assert items[0].prompt == (
        "Dia tidur.\nQuestion: Dia bangun. Yes, maybe or no?\nAnswer:"
    )


def test_real_items_have_the_labels_of_their_words():
    here = {row.name: row.where != "not here" for row in data.catalogue()}
    if not (here["nusax"] and here["indonli"]):
        pytest.skip("NusaX or IndoNLI is not here")
    sentiment = tasks.nusax("buginese", "test")
    assert Counter(item.label for item in sentiment) == dict(
        zip(SENTIMENT_WORDS, (151, 96, 153), strict=True)
    )
    inference = Counter(item.label for item in tasks.indonli("test_expert"))
    assert inference == dict(zip(INFERENCE_WORDS, (1041, 944, 999), strict=True))


def test_the_example_of_the_module_runs(monkeypatch):
    rows = [{"text": item.text, "label": item.label} for item in MANY]
    monkeypatch.setattr(tasks, "load_nusax", lambda language, split: rows)
    parser, names = doctest.DocTestParser(), {"tokenizer": byte_level("<s>")}
    example = parser.get_doctest(tasks.__doc__, names, "tasks", None, 0)
    result = doctest.DocTestRunner().run(example, clear_globs=False)
    assert result.attempted == 7
    assert result.failed == 0
    assert example.globs["inputs"]["input_ids"].shape[0] == 32
    assert len(example.globs["label_tokens"]) == 3


# --- draws --------------------------------------------------------------------


@pytest.mark.parametrize("n", [16, 32, 64, 128])
def test_few_shots_are_as_balanced_as_can_be(n):
    drawn = few_shot(MANY, SENTIMENT_WORDS, n, seed=0)
    counts = Counter(item.label for item in drawn)
    assert len(set(drawn)) == n == counts.total()
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == 3


def test_larger_draws_contain_the_smaller_and_seeds_differ():
    draws = [few_shot(MANY, SENTIMENT_WORDS, n, seed=4) for n in (16, 32, 128)]
    assert draws[0] == draws[1][:16]
    assert draws[1] == draws[2][:32]
    others = [few_shot(MANY, SENTIMENT_WORDS, 16, seed) for seed in range(12)]
    assert len({frozenset(drawn) for drawn in others}) == 12
    # The label with one more item than the others is not always the same.
    extra = {Counter(i.label for i in d).most_common(1)[0][0] for d in others}
    assert extra == set(SENTIMENT_WORDS)


def test_discovery_has_as_many_of_each_label_and_is_another_draw():
    drawn = balanced(MANY, SENTIMENT_WORDS, 24, seed=4)
    assert Counter(i.label for i in drawn) == dict.fromkeys(SENTIMENT_WORDS, 24)
    assert len(set(drawn)) == 72
    assert drawn == balanced(MANY, SENTIMENT_WORDS, 24, seed=4)
    assert set(drawn) != set(few_shot(MANY, SENTIMENT_WORDS, 72, seed=4))
    assert len(balanced(MANY, SENTIMENT_WORDS, 119, seed=0)) == 357


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda: balanced(MANY, SENTIMENT_WORDS, 120, 0),
            "asked for 120 items with the label 'neutral', found 119 among 500",
        ),
        (
            lambda: balanced(MANY[:100], SENTIMENT_WORDS, 1, 0),
            "asked for 1 items with the label 'ne.*', found 0 among 100",
        ),
        (
            lambda: few_shot(items_of({"yes": 9, "no": 3}), ("yes", "no"), 8, 0),
            "asked for 4 items with the label 'no', found 3 among 12",
        ),
        (
            lambda: few_shot(MANY, SENTIMENT_WORDS, 2, 0),
            "2 items cannot have 3 labels",
        ),
        (lambda: balanced(MANY, SENTIMENT_WORDS, 0, 0), "per_label must be at least 1"),
    ],
)
def test_too_few_items_are_an_error(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_division_deals_everything_once_and_labels_evenly(parts):
    labels = [item.label for item in MANY]
    dealt = divide(labels, parts, seed=3)
    assert sorted(at for part in dealt for at in part) == list(range(500))
    assert all(part == sorted(part) for part in dealt)
    assert {len(part) for part in dealt} == {500 // parts}
    for label in SENTIMENT_WORDS:
        counts = [sum(labels[at] == label for at in part) for part in dealt]
        assert max(counts) - min(counts) <= 1
    assert divide(labels, parts, seed=3) == dealt
    assert (divide(labels, parts, seed=4) == dealt) == (parts == 1)


# --- label tokens -------------------------------------------------------------


@pytest.mark.parametrize("start", [None, "<s>"])
def test_label_tokens_are_those_after_a_space(start):
    tokenizer = byte_level(start)
    prompt = MANY[0].prompt
    tokens = label_tokens(tokenizer, SENTIMENT_WORDS, prompt)
    assert len(set(tokens)) == 3
    for word, token in zip(SENTIMENT_WORDS, tokens, strict=True):
        assert tokenizer.decode([token]) == f" {word}"
        assert tokenizer.encode(word, add_special_tokens=False) != [token]
        whole = tokenizer.encode(f"{prompt} {word}")
        assert whole == [*tokenizer.encode(prompt), token]


def test_a_word_of_several_tokens_is_refused():
    with pytest.raises(ValueError, match="'contradiction' is not one token after"):
        label_tokens(byte_level(), ("positive", "contradiction"), "x\nSentiment:")


def test_a_tokenizer_that_ends_texts_is_refused():
    with pytest.raises(ValueError, match="add no token at the end"):
        label_tokens(byte_level(end="</s>"), SENTIMENT_WORDS, MANY[0].prompt)


def test_words_with_the_same_token_are_refused():
    class Blind:
        def encode(self, text):
            return [len(word) for word in text.split()]

    with pytest.raises(ValueError, match="each needs one of its own"):
        label_tokens(Blind(), ("positive", "negative"), "x y :")


# --- encoding -----------------------------------------------------------------


def test_items_that_fit_are_encoded_as_they_are():
    tokenizer = byte_level("<s>")
    encoding = encode(MANY, tokenizer, SENTIMENT_WORDS, max_length=60)
    assert encoding.truncated == 0
    for item, example in zip(MANY, encoding.examples, strict=True):
        assert example.ids == tokenizer.encode(item.prompt)
        assert SENTIMENT_WORDS[example.label] == item.label


def test_a_long_text_loses_its_end_and_is_counted():
    tokenizer = byte_level("<s>")
    short = Item("elek tenan", "\nSentiment:", "negative")
    long = short._replace(text="film iki ora apik blas " * 20 + "elek")
    encoding = encode([short, long, long], tokenizer, SENTIMENT_WORDS, max_length=24)
    assert encoding.truncated == 2
    ids = encoding.examples[1].ids
    assert len(ids) == 24
    text = tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert text.endswith("\nSentiment:")
    assert long.text.startswith(text.removesuffix("\nSentiment:"))
    assert ids[0] == 0  # what the tokenizer puts first stays
    assert "film iki ora" in text
    tight = encode([long], tokenizer, SENTIMENT_WORDS, max_length=len(ids) + 1)
    assert tight.examples[0].ids[:10] == ids[:10]


def test_a_question_is_never_cut():
    tokenizer = byte_level()
    item = Item("aku", "\nQuestion: " + "ora apik " * 30, "yes")
    with pytest.raises(ValueError, match="leaves no room for its text in max_length 9"):
        encode([item], tokenizer, INFERENCE_WORDS, max_length=9)


def test_a_label_that_is_no_word_is_refused():
    with pytest.raises(ValueError, match="label 'positive', the words are yes, maybe"):
        encode(MANY, byte_level(), INFERENCE_WORDS, max_length=60)


def test_a_batch_is_answered_at_each_prompts_last_token():
    examples = [Encoded([5, 6, 7], 2), Encoded([8], 0), Encoded([9, 5], 1)]
    inputs, labels = Collator(pad=4)(examples)
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 4, 4], [9, 5, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert labels.tolist() == [2, 0, 1]
    assert labels.dtype == inputs["input_ids"].dtype == torch.int64
    last = last_positions(inputs["attention_mask"])
    ids = inputs["input_ids"].gather(1, last[:, None])[:, 0]
    assert ids.tolist() == [example.ids[-1] for example in examples]
