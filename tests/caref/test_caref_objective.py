"""CAREF's objective against its specification, and as trainers need it."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from ftlib.caref import objective
from ftlib.caref.baselines import ENTMAX15, SPARSEMAX, FocalLoss
from ftlib.caref.objective import (
    CAREF,
    Learner,
    caref_loss,
    loss_from_logits,
    token_loss_of_logits,
    trainer_loss,
    training_loss,
)
from ftlib.caref.selection import lora
from ftlib.ops import TokenLoss
from ftlib.ops.reference import vocabulary_head_reference
from ftlib.sequences import IGNORED
from ftlib.training import TrainingSettings, train

VOCABULARY = 64
TOKENS = 61  # of the tokenizer: three rows of the head are padding
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "init_std": 0.3,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "t5 v1.1": lambda: T5ForConditionalGeneration(
        T5Config(**T5 | {"tie_word_embeddings": False})
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**COMMON, intermediate_size=24, num_key_value_heads=2)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**COMMON, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    ),
}
SEQ2SEQ = ("t5", "t5 v1.1", "bart")
LOSSES = {
    "caref": CAREF,
    "sced (1.5, 0.5)": TokenLoss(sced=0.5, alpha=1.5, beta=0.5),
    "sced (1, 0)": TokenLoss(sced=0.5, alpha=1.0, beta=0.0),
    "everything": TokenLoss(0.7, 0.2, -0.1, 1e-3, 0.1, 0.1),
}
LENGTHS = [(5, 3), (7, 1), (2, 8), (3, 2)]  # tokens of input and of target
SETTINGS = TrainingSettings(steps=4, batch_size=4, learning_rate=0.01)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch, fresh_accelerate):
    """Every test sets Accelerate up anew, as does transformers' Trainer."""
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")


def make_model(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def make_features(kind, lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return torch.randint(3, TOKENS, (length,), generator=generator).tolist()

    features = []
    for n, m in lengths:
        given, target = draw(n), draw(m)
        if kind in SEQ2SEQ:
            features.append({"input_ids": given, "labels": target})
        else:
            labels = [IGNORED] * n + target
            features.append({"input_ids": given + target, "labels": labels})
    return features


def pad(features, extra=0):
    """Pad on the right, further than needed by ``extra``."""

    def rows(name, fill):
        length = max(len(f[name]) for f in features) + extra
        return torch.tensor(
            [f[name] + [fill] * (length - len(f[name])) for f in features]
        )

    ids = rows("input_ids", 0)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": rows("labels", IGNORED),
    }


def reference(model, batch, loss, mean):
    """The specification in float64, one example at a time, from the model's logits."""
    each, counts = [], []
    for i in range(len(batch["labels"])):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        logits, labels = model(**one).logits[0], one["labels"][0]
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:-1], labels[1:]
        kept = labels != IGNORED
        identity = torch.eye(logits.shape[-1], dtype=torch.float64)
        out = vocabulary_head_reference(
            logits[kept],
            identity,
            labels[kept],
            loss=loss,
            reduction="sum",
            statistics=("log_prob", "entropy", "collision_prob", "top1_hit"),
        )
        each.append(out)
        counts.append(kept.sum().item())
    weights = [
        1 / sum(counts) if mean == "token" else 1 / (len(each) * n) for n in counts
    ]
    total = sum(w * out.loss for w, out in zip(weights, each, strict=True))
    means = {
        "accuracy": [o.top1_hit.double() for o in each],
        "target_prob": [o.log_prob.exp() for o in each],
        "entropy": [o.entropy for o in each],
        "collision_prob": [o.collision_prob for o in each],
    }
    means = {
        name: sum(w * v.sum().item() for w, v in zip(weights, values, strict=True))
        for name, values in means.items()
    }
    return total, means


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same_gradients(model, found, expected):
    expected, found = gradients(model, expected), gradients(model, found)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-5)


# --- values --------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["example", "token"])
@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_averages_are_those_of_the_logits(kind, mean):
    model, batch = make_model(kind), pad(make_features(kind))
    found = caref_loss(model, **batch, mean=mean)
    expected, averages = reference(model, batch, CAREF, mean)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, average in averages.items():
        assert getattr(found, name).item() == pytest.approx(average, rel=1e-4), name
    assert found.tokens == sum(m for _, m in LENGTHS)
    assert found.examples == len(LENGTHS)
    assert_same_gradients(model, found.loss, expected)


@pytest.mark.parametrize("mean", ["example", "token"])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_models_in_float64_have_losses_in_float64(kind, mean):
    model, batch = make_model(kind).double(), pad(make_features(kind))
    expected, _ = reference(model, batch, CAREF, mean)
    found = caref_loss(model, **batch, mean=mean).loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_two_means_differ():
    model, batch = make_model("t5"), pad(make_features("t5"))
    one, two = (caref_loss(model, **batch, mean=m).loss for m in ("example", "token"))
    assert (one - two).abs() > 0.01


@pytest.mark.parametrize("kind", MODELS)
def test_without_regularisers_it_is_transformers_loss(kind):
    model, batch = make_model(kind), pad(make_features(kind))
    found = caref_loss(model, **batch, loss=TokenLoss(), mean="token").loss
    expected = model(**batch).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, found, expected)


@pytest.mark.parametrize("mean", ["example", "token"])
@pytest.mark.parametrize("kind", MODELS)
def test_padding_changes_nothing(kind, mean):
    model, features = make_model(kind), make_features(kind)
    tight = caref_loss(model, **pad(features), mean=mean)
    loose = caref_loss(model, **pad(features, extra=9), mean=mean)
    for name, value in tight._asdict().items():
        torch.testing.assert_close(getattr(loose, name), value, rtol=1e-5, atol=1e-6)


def test_the_vocabulary_is_the_width_of_the_logits():
    """64 with the padding rows, not the tokenizer's 61."""
    model, batch = make_model("t5"), pad(make_features("t5"))
    torch.nn.init.zeros_(model.shared.weight)  # tied to the head: uniform predictions
    for loss in (
        TokenLoss(0.0, kl_to_uniform=1.0),
        TokenLoss(0.0, sced=1.0, alpha=1.0, beta=0.0),
    ):
        out = caref_loss(model, **batch, loss=loss)
        assert out.loss.item() == pytest.approx(0, abs=1e-6)
        assert out.entropy.item() == pytest.approx(math.log(64), rel=1e-6)
    # Certain of one token, and none of it on the others: KL = log V.
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3] = 200.0
    for loss in (
        TokenLoss(0.0, kl_to_uniform=1.0),
        TokenLoss(0.0, sced=1.0, alpha=1.0, beta=0.0),
    ):
        value = loss_from_logits(logits, torch.tensor([3]), loss)
        assert value.item() == pytest.approx(math.log(64), rel=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_sced_is_zero_at_a_one_hot_distribution_and_so_is_its_slope(beta):
    logits = torch.full((1, VOCABULARY), -200.0)
    logits[0, 3] = 0
    logits.requires_grad_()
    loss = TokenLoss(0.0, sced=1.0, alpha=2.0, beta=beta)
    value = loss_from_logits(logits, torch.tensor([3]), loss)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-15)
    assert (logits.grad.abs() < 1e-15).all()


def test_examples_without_targets_add_nothing_and_are_counted():
    model, features = make_model("t5"), make_features("t5")
    alone = caref_loss(model, **pad(features)).loss
    silent = {"input_ids": [5, 6], "labels": []}
    out = caref_loss(model, **pad([*features, silent]))
    torch.testing.assert_close(out.loss, alone * 4 / 5)
    assert out.examples == 5


@pytest.mark.parametrize("loss", [CAREF, FocalLoss(0.5), SPARSEMAX, ENTMAX15], ids=str)
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_batch_without_targets_has_a_loss_and_a_gradient_of_zero(kind, loss):
    model, batch = make_model(kind), pad(make_features(kind))
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    for mean in ("example", "token"):
        out = caref_loss(model, **batch, loss=loss, mean=mean)
        assert (out.loss, out.tokens, out.accuracy, out.entropy) == (0, 0, 0, 0)
        assert all((g == 0).all() for g in gradients(model, out.loss).values())
    logits = torch.randn(*batch["labels"].shape, VOCABULARY, requires_grad=True)
    value = loss_from_logits(logits, batch["labels"], loss)
    value.backward()
    assert value == 0
    assert (logits.grad == 0).all()


def test_given_decoder_inputs_are_taken():
    model, batch = make_model("t5"), pad(make_features("t5"))
    ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    expected = caref_loss(model, **batch).loss
    assert caref_loss(model, **batch, decoder_input_ids=ids).loss == expected
    other = caref_loss(model, **batch, decoder_input_ids=ids.flip(0)).loss
    assert (other - expected).abs() > 0.01


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"labels": torch.zeros(1, 3, dtype=torch.long)}, "input_ids"),
        (
            "t5",
            {"decoder_input_ids": torch.zeros(1, 3, dtype=torch.long)},
            r"decoder_input_ids \(1, 3\)",
        ),
        ("t5", {"mean": "tokens"}, "mean is 'tokens'"),
    ],
)
def test_what_does_not_fit_is_refused(kind, change, message):
    batch = pad(make_features(kind))
    with pytest.raises(ValueError, match=message):
        caref_loss(make_model(kind), **batch | change)
    with pytest.raises(ValueError, match=r"logits have shape \(2, 64\)"):
        loss_from_logits(torch.zeros(2, 64), torch.zeros(3, dtype=torch.long))


def test_an_encoder_decoder_that_does_not_shift_labels():
    config = BlenderbotConfig(**BART)
    torch.manual_seed(0)
    model = BlenderbotForConditionalGeneration(config).eval()
    batch = pad(make_features("t5"))
    with pytest.raises(ValueError, match=r"Blenderbot.*pass decoder_input_ids"):
        caref_loss(model, **batch)
    ids = make_model("bart").prepare_decoder_input_ids_from_labels(batch["labels"])
    found = caref_loss(
        model, **batch, decoder_input_ids=ids, loss=TokenLoss(), mean="token"
    )
    expected = model(**batch, decoder_input_ids=ids).loss
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)


# --- from logits -----------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_loss_from_logits_is_the_specification(loss, monkeypatch):
    monkeypatch.setattr(objective, "CHUNK_LOGITS", 2 * VOCABULARY)  # two rows a chunk
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(3, 5, VOCABULARY, generator=generator)
    logits.requires_grad_()
    labels = torch.randint(VOCABULARY, (3, 5), generator=generator)
    labels[0, 2:], labels[2] = IGNORED, IGNORED
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    expected = vocabulary_head_reference(logits, identity, labels, loss=loss).loss
    found = loss_from_logits(logits, labels, loss)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    (want,) = torch.autograd.grad(expected, logits)
    (got,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert (got[labels == IGNORED] == 0).all()
    by_seven = loss_from_logits(logits, labels, loss, tokens=7)
    torch.testing.assert_close(by_seven, found * 7 / 7)  # there are seven


def test_loss_from_logits_is_that_of_the_head():
    model, batch = make_model("t5"), pad(make_features("t5"))
    for loss in LOSSES.values():
        found = loss_from_logits(model(**batch).logits, batch["labels"], loss)
        expected = caref_loss(model, **batch, loss=loss, mean="token").loss
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [*LOSSES.values(), FocalLoss(), SPARSEMAX], ids=str)
def test_float16_logits_of_any_size_do_not_overflow(loss):
    """Their exponentials, sums and squares would."""
    logits = torch.tensor([[6e4, -6e4, 0.0, 6e4], [-6e4, 6e4, -6e4, -6e4]])
    labels = torch.tensor([0, 1])
    half = logits.half().requires_grad_()
    value = loss_from_logits(half, labels, loss)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(half.grad).all()
    exact = half.detach().double().requires_grad_()
    expected = loss_from_logits(exact, labels, loss)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(half.grad, exact.grad.half(), rtol=2e-3, atol=1e-4)


def test_logits_of_ignored_positions_may_be_anything():
    logits = torch.zeros(2, 4, requires_grad=True)
    wild = torch.tensor([[0.0] * 4, [math.inf, math.nan, -math.inf, 0.0]])
    value = loss_from_logits(logits + wild, torch.tensor([1, IGNORED]))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


def test_chunks_keep_only_one_in_memory():
    """Autograd keeps the logits, and none of the tensors made of them."""
    saved = []
    logits = torch.randn(8, VOCABULARY, requires_grad=True)
    labels = torch.arange(8)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t) or t, lambda t: t
    ):
        loss_from_logits(logits, labels)
    own = logits.untyped_storage().data_ptr()
    large = [t for t in saved if t.numel() >= logits.numel()]
    assert all(t.untyped_storage().data_ptr() == own for t in large)
    # What the check would find without chunks.
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t) or t, lambda t: t
    ):
        token_loss_of_logits(CAREF, logits, labels)
    large = [t for t in saved if t.numel() >= logits.numel()]
    assert any(t.untyped_storage().data_ptr() != own for t in large)


# --- adapters ------------------------------------------------------------------


def soft_prompt(task):
    return PromptTuningConfig(task_type=task, num_virtual_tokens=3)


ADAPTERS = {
    "t5 lora": lora(4),
    "t5 soft": soft_prompt("SEQ_2_SEQ_LM"),
    "llama lora": lora(4),
    "llama soft": soft_prompt("CAUSAL_LM"),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapted_models(adapter):
    kind = adapter.split()[0]
    model = get_peft_model(make_model(kind), ADAPTERS[adapter]).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:  # the adapters, some of which start at zero
            torch.nn.init.normal_(parameter, std=0.3)
    batch = pad(make_features(kind))
    found = caref_loss(model, **batch, loss=TokenLoss(), mean="token").loss
    if kind == "t5":
        ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, decoder_input_ids=ids).logits
        expected = loss_from_logits(logits, batch["labels"], TokenLoss())
    else:
        outputs = model(**batch)
        expected = outputs.loss
        by_trainer = trainer_loss(model, TokenLoss())(outputs, batch["labels"])
        torch.testing.assert_close(by_trainer, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, found, expected)


# --- training ------------------------------------------------------------------


def trained(loss=CAREF, kind="t5", mean="example", accelerator=None, **changes):
    """Train from the fixed start; return the weights and the history."""
    model = make_model(kind)
    history = train(
        Learner(model, loss, mean),
        make_features(kind, LENGTHS * 4),
        training_loss,
        TrainingSettings(**vars(SETTINGS) | changes),
        collate=pad,
        accelerator=accelerator,
    )
    return {n: p.detach() for n, p in model.named_parameters()}, history


def difference(one, two):
    return max((one[name] - two[name]).abs().max().item() for name in one)


def test_accumulation_changes_nothing():
    whole, history = trained()
    parts, history_of_parts = trained(accumulate=2)
    assert difference(whole, parts) < 1e-4
    for column in ("loss", "accuracy", "target_prob", "entropy", "target_tokens"):
        assert history.column(column) == pytest.approx(
            history_of_parts.column(column), rel=1e-3
        )
    by_token, _ = trained(mean="token")
    assert difference(whole, by_token) > 1e-3


@pytest.mark.parametrize("loss", [CAREF, ENTMAX15], ids=str)
def test_training_in_mixed_precision(loss):
    exact, history = trained(loss)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    mixed, mixed_history = trained(loss, accelerator=accelerator)
    assert all(weight.dtype is torch.float32 for weight in mixed.values())
    assert difference(exact, mixed) > 0
    assert mixed_history.column("loss") == pytest.approx(
        history.column("loss"), rel=0.1
    )


@pytest.mark.parametrize("loss", [CAREF, FocalLoss(), ENTMAX15], ids=str)
def test_training_lowers_every_loss(loss):
    _, history = trained(loss, steps=12)
    losses = history.column("loss")
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("loss", [CAREF, SPARSEMAX], ids=str)
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_transformers_trainer_takes_the_same_loss(kind, loss, tmp_path):
    """A mean over tokens, with accumulation too."""
    model, features = make_model(kind), make_features(kind)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0})), pad_token="<pad>"
    )
    expected = caref_loss(model, **pad(features), loss=loss, mean="token").loss.item()
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
    result = Trainer(
        model,
        arguments,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        train_dataset=features,
        compute_loss_func=trainer_loss(model, loss),
    ).train()
    assert result.training_loss == pytest.approx(expected, rel=1e-4)
