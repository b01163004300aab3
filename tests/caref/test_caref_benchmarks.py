"""The real tasks' experiment, on toys of the same kinds."""

import dataclasses
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from tiny_models import byte_level_bpe, tiny_bert, tiny_llama
from transformers import (
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from ftlib import data, results
from ftlib.caref import benchmarks, tasks
from ftlib.caref.benchmarks import (
    ARMS,
    BENCHMARKS,
    LEARNING_RATES,
    LOSSES,
    MODELS,
    PROTOCOLS,
    TRIED_LEARNING_RATES,
    Condition,
    Protocol,
    Student,
    Written,
)
from ftlib.caref.objective import CAREF
from ftlib.caref.tasks import TASKS, Item, few_shot
from ftlib.metrics.bertscore import Encoder
from ftlib.ops import TokenLoss
from ftlib.results import Metric, NotRecordedError

DECODER, T5, MARIAN = "smollm2-135m", "flan-t5-small", "opus-mt-en-fr"
KINDS = (DECODER, T5, MARIAN)
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOY = Protocol(
    "48-shot",
    shots=12,
    steps=3,
    batch_size=4,
    evaluation=9,
    validation=6,
    answer_tokens=7,
    together=4,
    encoder_layer=2,
)


def inference(n, part):
    return {
        "premise": f"a man has {n} cats .",
        "hypothesis": f"he has {part} {n}",
        "label": TASKS["esnli"].labels[n % 3],
        "explanations": [f"{n} is a number", "cats are cats", "a man is he"],
    }


def pair(n):
    return {
        "sense": f"he ate {n} eggs",
        "nonsense": f"he ate {n} cars",
        "reasons": ["x"],
    }


def question(n):
    return {
        "question": f"where are {n} cats?",
        "choices": ["bed", "the bed", f"sea {n}"],
        "answer": "the bed",
        "explanation": "cats sleep",
    }


@pytest.fixture(autouse=True)
def _toy_data(monkeypatch):
    monkeypatch.setattr(
        tasks, "esnli", lambda part: [inference(n, part) for n in range(60)]
    )
    monkeypatch.setattr(tasks, "comve", lambda part: [pair(n) for n in range(60)])
    monkeypatch.setattr(tasks, "cose", lambda part: [question(n) for n in range(40)])


def tokenizer(*, is_encoder_decoder):
    corpus = [" because".join([*labels, ""]) for labels, _ in TASKS.values()]
    special = ["<pad>", "</s>", "<|im_start|>"]
    around = "$A </s>" if is_encoder_decoder else None
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(corpus, special, around=around),
        pad_token="<pad>",
        eos_token="</s>",
        chat_template=None if is_encoder_decoder else CHATML,
    )


def toy_model(name, vocabulary):
    special = {"pad_token_id": 0, "eos_token_id": 1}
    if name == DECODER:
        return tiny_llama(vocabulary, seed=1, intermediate_size=48, **special)
    torch.manual_seed(1)
    sizes = {"vocab_size": vocabulary, **special}
    if name == T5:
        config = T5Config(
            **sizes,
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
        return T5ForConditionalGeneration(config)
    config = MarianConfig(
        **sizes,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=160,
        decoder_start_token_id=0,
        init_std=0.2,
        dropout=0.0,
    )
    model = MarianMTModel(config)
    model.final_logits_bias.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """Models of a few thousand random weights, under the short names of real ones."""
    folder = tmp_path_factory.mktemp("models")
    for name in KINDS:
        own = tokenizer(is_encoder_decoder=name != DECODER)
        own.save_pretrained(folder / name)
        toy_model(name, len(own)).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def encoder():
    own = tokenizer(is_encoder_decoder=True)
    own.cls_token = own.sep_token = "</s>"
    torch.manual_seed(0)
    model = tiny_bert(
        len(own),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=1.0,
    )
    return Encoder(model, own, 2, "toy")


@pytest.fixture(autouse=True)
def _toy_models(model_folder, encoder, monkeypatch):
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(model_folder))
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(benchmarks, "load_encoder", lambda name, layer: encoder)
    benchmarks._pretrained.cache_clear()
    benchmarks._encoder.cache_clear()
    yield
    benchmarks._pretrained.cache_clear()
    benchmarks._encoder.cache_clear()


def condition(name, model=DECODER, task="esnli", protocol=TOY):
    return Condition(name, ARMS[name], task, model, protocol)


def untrained(model, protocol=TOY):
    return benchmarks.prepare(condition("base", model, protocol=protocol), 0)


def weights(student):
    return {n: w.detach().clone() for n, w in student.model.state_dict().items()}


# --- the plan -------------------------------------------------------------------------


def test_the_plan():
    arms = benchmarks.benchmark_arms()
    assert len({str(arm) for arm in arms}) == len(arms)
    compared = [arm for arm in arms if "learning-rate" not in arm.experiment]
    grid = len(PROTOCOLS) * len(MODELS) * len(BENCHMARKS)
    assert len(compared) == grid * len(ARMS) == grid * 11
    assert len(arms) - len(compared) == grid * 10 * 3
    experiments = {arm.experiment for arm in arms}
    assert "48-shot esnli smollm2-135m" in experiments
    assert "4000-shot-learning-rate cose flan-t5-base" in experiments
    assert len(experiments) == 2 * grid
    for arm in arms:
        task, model = arm.settings["task"], arm.settings["model"]
        assert arm.experiment.endswith(f" {task} {model}")
        assert {path.split("/")[0] for path in arm.data} <= {task, "minilm-l6"}
        assert (
            len([p for p in arm.data if p.startswith(task)])
            == ({"esnli": 12, "comve": 2, "cose": 4}[task])
        )
        encoders = ["minilm-l6"] if arm in compared else []
        assert arm.requires == [model, *encoders]
        assert ("minilm-l6/model.safetensors" in arm.data) == bool(encoders)


def test_arms_differ_only_in_what_they_name():
    named = {"arm", "weights", "loss", "task", "model", "learning_rate"}
    protocols = {protocol.name: dataclasses.asdict(protocol) for protocol in PROTOCOLS}
    for arm in benchmarks.benchmark_arms():
        shared = {k: v for k, v in arm.settings.items() if k not in named}
        assert shared == protocols[arm.settings["name"]]
        recipe = ARMS[arm.settings["arm"]]
        if recipe is None:
            assert arm.settings["weights"] is arm.settings["loss"] is None
            assert arm.settings["learning_rate"] == 0
        else:
            assert arm.settings["weights"] == recipe.weights
            assert TokenLoss(**arm.settings["loss"]) == recipe.loss
            tried = TRIED_LEARNING_RATES[recipe.weights]
            assert arm.settings["learning_rate"] in tried


def test_the_losses_are_caref_with_and_without_its_terms():
    assert LOSSES["CE"] == TokenLoss()
    assert LOSSES["CAREF"] == CAREF
    assert LOSSES["SCED"] == TokenLoss(sced=0.1, alpha=2, beta=1)
    assert LOSSES["KL"] == TokenLoss(kl_to_uniform=0.1)


def test_learning_rates_are_the_best_of_the_records(best_rates):
    """Over all tasks of a model. Without records there is nothing they could follow."""
    try:
        records = results.load("caref", "gpu")
    except NotRecordedError:
        pytest.skip("caref is not recorded at scale gpu yet")
    tuning = defaultdict(list)
    for record in records:
        if "-learning-rate " in record.experiment:
            name, model = record.settings["name"], record.settings["model"]
            tuning[f"{name}/{model}"].append(record)
    for where, found in tuning.items():
        for arm, rate in best_rates(found, "arm").items():
            assert LEARNING_RATES[f"{where}/{arm}"] == rate, arm


# --- one run --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "task"),
    [
        ("base", DECODER, "esnli"),
        ("SCED", MARIAN, "comve"),
        ("AQ CAREF", T5, "cose"),
        ("LoRA r=4", DECODER, "cose"),
        ("LoRA r=4", MARIAN, "comve"),
        ("LoRA r=128", T5, "esnli"),
    ],
)
def test_a_run_of_every_kind(name, model, task):
    items = 8 if task == "comve" else 9
    metrics = benchmarks.run(condition(name, model, task), 1e-3, 0)
    share = metrics.pop("trained share")
    assert 0 <= share <= 1
    assert (share == 0) == (name == "base")
    assert list(metrics) == [
        "accuracy",
        "nBERT",
        "nBERT ungated",
        "valid",
        "ended",
        "label accuracy",
        "label mass",
        "confidence",
        "ECE",
        "ECE if calibrated",
        "ECE classwise",
        "Brier",
        "NLL",
    ]
    assert {metric.n for metric in metrics.values()} == {items}
    assert all(math.isfinite(metric.value) for metric in metrics.values())


def test_a_seed_repeats_itself_and_is_not_another():
    one = condition("LoRA r=4", T5)
    first, again, other = (benchmarks.run(one, 1e-2, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["NLL"] != other["NLL"]


def test_learning_rates_are_tuned_on_seeds_of_their_own(monkeypatch):
    """And without an item of the evaluation part, which here is empty."""
    seen = []

    def fine_tune(one, student, examples, rate, seed):
        seen.append((one.name, rate, seed, len(examples)))
        return student

    def answer(student, items, protocol):
        assert len(items) == 6
        return [Written(f"{item.label.upper()} because", ended=True) for item in items]

    rows = {"dev": [inference(n, "dev") for n in range(30)], "test": []}
    monkeypatch.setattr(tasks, "esnli", rows.__getitem__)
    monkeypatch.setattr(benchmarks, "fine_tune", fine_tune)
    monkeypatch.setattr(benchmarks, "answer", answer)
    [arm] = [
        arm
        for arm in benchmarks.benchmark_arms([TOY])
        if str(arm) == f"48-shot-learning-rate esnli {T5}/AQ CE 0.001"
    ]
    assert arm.run(1) == {"validation": Metric(1.0, 6)}
    assert seen == [("AQ CE", 1e-3, 1001, 12)]


@pytest.mark.parametrize("task", BENCHMARKS)
def test_examples_and_validation_are_balanced_and_share_nothing(task):
    examples, held_out = benchmarks.split(task, 3, TOY)
    assert (len(examples), len(held_out)) == (12, 6)
    prompts = {item.prompt for item in TASKS[task].items("train")}
    asked = [item.prompt for item in (*examples, *held_out)]
    assert len(set(asked)) == 18
    assert set(asked) <= prompts
    if classes := TASKS[task].labels:
        for items in (examples, held_out):
            counts = Counter(item.label for item in items)
            assert counts == dict.fromkeys(classes, len(items) // len(classes))


def test_only_the_chosen_weights_change():
    for name, model in [("AQ CE", DECODER), ("AQ CAREF", MARIAN), ("CE", T5)]:
        one = condition(name, model)
        before = weights(untrained(model))
        student = benchmarks.prepare(one, 0)
        examples = few_shot("esnli", 0, 12, 0).train
        after = weights(benchmarks.fine_tune(one, student, examples, 1e-2, 0))
        changed = {n for n, w in after.items() if not torch.equal(w, before[n])}
        if name == "CE":
            assert changed == set(before)
        else:
            decoder = "" if model == DECODER else "model.decoder."
            queries = {n for n in before if n.startswith(decoder) and ".q_proj." in n}
            assert changed == queries
        # The next run starts from the same weights.
        again = weights(untrained(model))
        assert all(torch.equal(w, again[n]) for n, w in before.items())


def test_adapters_begin_as_the_seed_says_and_are_merged_at_the_end():
    one = condition("LoRA r=4")
    first, again, other = (weights(benchmarks.prepare(one, s)) for s in (0, 0, 1))
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    student = benchmarks.prepare(one, 0)
    examples = few_shot("esnli", 0, 12, 0).train
    before, after = (
        weights(untrained(DECODER)),
        weights(benchmarks.fine_tune(one, student, examples, 1e-2, 0)),
    )
    assert set(after) == set(before)
    changed = {n for n, w in after.items() if not torch.equal(w, before[n])}
    assert changed == {n for n in before if "_proj." in n}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("model", KINDS)
def test_passes_are_in_bf16_and_weights_are_not(model, monkeypatch):
    seen = []
    forward = benchmarks._forward

    def spy(*given):
        outputs = forward(*given)
        seen.append(outputs.logits.dtype)
        return outputs

    monkeypatch.setattr(benchmarks, "_forward", spy)
    one = condition("CAREF", model)
    student = benchmarks.prepare(one, 0)
    examples = few_shot("esnli", 0, 12, 0).train
    student = benchmarks.fine_tune(one, student, examples, 1e-3, 0)
    assert torch.bfloat16 in seen or model == MARIAN  # whose bias is float32
    assert {w.dtype for w in student.model.parameters()} == {torch.float32}
    assert all(w.isfinite().all() for w in student.model.parameters())


# --- the loss -------------------------------------------------------------------------


@pytest.mark.parametrize("model", KINDS)
def test_cross_entropy_is_that_of_the_model_itself(model):
    """Its own loss knows where labels go, and its bias."""
    student = untrained(model)
    batch = a_batch(student)
    own = student.model(**batch).loss
    ours = benchmarks.mean_loss(student.model, **batch, loss=TokenLoss())
    torch.testing.assert_close(ours, own)


@pytest.mark.parametrize("model", KINDS)
def test_caref_is_its_formula_on_the_models_logits(model):
    student = untrained(model)
    batch = a_batch(student)
    logits, labels = student.model(**batch).logits.double(), batch["labels"]
    if not student.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    p = logits[labels >= 0].softmax(-1)
    distance = p * (p * p.shape[1]).log()
    own = student.model(**batch).loss.double()
    expected = own + 0.1 * (distance**2 * (1 - p)).sum(1).mean()
    expected += 0.1 * distance.sum(1).mean()
    ours = benchmarks.mean_loss(student.model, **batch, loss=CAREF)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def a_batch(student):
    pairs = [("a man", "neutral because he is"), ("a man has cats", "choice1 because")]
    rows = benchmarks.features(student, pairs)
    return benchmarks.DataCollatorForSeq2Seq(student.tokenizer)(rows).data


# --- from text to tokens --------------------------------------------------------------


def test_a_decoder_learns_what_it_is_to_write_in_its_chat_format():
    student = untrained(DECODER)
    [row] = benchmarks.features(student, [("Why?", "neutral because so")])
    decode = student.tokenizer.decode
    asked = "<|im_start|>user\nWhy?</s>\n<|im_start|>assistant\n"
    assert decode(row["input_ids"]) == f"{asked}neutral because so</s>"
    learned = [label for label in row["labels"] if label >= 0]
    assert decode(learned) == "neutral because so</s>"
    assert row["labels"][-len(learned) :] == row["input_ids"][-len(learned) :]
    [prompt] = benchmarks.encode_prompts(student, ["Why?"])
    assert row["input_ids"] == prompt + learned


@pytest.mark.parametrize("model", [T5, MARIAN])
def test_an_encoder_reads_the_prompt_and_the_decoder_learns_the_rest(model):
    student = untrained(model)
    [row] = benchmarks.features(student, [("Why?", "neutral because so")])
    decode = student.tokenizer.decode
    assert decode(row["input_ids"]) == "Why?</s>"
    assert decode(row["labels"]) == "neutral because so</s>"
    assert row["input_ids"] == benchmarks.encode_prompts(student, ["Why?"])[0]


# --- what a model writes --------------------------------------------------------------


ASKED = [
    Item("a man", "neutral", ("x",)),
    Item("why? " * 9, "neutral", ("x",)),
    Item("he has cats", "neutral", ("x",)),
    Item("sea", "neutral", ("x",)),
]


@pytest.mark.parametrize("model", KINDS)
def test_answers_are_those_written_one_by_one(model):
    """Greedily, token by token, each prompt alone; whatever the batches."""
    student = untrained(model)
    expected = [by_hand(student, item.prompt, 7) for item in ASKED]
    assert len(set(expected)) > 1
    for together in (1, 3, 9):
        protocol = dataclasses.replace(TOY, together=together)
        assert benchmarks.answer(student, ASKED, protocol) == expected


@torch.no_grad()
def by_hand(student, prompt, longest):
    model, own = student
    [ids] = benchmarks.encode_prompts(student, [prompt])
    written = []
    while len(written) < longest and 1 not in written:
        if student.is_encoder_decoder:
            start = torch.tensor([[0, *written]])
            out = model(input_ids=torch.tensor([ids]), decoder_input_ids=start)
            out.logits[:, :, 0] = -math.inf  # padding is no word
        else:
            out = model(input_ids=torch.tensor([ids + written]))
        written.append(int(out.logits[0, -1].argmax()))
    return Written(own.decode(written, skip_special_tokens=True), 1 in written)


@pytest.mark.parametrize("model", [T5, MARIAN])
def test_padding_is_never_written(model, monkeypatch):
    """Not even where it has the largest logit."""
    student = untrained(model)
    forward = type(student.model).forward

    def padding(*args, **inputs):
        out = forward(*args, **inputs)
        out.logits[:, :, 0] += 50
        return out

    plain = benchmarks.answer(student, ASKED, TOY)
    monkeypatch.setattr(type(student.model), "forward", padding)
    assert benchmarks.answer(student, ASKED, TOY) == plain


def test_a_models_own_generation_settings_are_not_taken():
    student = untrained(T5)
    plain = benchmarks.answer(student, ASKED, TOY)
    own = benchmarks._pretrained(T5).model.generation_config
    own.repetition_penalty, own.num_beams = 9.0, 3
    assert benchmarks.answer(untrained(T5), ASKED, TOY) == plain


@pytest.mark.parametrize("model", KINDS)
def test_what_was_learned_is_written(model):
    protocol = dataclasses.replace(TOY, steps=120, answer_tokens=40)
    items = [
        Item("a", "neutral", ("it is a",)),
        Item("b c", "choice1", ("of b and c",)),
        Item("d", "entailment", ("d it is",)),
        Item("e", "neutral", ("e",)),
    ]
    one = condition("CE", model, protocol=protocol)
    student = benchmarks.prepare(one, 0)
    before = benchmarks.answer(student, items, protocol)
    assert not any(text.startswith("neutral because") for text, _ in before)
    student = benchmarks.fine_tune(one, student, items, 6e-3, 0)
    assert benchmarks.answer(student, items, protocol) == [
        Written(item.target, ended=True) for item in items
    ]
    log_probs = benchmarks.label_log_probs(student, "esnli", items[:1], protocol)
    assert np.exp(log_probs[0, 1]) > 0.5


def test_scores_of_answers_written_by_hand(encoder):
    items = [Item("?", "neutral", ("cats are cats", "a man"))] * 5
    written = [
        Written("neutral because cats are cats", ended=True),
        Written("Neutral because a man", ended=True),
        Written("entailment because cats are cats", ended=False),
        Written("neutral", ended=True),
        Written("because a man", ended=True),
    ]
    found = benchmarks.written_metrics(written, items, encoder)
    assert {metric.n for metric in found.values()} == {5}
    values = {name: metric.value for name, metric in found.items()}
    unknown = benchmarks.nbert(
        ["x"], ["x"], ["UNK"], [items[0].explanations], encoder
    ).scores[0]
    assert unknown < 99
    assert values == {
        "accuracy": 3 / 5,
        "nBERT": pytest.approx((100 + 100 + unknown) / 5),
        "nBERT ungated": pytest.approx((400 + unknown) / 5),
        "valid": 3 / 5,
        "ended": 4 / 5,
    }


# --- probabilities of labels ----------------------------------------------------------


@pytest.mark.parametrize("model", KINDS)
@pytest.mark.parametrize("task", BENCHMARKS)
def test_log_probabilities_of_labels_are_sums_token_by_token(model, task):
    items = few_shot(task, 0, 2, 5).evaluation
    student = untrained(model)
    found = benchmarks.label_log_probs(student, task, items, TOY)
    expected = [
        [chain_rule(student, item.prompt, label) for label in labels]
        for item in items
        for labels in [benchmarks.labels_of(task, item)]
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def chain_rule(student, prompt, label):
    model, own = student
    [ids] = benchmarks.encode_prompts(student, [prompt])
    total, written = 0.0, []
    for token in own(f"{label} because", add_special_tokens=False).input_ids:
        if student.is_encoder_decoder:
            start = torch.tensor([[0, *written]])
            out = model(input_ids=torch.tensor([ids]), decoder_input_ids=start)
        else:
            out = model(input_ids=torch.tensor([ids + written]))
        total += out.logits[0, -1].double().log_softmax(-1)[token].item()
        written.append(token)
    return total


def test_labels_of_items():
    assert benchmarks.labels_of("comve", ASKED[0]) == ("choice1", "choice2")
    asked = few_shot("cose", 0, 1, 1).evaluation[0]
    n = asked.prompt.split()[3]
    assert benchmarks.labels_of("cose", asked) == ("bed", "the bed", f"sea {n}")


def test_labels_of_real_questions(monkeypatch):
    monkeypatch.setattr(tasks, "cose", data.cose)
    try:
        items = TASKS["cose"].items("evaluation")
    except data.DataUnavailable as error:
        pytest.skip(str(error))
    for item in items:
        labels = benchmarks.labels_of("cose", item)
        assert len(labels) == len(set(labels)) == 3
        assert item.label in labels


def test_scores_of_probabilities_written_by_hand():
    p = np.array([[0.5, 0.2], [0.1, 0.3], [0.2, 0.2]])
    right = np.array([0, 0, 1])
    values = {
        name: metric.value
        for name, metric in benchmarks.label_metrics(np.log(p), right).items()
    }
    q = p / p.sum(1, keepdims=True)
    assert values["label mass"] == pytest.approx(1.5 / 3)
    assert values["label accuracy"] == pytest.approx(1 / 3)
    assert values["confidence"] == pytest.approx((5 / 7 + 3 / 4 + 1 / 2) / 3)
    assert values["NLL"] == pytest.approx(-np.log([q[0, 0], q[1, 0], q[2, 1]]).mean())
    errors = 2 * np.array([1 - q[0, 0], 1 - q[1, 0], 1 - q[2, 1]]) ** 2
    assert values["Brier"] == pytest.approx(errors.mean())
    # Each is alone in its bin.
    gaps = [1 - 5 / 7, 3 / 4, 1 / 2]
    assert values["ECE"] == pytest.approx(np.mean(gaps))
    assert 0 < values["ECE if calibrated"] < 1
    classes = [np.abs((right == k) - q[:, k]) for k in range(2)]
    assert values["ECE classwise"] == pytest.approx(np.mean(classes))


# --- a taste --------------------------------------------------------------------------


def test_a_taste_shows_what_is_read_learned_and_written(monkeypatch):
    asked = []

    def answer(student, items, protocol):
        asked.append(items[0])
        return [Written(f"text {len(asked)}", ended=True)]

    monkeypatch.setattr(benchmarks, "answer", answer)
    monkeypatch.setattr(benchmarks, "FEW", dataclasses.replace(TOY, shots=6))
    seen = benchmarks.taste("comve", steps=2)
    assert asked[0] is asked[1]
    assert seen == (asked[0].prompt, asked[0].target, "text 1", "text 2")


def test_real_text_goes_in_and_comes_out(monkeypatch, model_folder):
    """Of the real SmolLM2, without training."""
    monkeypatch.delenv("FTLIB_MODEL_DIR")
    if not benchmarks.models.available(DECODER):
        pytest.skip(f"{DECODER} is neither in FTLIB_MODEL_DIR nor in a cache")
    student = Student(*MODELS[DECODER](DECODER))
    [row] = benchmarks.features(
        student, [("Is it so?", "neutral because a cat sleeps")]
    )
    learned = [label for label in row["labels"] if label >= 0]
    assert student.tokenizer.decode(learned) == "neutral because a cat sleeps<|im_end|>"
    # What labels are scored with begins what is learned.
    [scored] = benchmarks.features(student, [("?", "neutral because")], ended=False)
    tokens = [label for label in scored["labels"] if label >= 0]
    assert learned[: len(tokens)] == tokens
