"""Sampling and scoring of prompted language models against enumeration."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ftlib.cgm.calibrate import check_scores
from ftlib.cgm.language import PromptedLM, per_prompt

VOCABULARY, END, LONGEST = 5, 0, 3


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=12
    )
    return GPT2LMHeadModel(config)


def llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(params=[gpt2, llama])
def model(request):
    torch.manual_seed(0)
    network = request.param().eval()
    for parameter in network.parameters():
        parameter.data.mul_(3)  # far from uniform
    return PromptedLM(network, [[1, 2, 3], [4]], LONGEST, END)


def continuations():
    """Every way to write up to three tokens, ended by the end token or by length."""
    words = range(1, VOCABULARY)
    for length in range(LONGEST):
        for start in itertools.product(words, repeat=length):
            yield [*start, END]
    for whole in itertools.product(words, repeat=LONGEST):
        yield list(whole)


@torch.no_grad()
def score_one_by_one(model, prompt, written):
    """Log-probability of a continuation, a forward pass without padding for each."""
    total = 0.0
    for i, token in enumerate(written):
        logits = model.model(input_ids=torch.tensor([prompt + written[:i]])).logits
        total += logits[0, -1].double().log_softmax(-1)[token]
    return float(total)


def test_log_prob_equals_scoring_without_padding(model):
    torch.manual_seed(1)
    samples = model.sample(20)
    scores = model.log_prob(samples).detach()
    lengths = set()
    for i in range(20):
        prompt = [[1, 2, 3], [4]][samples.prompt[i]]
        written = samples.written[i][samples.scored[i]].tolist()
        lengths.add(len(written))
        expected = score_one_by_one(model, prompt, written)
        assert float(scores[i]) == pytest.approx(expected, abs=1e-5)
    assert len(lengths) > 1


def test_probabilities_of_all_continuations_sum_to_one(model):
    total = sum(
        torch.tensor(score_one_by_one(model, [1, 2, 3], w)).exp()
        for w in continuations()
    )
    assert float(total) == pytest.approx(1, abs=1e-6)


def test_samples_follow_the_enumerated_distribution(model):
    torch.manual_seed(2)
    n = 20_000
    samples = model.sample(2 * n)
    own = samples[samples.prompt == 1]
    drawn = [
        tuple(row[keep].tolist())
        for row, keep in zip(own.written, own.scored, strict=True)
    ]
    worst = 0.0
    for written in continuations():
        p = torch.tensor(score_one_by_one(model, [4], written)).exp().item()
        share = drawn.count(tuple(written)) / n
        worst = max(worst, abs(share - p) / (p * (1 - p) / n) ** 0.5)
    assert worst < 4.5


def test_prompts_are_dealt_in_turn_and_slices_agree(model):
    samples = model.sample(5)
    assert samples.prompt.tolist() == [0, 1, 0, 1, 0]
    part = samples[1:3]
    assert len(part) == 2
    torch.testing.assert_close(
        model.log_prob(part), model.log_prob(samples)[1:3], rtol=1e-5, atol=1e-5
    )


def test_kl_estimate_equals_the_enumerated_kl(model):
    torch.manual_seed(3)
    other = PromptedLM(type(model.model)(model.model.config), [[4]], LONGEST, END)
    here = PromptedLM(model.model, [[4]], LONGEST, END)
    other.eval()
    exact = 0.0
    for written in continuations():
        p = score_one_by_one(here, [4], written)
        q = score_one_by_one(other, [4], written)
        exact += torch.tensor(p).exp().item() * (p - q)
    samples = here.sample(4000)
    estimate = here.kl_from(other, samples)
    ratio = here.log_prob(samples) - other.log_prob(samples)
    assert abs(estimate.mean() - exact) < 4 * estimate.std() / 4000**0.5
    assert estimate.std() < ratio.std()
    assert here.kl_from(here, samples).abs().max() < 1e-6


def test_a_checkpoints_own_sampling_settings_are_not_used(model):
    network = model.model
    network.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=2.0)
    check_scores(PromptedLM(network, [[4]], LONGEST, END), 1000)


def test_a_model_with_lora_samples_what_it_scores(model):
    adapted = get_peft_model(
        model.model, LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    torch.manual_seed(4)
    check_scores(PromptedLM(adapted.eval(), [[4]], LONGEST, END), 1000)


def test_without_an_end_token_every_continuation_is_whole(model):
    whole = PromptedLM(model.model, [[4]], LONGEST, end_token=None)
    torch.manual_seed(5)
    samples = whole.sample(200)
    assert samples.written.shape == (200, LONGEST)
    assert samples.scored.all()
    assert (samples.written[:, :-1] == END).any()  # a token like any other
    rows = torch.arange(LONGEST)
    logits = model.model(input_ids=samples.tokens[:, :-1]).logits
    expected = logits.log_softmax(-1)[:, rows, :].gather(2, samples.written[..., None])
    torch.testing.assert_close(
        whole.log_prob(samples), expected.sum((1, 2)), rtol=1e-5, atol=1e-5
    )
    check_scores(whole, 1000)


def test_per_prompt_gives_each_prompt_its_mean():
    prompt = torch.tensor([0, 1, 2] * 10)
    values = torch.randn(30)
    h = per_prompt(values, prompt, 3)
    for k in range(3):
        torch.testing.assert_close(h[:, k].mean(), values[prompt == k].mean())
