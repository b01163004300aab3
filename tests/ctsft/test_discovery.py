"""Circuits from scores, against counting by hand; faithfulness in a tiny model."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ftlib.ctsft import discovery
from ftlib.ctsft.ablation import faithfulness
from ftlib.ctsft.decomposition import PUBLISHED, head_means, scores
from ftlib.ctsft.discovery import (
    Evidence,
    choose_k,
    correlation,
    faithfulness_curve,
    find_circuit,
    jaccard,
    near_zero,
    random_curves,
    random_heads,
    rank_correlation,
    ranking,
    top_k,
)
from ftlib.ctsft.evaluation import Questions, is_right
from ftlib.ctsft.heads import Head, all_heads

SCORES = torch.tensor([[0.5, -3.0, 0.1], [2.0, -0.2, 0.5]])


def test_the_circuit_is_signed_and_near_zero_is_not():
    assert top_k(SCORES, 3) == [Head(1, 0), Head(0, 0), Head(1, 2)]
    assert near_zero(SCORES, 2) == [Head(0, 2), Head(1, 1)]
    assert ranking(SCORES)[-1] == Head(0, 1)
    assert sorted(ranking(SCORES)) == [Head(a, b) for a in range(2) for b in range(3)]


def test_random_heads_are_of_the_seed_and_of_all_heads():
    assert random_heads(SCORES, 3, 5) == random_heads(-SCORES, 3, 5)
    drawn = [tuple(random_heads(SCORES, 2, seed)) for seed in range(60)]
    assert len(set(drawn)) > 10
    assert all(len(set(heads)) == 2 for heads in drawn)
    assert {head for heads in drawn for head in heads} == set(ranking(SCORES))


@pytest.mark.parametrize("choose", [top_k, near_zero])
@pytest.mark.parametrize("k", [0, 7])
def test_a_circuit_has_at_least_a_head_and_at_most_all(choose, k):
    with pytest.raises(ValueError, match=f"circuit of {k} heads: the model has 6"):
        choose(SCORES, k)
    with pytest.raises(ValueError, match="choose from 1"):
        random_heads(SCORES, k, 0)


def test_the_smallest_size_that_reaches_the_share():
    assert choose_k((1, 2, 4, 6), (0.1, 0.6, 0.4, 1.0), 0.5) == 2
    assert choose_k((1, 2, 4, 6), (0.1, 0.6, 0.4, 1.0), 0.7) == 6
    with pytest.raises(ValueError, match=r"no circuit of 1, 2 heads has 90% .* 60%"):
        choose_k((1, 2), (0.1, 0.6), 0.9)


def test_overlap_and_agreement():
    a, b, c = Head(0, 0), Head(0, 1), Head(1, 0)
    assert jaccard([a, b], [b, c]) == 1 / 3
    assert jaccard([a], [a]) == 1 == 1 - jaccard([a], [b])
    with pytest.raises(ValueError, match="empty"):
        jaccard([], [])
    assert rank_correlation(SCORES, SCORES.exp()) == pytest.approx(1)
    assert correlation(SCORES, SCORES.exp()) < 0.9
    assert correlation(SCORES, 3 - 2 * SCORES) == pytest.approx(-1)


@pytest.fixture(scope="module")
def judged():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=12, n_embd=8, n_layer=2, n_head=2, n_positions=6, bos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data = 0.5 * torch.randn_like(parameter)
    ids = torch.randint(0, 12, (6, 5))
    batches = [({"input_ids": ids}, torch.tensor([0, 1, 2, 0, 1, 2]))]
    asked = Questions(batches, torch.tensor([3, 4, 5]))
    return model, asked, torch.randn(2, 2, 4)


def test_a_curve_is_the_faithfulness_of_each_size(judged):
    model, asked, means = judged
    order = all_heads(model)[::-1]
    curve = faithfulness_curve(*judged, order, (1, 3, 4))
    expected = [
        faithfulness(model, order[:k], asked.batches, means, asked.token_ids)
        for k in (1, 3, 4)
    ]
    assert curve == pytest.approx(expected)
    assert curve[-1] == 1
    assert len(set(curve)) == 3


def test_random_curves_are_of_random_circuits(judged, monkeypatch):
    curves = random_curves(*judged, (1, 2, 4), seeds=(3, 4, 5))
    assert [len(curve) for curve in curves] == [3, 3, 3]
    assert all(curve[-1] == pytest.approx(1) for curve in curves)
    drawn = random_heads(torch.zeros(2, 2), 2, 4)
    model, asked, means = judged
    again = faithfulness(model, drawn, asked.batches, means, asked.token_ids)
    assert curves[1][1] == pytest.approx(again)
    monkeypatch.setattr(discovery, "faithfulnesses", lambda *a: list(range(9)))
    assert random_curves(*judged, (1, 2, 4), (0, 1, 2)) == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
    ]


def test_a_circuit_is_found_by_scores_and_sized_by_other_questions(judged):
    model, asked, _ = judged
    ((inputs, labels),) = asked.batches
    other = Questions(
        [({"input_ids": inputs["input_ids"].flip(0)}, labels)], asked.token_ids
    )
    for rules in ({}, {"rules": PUBLISHED}):
        circuit = find_circuit(model, Evidence(asked, other), (1, 4), 0.99, **rules)
        means = head_means(model, asked.batches, classes=3)
        expected = scores(model, asked.batches, means, asked.token_ids, **rules)
        torch.testing.assert_close(circuit.means, means)
        torch.testing.assert_close(circuit.scores, expected)
        best = top_k(expected, 1)
        alone = faithfulness(model, best, other.batches, means, other.token_ids)
        assert circuit.faithful == pytest.approx([alone, 1])
        assert circuit.size == (1 if alone >= 0.99 else 4)
        assert circuit.heads == top_k(expected, circuit.size)


def test_an_answer_is_the_label_of_the_highest_logit(judged):
    model, asked, _ = judged
    ((inputs, labels),) = asked.batches
    expected = []
    for ids, label in zip(inputs["input_ids"], labels, strict=True):
        logits = model(ids[None]).logits[0, -1, asked.token_ids]
        expected.append(bool(logits.argmax() == label))
    assert is_right(model, asked).tolist() == expected
    assert len(set(expected)) == 2
