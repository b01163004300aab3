"""BERTScore against loops over tokens, and nBERT against hand-made scores."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_bert, word_piece
from transformers import RobertaTokenizer

from ftlib import models
from ftlib.metrics import bertscore
from ftlib.metrics.bertscore import (
    Embedded,
    Encoder,
    bert_score,
    greedy_match,
    load_encoder,
    nbert,
)

WORDS = "a the cat dog sat ran on mat unk fast slow".split()
TEXTS = ["the cat sat", "a dog ran fast on the mat", "dog", "cat cat slow", "A Cat"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A BERT with random weights, whose longest text has ten tokens."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = word_piece(folder, WORDS, do_lower_case=False, model_max_length=10)
    torch.manual_seed(0)
    model = tiny_bert(
        5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=10,
        initializer_range=0.5,
    )
    return Encoder(model, tokenizer, 2, "tiny")


def by_hand(candidate, reference, encoder):
    """Precision, recall and F1 by loops over tokens; each text is embedded alone."""

    def embed(text):
        ids = encoder.tokenizer(text.strip(), truncation=True).input_ids
        with torch.no_grad():
            output = encoder.model(torch.tensor([ids]), output_hidden_states=True)
        return ids, output.hidden_states[encoder.layer][0].double().numpy()

    def cosine(u, v):
        return u @ v / math.sqrt((u @ u) * (v @ v))

    def one_way(tokens, others):
        outer = encoder.tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
        best = [
            max(cosine(vector, other) for other in others[1])
            for index, vector in zip(*tokens, strict=True)
            if index not in outer
        ]
        return sum(best) / len(best)

    a, b = embed(candidate), embed(reference)
    precision, recall = one_way(a, b), one_way(b, a)
    return precision, recall, 2 * precision * recall / (precision + recall)


def test_scores_are_those_of_loops_whatever_else_is_in_the_batch(encoder):
    pairs = [(c, r) for c in TEXTS for r in TEXTS]
    scores = bert_score([c for c, _ in pairs], [r for _, r in pairs], encoder)
    expected = np.array([by_hand(c, r, encoder) for c, r in pairs])
    for found, column in zip(scores[:3], expected.T, strict=True):
        np.testing.assert_allclose(found, column, rtol=1e-4, atol=1e-5)
    assert scores.truncated == 0
    assert scores.f1.std() > 0.01
    same = [c == r for c, r in pairs]
    np.testing.assert_allclose(scores.f1[same], 1, atol=1e-5)


def test_batches_do_not_change_the_scores(encoder, monkeypatch):
    one = bert_score(TEXTS, TEXTS[::-1], encoder)
    monkeypatch.setattr(bertscore, "_BATCH", 2)
    for a, b in zip(one, bert_score(TEXTS, TEXTS[::-1], encoder), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_layers_differ(encoder):
    other = Encoder(encoder.model, encoder.tokenizer, 3, "tiny")
    a, b = (bert_score(TEXTS, TEXTS[::-1], e).f1 for e in (encoder, other))
    assert np.abs(a - b).max() > 1e-3


def test_outer_tokens_are_matched_but_not_counted():
    """Two tokens each; the first of each text is its beginning, of weight 0."""
    e = torch.eye(3)
    weights = torch.tensor([0.0, 1.0])
    candidate = Embedded(torch.stack([e[0], e[1]]), weights)
    reference = Embedded(torch.stack([e[1], 0.6 * e[1] + 0.8 * e[2]]), weights)
    precision, recall = greedy_match(candidate, reference)
    assert precision == pytest.approx(1)  # matched with the reference's beginning
    assert recall == pytest.approx(0.6)


def test_similarities_below_zero_stay_below_zero():
    e = torch.eye(2)
    one = Embedded(e[:1], torch.ones(1))
    other = Embedded(-e[:1], torch.ones(1))
    assert greedy_match(one, other) == (-1.0, -1.0)


def test_an_empty_text_scores_zero(encoder):
    scores = bert_score(["", "cat", "  "], ["cat", "", ""], encoder)
    assert not np.concatenate(scores[:3]).any()


def test_long_texts_are_cut_and_counted_once(encoder):
    long = "cat " * 9
    scores = bert_score([long, long, "cat " * 8], ["cat " * 20, "dog", "dog"], encoder)
    assert scores.truncated == 2
    assert scores.f1[0] == pytest.approx(1, abs=1e-5)


def test_no_pairs_and_unequal_numbers(encoder):
    assert bert_score([], [], encoder).f1.shape == (0,)
    with pytest.raises(ValueError, match="got 1 and 2"):
        bert_score(["a", "b"], ["a"], encoder)


def test_roberta_reads_a_text_as_if_a_space_stood_before_it():
    """Its vocabulary has the word with a space and without."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "c", "a", "t", "Ġ"]
    tokens += ["ca", "cat", "Ġcat"]
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=8)
    encoder = Encoder(torch.nn.Identity(), tokenizer, 1, "tiny")
    rows, truncated = bertscore._tokenize(["cat", ""], encoder)
    assert truncated == 0
    assert [tokens[i] for i in rows["cat"]] == ["<s>", "Ġcat", "</s>"]
    assert [tokens[i] for i in rows[""]] == ["<s>", "</s>"]
    assert bertscore._weights(rows["cat"], tokenizer).tolist() == [0, 1, 0]


# --- nBERT --------------------------------------------------------------------


def test_nbert_is_the_best_reference_and_zero_where_the_label_is_wrong(encoder):
    golds = [["The cat ran", "a DOG sat"], ["dog"], ["cat", "mat", "fast"]]
    explanations = ["a dog sat", "Dog", "UNK"]
    result = nbert(
        ["Yes ", "no", "maybe"], ["yes", "yes", "Maybe"], explanations, golds, encoder
    )
    expected = [
        max(by_hand(e.lower(), g.lower(), encoder)[2] for g in gold)
        for e, gold in zip(explanations, golds, strict=True)
    ]
    np.testing.assert_allclose(result.scores, 100 * np.array(expected), rtol=1e-4)
    assert result.correct.tolist() == [True, False, True]
    assert result.ungated.mean == pytest.approx(100 * np.mean(expected), rel=1e-4)
    gated = 100 * (expected[0] + expected[2]) / 3
    assert result.gated.mean == pytest.approx(gated, rel=1e-4)
    assert result.accuracy.mean == pytest.approx(200 / 3)
    assert result.encoder == "tiny, layer 2"
    assert result.scores[:2] == pytest.approx(100, abs=1e-3)


def test_the_published_encoder_is_named():
    assert bertscore.PUBLISHED == ("roberta-large", 17)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], ["a"], ["x"], []), "got 1, 1, 1 and 0"),
        (([], [], [], []), "got 0, 0, 0 and 0"),
        ((["a", "b"], ["a", "b"], ["x", "y"], [["x"], []]), "item 1 has no gold"),
    ],
)
def test_items_that_do_not_fit_are_errors(encoder, arguments, message):
    with pytest.raises(ValueError, match=message):
        nbert(*arguments, encoder)


# --- the stand-in -------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    if not models.available("minilm-l6"):
        pytest.skip("minilm-l6 is not here")
    return load_encoder(device=torch.device("cpu"))


def test_the_stand_in_prefers_what_means_the_same(minilm):
    assert str(minilm) == "minilm-l6, layer 4"
    reference = "a man is playing a guitar on the stage."
    candidates = ["a guy plays guitar on stage.", "the cat sleeps in a box."]
    scores = bert_score(candidates, [reference] * 2, minilm)
    assert scores.f1[0] > scores.f1[1] + 0.1
    for i, candidate in enumerate(candidates):
        expected = by_bert(candidate, reference, minilm)
        assert scores.f1[i] == pytest.approx(expected, abs=1e-4)


def by_bert(candidate, reference, encoder):
    """F1 with the similarities of all pairs of tokens in one matrix, in NumPy."""
    vectors = []
    for text in (candidate, reference):
        inputs = encoder.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            states = encoder.model(**inputs, output_hidden_states=True).hidden_states
        array = states[encoder.layer][0].double().numpy()
        vectors.append(array / np.linalg.norm(array, axis=1, keepdims=True))
    matrix = vectors[0] @ vectors[1].T
    precision, recall = matrix.max(1)[1:-1].mean(), matrix.max(0)[1:-1].mean()
    return 2 * precision * recall / (precision + recall)


def test_a_layer_it_does_not_have_is_an_error(minilm):
    with pytest.raises(ValueError, match="minilm-l6 has layers 1 to 6, not 7"):
        load_encoder("minilm-l6", 7)
