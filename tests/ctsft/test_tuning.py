"""What is tuned moves and nothing else does, bit for bit."""

import math

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ftlib.ctsft.heads import Head, head_slices, norm_parameters
from ftlib.ctsft.tasks import Collator, Encoded
from ftlib.ctsft.tuning import (
    Recipe,
    distance,
    label_loss,
    size,
    squared_distance,
    tune,
    weights_of,
)
from ftlib.training import TrainingSettings

TOKENS = torch.tensor([7, 8, 9])
CIRCUIT = [Head(0, 1), Head(1, 3)]
SETTINGS = TrainingSettings(steps=6, batch_size=4, learning_rate=1e-2)
EXAMPLES = [Encoded([1 + n % 6, 5, 3 + n % 4][: 2 + n % 2], n % 3) for n in range(12)]


pytestmark = pytest.mark.usefixtures("base_cache")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=12,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def tuned(model, recipe, heads=(), settings=SETTINGS, **more):
    return tune(model, recipe, heads, EXAMPLES, TOKENS, settings, **more)


def moved(model, start):
    """Which elements of which parameter are no longer the same bits."""
    found = {n: p.detach() != start[n] for n, p in model.named_parameters()}
    return {name: mask for name, mask in found.items() if mask.any()}


@pytest.mark.parametrize("weights", ["circuit", "near zero", "random"])
@pytest.mark.parametrize("tensors", [("q", "o"), ("q",), ("o",), ("q", "k", "v", "o")])
def test_only_the_heads_tensors_and_the_norms_move(model, weights, tensors):
    start = weights_of(model)
    trained = tuned(model, Recipe(weights, tensors=tensors), CIRCUIT)
    changed = moved(model, start)
    norms = {name for name in start if "norm" in name}
    rows = {0: slice(4, 8), 1: slice(12, 16)}
    expected = {
        f"model.layers.{layer}.self_attn.{tensor}_proj.weight": rows[layer]
        for layer in rows
        for tensor in tensors
    }
    assert set(changed) == norms | set(expected)
    for name, part in expected.items():
        mask = changed[name].T if ".o_proj" in name else changed[name]
        assert mask[part].any()
        mask = mask.clone()
        mask[part] = False
        assert not mask.any()
    assert trained == 16 * 5 + len(tensors) * 2 * 4 * 16
    assert all(p.requires_grad for p in model.parameters())


def test_norms_alone(model):
    start = weights_of(model)
    assert tuned(model, Recipe("norms")) == 16 * 5
    assert set(moved(model, start)) == {name for name in start if "norm" in name}


def test_all_weights_move_in_full_fine_tuning(model):
    start = weights_of(model)
    assert tuned(model, Recipe("all")) == sum(w.numel() for w in start.values())
    assert set(moved(model, start)) == set(start)


def test_lora_has_the_budget_of_the_circuit_and_leaves_the_weights(model):
    start = weights_of(model)
    budget = size([*head_slices(model, CIRCUIT), *norm_parameters(model)])
    trained = tuned(model, Recipe("lora"), CIRCUIT)
    per_rank = 4 * (16 + 16)
    assert abs(trained - budget) <= per_rank / 2
    adapted = {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert adapted == {
        f"model.layers.{layer}.self_attn.{tensor}_proj"
        for layer in (0, 1)
        for tensor in "qo"
    }
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, start[name.replace(".base_layer", "")])


def test_an_empty_circuit_is_refused(model):
    with pytest.raises(ValueError, match="circuit is empty"):
        tuned(model, Recipe("circuit"))


@pytest.mark.parametrize("recipe", [("norms", 0.1), ("all", -1.0)])
def test_l2_is_for_full_fine_tuning(recipe):
    weights, l2 = recipe
    with pytest.raises(ValueError, match=f"l2 is {l2} and trains {weights}"):
        Recipe(weights, l2=l2)


# --- loss and distance --------------------------------------------------------


def test_the_loss_is_of_the_label_after_each_prompts_last_token(model):
    batch = Collator()(EXAMPLES[:4])
    by_hand = []
    for example in EXAMPLES[:4]:
        logits = model(torch.tensor([example.ids])).logits[0, -1]
        target = TOKENS[example.label]
        by_hand.append(F.cross_entropy(logits, target).item())
    loss = label_loss(model, (batch, TOKENS)).item()
    assert loss == pytest.approx(sum(by_hand) / 4, rel=1e-5)


def test_distance_is_over_all_weights_and_lora_counts_as_if_merged(model):
    start = weights_of(model)
    assert distance(model, start) == 0
    tuned(model, Recipe("lora"), CIRCUIT)
    far = distance(model, start)
    for module in [m for m in model.modules() if isinstance(m, LoraLayer)]:
        module.merge()
    deltas = [
        (p.detach() - start[n.replace(".base_layer", "")]).norm()
        for n, p in model.named_parameters()
        if "lora_" not in n
    ]
    assert far > 0
    assert far == pytest.approx(math.hypot(*deltas), rel=1e-4)


def test_the_l2_term_draws_back_to_the_start(model):
    start = weights_of(model)
    tuned(model, Recipe("all"))
    far = distance(model, start)
    steps = [(p.detach() - start[n]).norm() for n, p in model.named_parameters()]
    assert far == pytest.approx(math.hypot(*steps), rel=1e-5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(start[name])
    tuned(model, Recipe("all", l2=10.0))
    assert 0 < distance(model, start) < far
    model.zero_grad()
    squared_distance(model, start).backward()
    embedding = model.model.embed_tokens.weight
    torch.testing.assert_close(
        embedding.grad, 2 * (embedding - start["model.embed_tokens.weight"]).detach()
    )


def test_every_step_is_watched(model):
    seen = []
    tuned(model, Recipe("norms"), watch=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_orders_do_not_depend_on_the_recipe(model, monkeypatch):
    seen = []

    def noted(model, batch):
        seen.append(batch[0][0]["input_ids"])
        return label_loss(model, batch)

    monkeypatch.setattr("ftlib.ctsft.tuning.label_loss", noted)
    tuned(model, Recipe("circuit"), CIRCUIT)
    tuned(model, Recipe("all"))
    tuned(model, Recipe("lora"), CIRCUIT)
    for other in (seen[6:12], seen[12:]):
        assert len(other) == 6
        assert all(torch.equal(a, b) for a, b in zip(seen, other, strict=False))
