"""The template world: its corpus, and exact readings against sampling."""

import pytest
import torch

from ftlib.cgm import experiment, stories
from ftlib.cgm.language import Continuations
from ftlib.models.tiny import tiny_gpt


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = tiny_gpt(len(stories.VOCABULARY)).eval()
    for parameter in network.parameters():
        parameter.data.mul_(2)
    return experiment.asked_about(network, list(stories.TRAINED))


def test_the_corpus_keeps_to_its_template_and_shares():
    text = stories.corpus(60_000, torch.Generator().manual_seed(0))
    words = [stories.decode(row).split() for row in text[:2000]]
    for story in words:
        assert len(story) == 12
        female = story[4] in stories.FEMALE_NAMES
        assert female or story[4] in stories.MALE_NAMES
        assert story[6] == ("she" if female else "he")
    shares = {**stories.TRAINED, **stories.HELD_OUT}
    column = [stories.VOCABULARY.index(name) for name in stories.FEMALE_NAMES]
    for profession, share in shares.items():
        own = text[text[:, 2] == stories.VOCABULARY.index(profession)]
        female = torch.isin(own[:, 4], torch.tensor(column)).double().mean()
        assert abs(female - share) < 4 * (share * (1 - share) / len(own)) ** 0.5
        assert len(own) > 4000


def test_corpus_is_reproducible():
    first = stories.corpus(50, torch.Generator().manual_seed(3))
    again = stories.corpus(50, torch.Generator().manual_seed(3))
    assert torch.equal(first, again)


def test_encode_and_decode_are_inverse_and_unknown_words_are_refused():
    text = "once a nurse named Mia . she found a red kite ."
    assert stories.decode(torch.tensor(stories.encode(text))) == text
    ended = torch.tensor([*stories.encode("once a"), 0, 5, 5])
    assert stories.decode(ended) == "once a"
    with pytest.raises(KeyError, match="kitten"):
        stories.encode("a kitten")


def test_exact_shares_agree_with_samples(model):
    torch.manual_seed(1)
    exact = stories.exact(model)
    samples = model.sample(16_000)
    gender = stories.gender(samples)
    for k in range(8):
        own = gender[samples.prompt == k]
        for share, sign in ((exact.female[k], 1), (exact.male[k], -1)):
            error = (share * (1 - share) / len(own)) ** 0.5
            assert abs((own == sign).double().mean() - share) < 4.5 * error


@torch.no_grad()
def test_agreement_equals_step_by_step_scoring(model):
    exact = stories.exact(model)
    network = model.model
    weight = total = 0.0
    for name in stories.FEMALE_NAMES + stories.MALE_NAMES:
        prompt = stories.prompts(["pilot"])[0]
        first = network(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
        p = float(first[stories.encode(name)[0]])
        after = torch.tensor([prompt + stories.encode(f"{name} .")])
        pronoun = "she" if name in stories.FEMALE_NAMES else "he"
        logits = network(input_ids=after).logits[0, -1]
        fits = float(logits.softmax(-1)[stories.encode(pronoun)[0]])
        weight, total = weight + p, total + p * fits
    pilot = list(stories.TRAINED).index("pilot")
    assert float(exact.agreement[pilot]) == pytest.approx(total / weight, abs=1e-6)


def test_gender_reads_the_first_word_only():
    written = torch.tensor([stories.encode(w) for w in ("Mia", "Tim", "she")])
    rows = torch.ones(3, 1, dtype=torch.bool)
    samples = Continuations(written, rows, rows, torch.zeros(3, dtype=torch.long))
    assert stories.gender(samples).tolist() == [1, -1, 0]


def test_evaluation_of_an_untouched_model_is_the_base(model):
    torch.manual_seed(2)
    metrics = experiment.evaluate_stories(model, model, 64)
    assert metrics["kl"].value == pytest.approx(0, abs=1e-6)
    assert metrics["excess_kl"].value == pytest.approx(-1, abs=1e-5)
    expected = stories.exact(model).imbalance.abs().mean()
    assert metrics["mean_abs_imbalance"] == pytest.approx(float(expected))
