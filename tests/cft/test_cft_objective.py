"""The masked loss against transformers' own, and as the training loop needs it.

Run by itself under torchrun, this file is the script of the test with two processes.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from ftlib import models
from ftlib.cft.data import (
    PackingCollator,
    PaddingCollator,
    criticise,
    supervise,
    tokenize_examples,
)
from ftlib.cft.objective import Learner, masked_loss, training_loss
from ftlib.sequences import IGNORED
from ftlib.training import TrainingSettings, train

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # far from uniform predictions
}
WIDE = COMMON | {"intermediate_size": 24, "num_key_value_heads": 2}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, WIDE),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, WIDE | {"tie_word_embeddings": True}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, COMMON),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, WIDE | {"head_dim": 4}),
}
SHAPES = [(5, 3), (7, 1), (2, 8), (3, 2)]  # tokens of prompt and of target
COLLATORS = {"padded": PaddingCollator(), "packed": PackingCollator()}
SETTINGS = TrainingSettings(steps=5, batch_size=4, learning_rate=0.01)


def make_model(kind="llama"):
    torch.manual_seed(0)
    model, config, sizes = MODELS[kind]
    model = model(config(**sizes)).eval()
    model.config.use_cache = False
    return model


def make_features(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [supervise(ids(n), [*ids(m - 1), 2], 64) for n, m in shapes]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(model, found, expected):
    expected = gradients(model, expected)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


# --- values --------------------------------------------------------------------


@pytest.mark.parametrize("rows", COLLATORS)
@pytest.mark.parametrize("kind", MODELS)
def test_mean_over_tokens_is_transformers_loss(kind, rows):
    model, batch = make_model(kind), COLLATORS[rows](make_features())
    found = masked_loss(model, **batch, mean="token")
    expected = model(**batch).loss
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, found.loss, expected)


@pytest.mark.parametrize("rows", COLLATORS)
@pytest.mark.parametrize("kind", MODELS)
def test_mean_over_examples_is_that_of_transformers_losses_one_by_one(kind, rows):
    model, features = make_model(kind), make_features()
    found = masked_loss(model, **COLLATORS[rows](features))
    ones = [model(**PaddingCollator()([feature])).loss for feature in features]
    expected = torch.stack(ones).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, found.loss, expected)
    by_token = masked_loss(model, **COLLATORS[rows](features), mean="token").loss
    assert (found.loss - by_token).abs() > 0.01


@pytest.mark.parametrize("rows", COLLATORS)
def test_models_in_float64_have_losses_in_float64(rows):
    """Whereas transformers' own is computed in float32."""
    model, features = make_model().double(), make_features()
    ones = []
    for feature in features:
        ids, labels = (torch.tensor(feature[name]) for name in ("input_ids", "labels"))
        logits = model(input_ids=ids[None]).logits[0]
        ones.append(F.cross_entropy(logits[:-1], labels[1:]))
    found = masked_loss(model, **COLLATORS[rows](features)).loss
    torch.testing.assert_close(found, torch.stack(ones).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", COLLATORS)
def test_counts_and_accuracy_are_those_of_the_logits(rows):
    model, features = make_model(), make_features()
    right = []
    with torch.no_grad():
        for feature in features:
            ids = torch.tensor([feature["input_ids"]])
            # The model's own choices are the labels of every other position.
            chosen = model(input_ids=ids).logits.argmax(-1)[0]
            for t in range(1, len(feature["labels"]), 2):
                if feature["labels"][t] != IGNORED:
                    feature["labels"][t] = chosen[t - 1].item()
            labels = torch.tensor(feature["labels"][1:])
            hits = (chosen[:-1] == labels)[labels != IGNORED]
            right.append(hits.double())
    assert 0 < torch.cat(right).mean() < 1
    batch = COLLATORS[rows](features)
    by_example = masked_loss(model, **batch)
    by_token = masked_loss(model, **batch, mean="token")
    assert by_token.accuracy.item() == pytest.approx(torch.cat(right).mean().item())
    mean = torch.stack([hits.mean() for hits in right]).mean()
    assert by_example.accuracy.item() == pytest.approx(mean.item())
    for found in (by_example, by_token):
        assert found.tokens == sum(m for _, m in SHAPES)
        assert found.examples == len(SHAPES)


def test_examples_without_targets_add_nothing_and_are_counted():
    model, features = make_model(), make_features()
    silent = supervise([5, 6, 7], [], 64)
    alone = masked_loss(model, **PaddingCollator()(features)).loss
    with_silent = masked_loss(model, **PaddingCollator()([*features, silent]))
    torch.testing.assert_close(with_silent.loss, alone * 4 / 5)
    assert with_silent.examples == 5
    for mean in ("example", "token"):
        nothing = masked_loss(model, **PaddingCollator()([silent]), mean=mean)
        assert (nothing.loss, nothing.accuracy, nothing.tokens) == (0, 0, 0)


# --- masks ---------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["example", "token"])
def test_the_gradient_before_the_head_is_zero_outside_the_target(mean):
    model, batch = make_model(), PaddingCollator()(make_features())
    seen = []

    def keep(module, inputs):
        inputs[0].retain_grad()
        seen.append(inputs[0])

    with torch.enable_grad():
        handle = model.lm_head.register_forward_pre_hook(keep)
        masked_loss(model, **batch, mean=mean).loss.backward()
        handle.remove()
    predicts_target = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED) != IGNORED
    assert (seen[0].grad[~predicts_target] == 0).all()
    assert (seen[0].grad[predicts_target].abs().amax(-1) > 0).all()


def test_what_the_response_is_labelled_changes_nothing():
    """A critique's loss is the same whatever response tokens are set as labels."""
    model = make_model()
    question, response, critique = [5, 6], [7, 8, 9], [10, 11, 2]
    features = supervise(question + response, critique, 64)
    batch = PaddingCollator()([features])
    expected = masked_loss(model, **batch).loss
    is_target = batch["labels"] != IGNORED
    assert is_target.sum() == len(critique)
    everywhere = batch["input_ids"].clone()
    for other in (20, 30):
        everywhere[0, 2:5] = other
        labels = everywhere.where(is_target, IGNORED)
        assert masked_loss(model, **batch | {"labels": labels}).loss == expected
        # The wrong variant: loss on response and critique.
        wrong = everywhere.clone()
        wrong[0, :2] = IGNORED
        loss = masked_loss(model, **batch | {"labels": wrong}).loss
        assert (loss - expected).abs() > 0.01


def test_the_response_is_read_all_the_same():
    model = make_model()
    one, two = (supervise([5, 6, r, 8], [10, 2], 64) for r in (20, 30))
    losses = [masked_loss(model, **PaddingCollator()([f])).loss for f in (one, two)]
    assert (losses[0] - losses[1]).abs() > 0.01


# --- models --------------------------------------------------------------------


PEFT = {
    "lora": LoraConfig(
        r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False
    ),
    "soft prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("adapter", PEFT)
def test_adapted_models(adapter):
    model = get_peft_model(make_model(), PEFT[adapter]).eval()
    batch = PaddingCollator()(make_features())
    found = masked_loss(model, **batch, mean="token").loss
    expected = model(**batch).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, found, expected)


def test_a_cache_in_the_configuration_does_not_let_packed_examples_leak():
    model, features = make_model(), make_features()
    batch = PackingCollator()(features)
    del batch["use_cache"]
    expected = masked_loss(model, **batch).loss
    model.config.use_cache = True
    assert masked_loss(model, **batch).loss == expected


def test_a_real_model():
    if not models.available("smollm2-135m"):
        pytest.skip("smollm2-135m is neither in FTLIB_MODEL_DIR nor in a cache")
    cpu = torch.device("cpu")
    model, tokenizer = models.load_causal_lm(
        "smollm2-135m", dtype=torch.float32, device=cpu
    )
    records = [
        ("What is 3 * 8?", "3*8=25", "Not right: 3*8=24.\nVerdict: wrong"),
        ("What is 2 + 2?", "", "Four.\nVerdict: wrong"),
    ]
    examples = [criticise(*record) for record in records]
    features = tokenize_examples(examples, tokenizer, 256).features
    padded, packed = PaddingCollator()(features), PackingCollator()(features)
    with torch.no_grad():
        expected = model(**padded).loss
        for batch in (padded, packed):
            loss = masked_loss(model, **batch, mean="token").loss
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": torch.zeros(1, 3, dtype=torch.long)},
            r"labels have shape \(1, 3\)",
        ),
        ({"mean": "tokens"}, "mean is 'tokens'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    batch = PaddingCollator()(make_features())
    with pytest.raises(ValueError, match=message):
        masked_loss(make_model(), **batch | change)


# --- training ------------------------------------------------------------------


def trained(collate=COLLATORS["padded"], mean="example", accelerator=None, **changes):
    """Train from the fixed start; return the weights and the history."""
    model = make_model()
    history = train(
        Learner(model, mean),
        make_features(SHAPES * 5),
        training_loss,
        TrainingSettings(**vars(SETTINGS) | changes),
        collate=collate,
        accelerator=accelerator,
    )
    return {n: p.detach() for n, p in model.named_parameters()}, history


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch, fresh_accelerate):
    """Every test sets Accelerate up anew, as does transformers' Trainer."""
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")


def difference(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("rows", COLLATORS)
@pytest.mark.parametrize("chunks", [2, 4])
def test_accumulation_changes_nothing(rows, chunks):
    """Whereas a mean over the tokens of a chunk depends on the chunks."""
    whole, history = trained(COLLATORS[rows])
    parts, history_of_parts = trained(COLLATORS[rows], accumulate=chunks)
    assert difference(whole, parts) < 1e-4
    for column in ("loss", "accuracy", "target_tokens"):
        assert history.column(column) == pytest.approx(
            history_of_parts.column(column), rel=1e-4
        )
    whole, _ = trained(COLLATORS[rows], mean="token")
    parts, _ = trained(COLLATORS[rows], mean="token", accumulate=chunks)
    assert difference(whole, parts) > 1e-3


def test_packing_changes_nothing_in_training():
    padded, _ = trained()
    packed, _ = trained(COLLATORS["packed"])
    assert difference(padded, packed) < 1e-4


def test_training_in_mixed_precision():
    exact, history = trained()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    mixed, mixed_history = trained(accelerator=accelerator)
    assert all(weight.dtype is torch.float32 for weight in mixed.values())
    assert difference(exact, mixed) > 0
    assert mixed_history.column("loss") == pytest.approx(
        history.column("loss"), rel=0.05
    )


def test_transformers_trainer_takes_the_same_examples(tmp_path):
    """And its loss is the mean over tokens, with accumulation too."""
    features = make_features()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    for collate in COLLATORS.values():
        model = make_model()
        expected = masked_loss(model, **collate(features), mean="token").loss.item()
        result = Trainer(
            model, arguments, data_collator=collate, train_dataset=features
        ).train()
        assert result.training_loss == pytest.approx(expected, rel=1e-4)


def main(out: Path) -> None:
    """What each of two processes does."""
    for rows, collate in COLLATORS.items():
        found, history = trained(collate)
        save_file(found, out / f"{rows}-{os.environ['RANK']}.safetensors")
        assert len(history) == SETTINGS.steps


def test_two_processes_train_like_one(tmp_path):
    from two_processes import run_in_two_processes  # the script does not see it

    run_in_two_processes(__file__, tmp_path)
    expected, _ = trained()
    for rows in COLLATORS:
        for process in (0, 1):
            found = load_file(tmp_path / f"{rows}-{process}.safetensors")
            assert difference(expected, found) < 1e-4


if __name__ == "__main__":
    main(Path(sys.argv[1]))
