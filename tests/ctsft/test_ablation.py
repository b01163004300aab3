"""Mean ablation by hooks, against models whose weights are changed instead."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForTokenClassification,
)

from ftlib.ctsft.ablation import (
    ablation_effects,
    faithfulness,
    label_logits,
    mean_ablated,
    mean_margin,
)
from ftlib.ctsft.architectures import describe
from ftlib.ctsft.heads import Head, all_heads

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **SPECIAL,
}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=30, n_embd=16, n_layer=2, n_head=4, n_positions=8, **SPECIAL
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
    "t5": lambda: T5ForTokenClassification(
        T5Config(
            vocab_size=30,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            num_labels=3,
        )
    ),
}
TOKENS = torch.tensor([1, 0, 2])
LABELS = torch.tensor([0, 1, 2, 1])
CIRCUIT = [Head(0, 1), Head(1, 0), Head(1, 3)]


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn_like(parameter)
    return model


def batch(lengths=(6, 6, 6, 6)):
    torch.manual_seed(1)
    ids = torch.randint(3, 30, (4, 6))
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def means():
    torch.manual_seed(2)
    return torch.randn(2, 4, 4, dtype=torch.float64)


def without_heads(model, heads, means):
    """Make a model that never reads heads, and always adds what their means write."""
    for layer, block in enumerate(describe(model).blocks):
        output = block.attention.o
        added = torch.zeros(16, dtype=torch.float64)
        for head in heads:
            if head.layer == layer:
                columns = slice(4 * head.index, 4 * head.index + 4)
                added += output.weight.detach()[:, columns] @ means[head]
                with torch.no_grad():
                    output.weight[:, columns] = 0
        if output.module.bias is None:
            output.module.bias = torch.nn.Parameter(added)
        else:
            output.module.bias.data += added
    return model


@torch.no_grad()
def test_heads_are_replaced_by_their_means(model, means):
    inputs, plain = batch(), label_logits(model, batch(), TOKENS)
    with mean_ablated(model, CIRCUIT, means):
        ablated = label_logits(model, inputs, TOKENS)
    assert torch.equal(label_logits(model, inputs, TOKENS), plain)
    without_heads(model, CIRCUIT, means)
    expected = label_logits(model, inputs, TOKENS)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(ablated, expected, rtol=1e-6, atol=1e-6)


def margin_by_hand(logits):
    own = torch.stack([logits[i, label] for i, label in enumerate(LABELS)])
    rest = (logits.sum(1) - own) / 2
    m = own - rest
    return ((m[0]) + (m[1] + m[3]) / 2 + m[2]) / 3


@torch.no_grad()
def test_effects_are_what_the_balanced_margin_loses(means):
    model, batches = build("gpt2"), [(batch(), LABELS)]
    heads = [Head(1, 3), Head(0, 1)]
    effects = ablation_effects(model, batches, means, TOKENS, heads=heads)
    whole = margin_by_hand(model(**batch()).logits[:, -1, TOKENS])
    assert mean_margin(model, batches, TOKENS) == pytest.approx(whole.item())
    for head, effect in zip(heads, effects, strict=True):
        other = without_heads(build("gpt2"), [head], means)
        left = margin_by_hand(other(**batch()).logits[:, -1, TOKENS])
        assert effect.item() == pytest.approx((whole - left).item(), rel=1e-5)
    every = ablation_effects(model, batches, means, TOKENS)
    torch.testing.assert_close(every[[7, 1]], effects)


@torch.no_grad()
def test_faithfulness_is_the_share_of_the_margin(means):
    model, batches = build("qwen2"), [(batch(), LABELS)]
    assert faithfulness(model, all_heads(model), batches, means, TOKENS) == 1
    assert faithfulness(model, [], batches, means, TOKENS) == 0
    outside = [head for head in all_heads(model) if head not in CIRCUIT]
    margins = [
        mean_margin(without_heads(build("qwen2"), removed, means), batches, TOKENS)
        for removed in (outside, all_heads(model), [])
    ]
    expected = (margins[0] - margins[1]) / (margins[2] - margins[1])
    found = faithfulness(model, CIRCUIT, batches, means, TOKENS)
    assert found == pytest.approx(expected, rel=1e-5)


def test_faithfulness_needs_heads_that_matter(means):
    model = build("qwen2")
    model.lm_head.weight.data.zero_()
    with pytest.raises(ValueError, match="the same with all heads and with none"):
        faithfulness(model, CIRCUIT, [(batch(), LABELS)], means, TOKENS)


@torch.no_grad()
def test_logits_are_read_at_the_last_token(model):
    inputs = batch((6, 2, 4, 6))
    found = label_logits(model, inputs, TOKENS)
    for i, length in enumerate((6, 2, 4, 6)):
        alone = {name: value[i : i + 1, :length] for name, value in inputs.items()}
        logits = model(**alone).logits
        expected = logits[0, -1] if logits.dim() == 3 else logits[0]
        torch.testing.assert_close(found[i], expected[TOKENS], rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "t5"])
def test_padding_may_be_on_the_left(name):
    model, right = build(name), batch((6, 2, 4, 6))
    left = {name: value.clone() for name, value in right.items()}
    for name, value in right.items():
        left[name][1], left[name][2] = value[1].roll(4), value[2].roll(2)
    torch.testing.assert_close(
        label_logits(model, left, TOKENS),
        label_logits(model, right, TOKENS),
        rtol=1e-6,
        atol=1e-6,
    )


def hooks_of(model):
    return [h for module in model.modules() for h in module._forward_pre_hooks]


def test_hooks_are_removed_after_an_exception(means):
    model = build("gpt2")
    with mean_ablated(model, CIRCUIT, means):
        assert len(hooks_of(model)) == 2
    assert not hooks_of(model)
    with pytest.raises(IndexError), mean_ablated(model, CIRCUIT, means):
        model(torch.tensor([[99]]))
    assert not hooks_of(model)


def test_the_mode_is_put_back(means):
    model = build("gpt2").train()
    ablation_effects(model, [(batch(), LABELS)], means, TOKENS, heads=[Head(0, 0)])
    assert all(module.training for module in model.modules())


def test_heads_and_means_must_be_the_models(means):
    model = build("gpt2")
    with (
        pytest.raises(ValueError, match=r"no Head\(layer=2"),
        mean_ablated(model, [Head(2, 0)], means),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"means have shape \(1, 4, 4\)"),
        mean_ablated(model, CIRCUIT, means[:1]),
    ):
        pass
    assert not hooks_of(model)


def test_every_label_needs_an_example(means):
    labels = torch.tensor([0, 1, 1, 0])
    with pytest.raises(ValueError, match="no example has label 2"):
        mean_margin(build("gpt2"), [(batch(), labels)], TOKENS)
