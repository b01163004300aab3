"""The plan runs, its arms differ in what they name, and nothing leaks into a test."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_bert, word_piece

from ftlib import results
from ftlib.caref import evaluation, experiment, tasks
from ftlib.caref.baselines import SPARSEMAX
from ftlib.caref.evaluation import LABEL_TOKENS, VOCABULARY, Beliefs
from ftlib.caref.evidence import (
    HEDGES,
    LABELS,
    WORDING_ENTROPY,
    WORDINGS,
    posterior,
    sample,
)
from ftlib.caref.objective import training_loss
from ftlib.caref.settings import (
    BASELINES,
    EVIDENCE,
    GRID,
    KNOB,
    LEARNING_RATES,
    TRIED_ADALORA,
    BaseSettings,
)
from ftlib.metrics.bertscore import Encoder
from ftlib.outcomes import outcomes
from ftlib.results import PACKED_PREFIX, NotRecordedError
from ftlib.splits import split_of
from ftlib.training import TrainingSettings

TOY_BASE = BaseSettings(
    width=16,
    layers=1,
    heads=2,
    feed_forward=16,
    logits=128,
    examples=64,
    training=TrainingSettings(
        steps=4, batch_size=16, learning_rate=1e-3, checkpoint_every=2
    ),
)
TOY = dataclasses.replace(
    EVIDENCE,
    base=TOY_BASE,
    examples=40,
    steps=10,
    batch_size=8,
    validation=20,
    test=40,
    edited=6,
    compared=4,
)
NAMED = {"arm", "recipe", "learning_rate", "method", "judge"}
FEW = dataclasses.replace(TOY, examples=5, steps=6, batch_size=2)
SHORT = dataclasses.replace(
    TOY,
    base=dataclasses.replace(
        TOY_BASE, training=dataclasses.replace(TOY_BASE.training, steps=2)
    ),
)
WORLDS = {"evidence": TOY, "few-shot": FEW, "short base": SHORT, "knob": TOY}
EVERY = experiment.conditions(WORLDS)
CONDITIONS = {c.name: c for c in EVERY if c.experiment in ("evidence", "knob")}
SEARCHES = {"evidence": "learning-rate", "few-shot": "few-shot learning-rate"}


pytestmark = pytest.mark.usefixtures("base_cache")


@pytest.fixture
def _judge(monkeypatch, tmp_path):
    """A BERT with random weights in the place of the real one."""
    tokenizer = word_piece(tmp_path, VOCABULARY.words, model_max_length=32)
    model = tiny_bert(
        5 + len(VOCABULARY.words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    encoder = Encoder(model, tokenizer, 1, "tiny")
    monkeypatch.setattr(evaluation, "judge", lambda: encoder)


def base_weights():
    return experiment.base_model(TOY_BASE, 0).state_dict()


# -- the plan --------------------------------------------------------------------------


def test_arms_are_recorded_under_distinct_names():
    names = [str(arm) for arm in experiment.plan("cpu")]
    assert len(names) == len(set(names))
    for table in ("evidence", "few-shot"):
        assert {f"{table}/{name}" for name in (*GRID, *BASELINES)} < set(names)
    assert {f"knob/{name}" for name in KNOB} < set(names)


@pytest.mark.parametrize(("table", "search"), SEARCHES.items())
def test_every_trained_arm_of_a_table_is_tuned(table, search):
    arms = [a for a in experiment.plan("cpu") if a.experiment == search]
    tuned = {a.settings["method"] for a in arms}
    assert tuned == {*GRID, *BASELINES} - {"base", "temperature"}
    assert tuned == {*LEARNING_RATES[table]}


def test_the_search_with_many_examples_chooses_adaloras_ranks_and_schedule_too():
    candidates = experiment.candidates(CONDITIONS["AdaLoRA"])
    assert {c.recipe.weights for c in candidates} == set(TRIED_ADALORA)
    few = {c.name: c for c in EVERY if c.experiment == "few-shot"}["AdaLoRA"]
    chosen = {c.recipe.weights for c in experiment.candidates(few)}
    assert chosen == {BASELINES["AdaLoRA"].weights}


@pytest.mark.parametrize(
    ("tables", "world"),
    [({"evidence", "knob"}, TOY), ({"few-shot"}, FEW), ({"short base"}, SHORT)],
)
def test_arms_differ_only_in_what_they_name(tables, world):
    searches = {SEARCHES[name] for name in tables if name in SEARCHES}
    arms = [
        a for a in experiment.evidence_arms(WORLDS) if a.experiment in tables | searches
    ]
    shared = [{k: v for k, v in a.settings.items() if k not in NAMED} for a in arms]
    assert all(settings == dataclasses.asdict(world) for settings in shared)
    recipes = {
        a.name: str(a.settings["recipe"]) for a in arms if a.experiment in tables
    }
    assert len(set(recipes.values())) == len(recipes)


def test_learning_rates_are_tuned_on_seeds_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(
        experiment,
        "fine_tune",
        lambda c, seed: seen.append((c.name, c.learning_rate, seed)),
    )
    arms = [a for a in experiment.plan("cpu") if a.experiment == "learning-rate"]
    with pytest.raises(AttributeError):  # it returned no model
        arms[0].run(1)
    assert seen == [
        (arms[0].settings["method"], arms[0].settings["learning_rate"], 1001)
    ]


@pytest.mark.parametrize(("table", "search"), SEARCHES.items())
def test_what_is_tuned_is_the_best_of_the_records(table, search, best_settings):
    """Without records there is nothing yet that the choice could follow."""
    try:
        records = results.load("caref", "cpu").select(experiment=search)
    except NotRecordedError:
        pytest.skip("caref is not recorded yet")
    best = best_settings(records, "method")
    rates = {name: settings["learning_rate"] for name, settings in best.items()}
    assert rates == LEARNING_RATES[table]
    for name, settings in best.items():
        recipe = (GRID | BASELINES)[name]
        assert settings["recipe"] == recipe.settings()


# -- runs ------------------------------------------------------------------------------


# One of each way through the code.
@pytest.mark.parametrize(
    "name", ["base", "temperature", "sparsemax", "AQ CAREF", "LoRA r=4", "AdaLoRA"]
)
@pytest.mark.usefixtures("_judge")
def test_an_arm_runs_from_end_to_end(name):
    condition = CONDITIONS[name]
    metrics = experiment.run(condition, 0)
    right = outcomes(metrics, "label")
    test = experiment.examples_of(TOY, "test", 0)
    hedged = evaluation.is_hedged(test)
    assert len(right) == TOY.test
    assert right[hedged].mean() == pytest.approx(metrics["hedged"].value)
    assert right[~hedged].mean() == pytest.approx(metrics["plain"].value)
    assert outcomes(metrics, "evidence").mean() == metrics["evidence"].value
    shown = {k for k in metrics if not k.startswith(PACKED_PREFIX)}
    assert {"ECE", "Brier", "nBERT", "flips cited", "simulatability"} < shown
    assert ("temperature" in shown) == (name == "temperature")


def test_tuning_looks_at_validation_alone(monkeypatch):
    seen = []
    real = experiment.examples_of

    def noted(world, split, seed):
        seen.append((split, seed))
        return real(world, split, seed)

    monkeypatch.setattr(experiment, "examples_of", noted)
    metrics = experiment.tune(CONDITIONS["CE"], 0)
    assert set(seen) == {("train", 1000), ("validation", 1000)}
    examples = real(TOY, "validation", 1000)
    assert metrics["validation"].n == (~evaluation.is_hedged(examples)).sum()


@pytest.mark.usefixtures("_judge")
def test_the_temperature_is_fitted_to_validation_and_changes_labels_alone(monkeypatch):
    seen = []
    real = experiment.fit_temperature

    def noted(logits, labels):
        seen.append((np.asarray(logits), np.asarray(labels)))
        return real(logits, labels)

    monkeypatch.setattr(experiment, "fit_temperature", noted)
    scaled = experiment.run(CONDITIONS["temperature"], 0)
    plain = experiment.run(CONDITIONS["CE"], 0)
    [(logits, labels)] = seen
    validation = experiment.examples_of(TOY, "validation", 0)
    assert [LABELS[index] for index in labels] == [e.label for e in validation]
    assert logits.shape == (TOY.validation, 3)
    changed = {
        k
        for k, metric in plain.items()
        if not k.startswith(PACKED_PREFIX)
        and str(scaled[k]) != str(metric)  # NaN is NaN
    }
    assert {"NLL", "Brier", "hedged confidence"} <= changed
    kept = {"plain", "hedged", "label entropy", "evidence", "nBERT", "flips cited"}
    assert not changed & kept


def test_aq_leaves_other_weights_bit_for_bit():
    before = base_weights()
    after = experiment.fine_tune(CONDITIONS["AQ CE"], 0).state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if n.startswith("decoder") and ".q." in n}
    assert len(changed) == 2 * TOY_BASE.layers


@pytest.mark.parametrize("name", ["LoRA r=4", "AdaLoRA"])
def test_adapters_leave_the_base_bit_for_bit(name):
    model = experiment.fine_tune(CONDITIONS[name], 0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    after = {
        n.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for n, weight in model.state_dict().items()
        if "lora_" not in n and "ranknum" not in n
    }
    for n, weight in base_weights().items():
        assert torch.equal(weight, after[n])


def test_adalora_ends_with_the_ranks_it_was_told():
    model = experiment.fine_tune(CONDITIONS["AdaLoRA"], 0)
    diagonals = [p for n, p in model.named_parameters() if "lora_E" in n]
    weights = BASELINES["AdaLoRA"].weights
    kept = sum(int((p != 0).sum()) for p in diagonals)
    assert kept == weights.target_rank * len(diagonals)


def test_non_orthogonality_is_that_of_peft():
    model = experiment.fine_tune(CONDITIONS["AdaLoRA"], 0)
    batch = evaluation.collate(evaluation.pairs(sample(4, "train", 0)))
    model.eval()
    with torch.no_grad():
        whole = model.base_model(**batch).loss
        plain = model.base_model.model(**batch).loss
        penalty = experiment.non_orthogonality(model)
    weight = model.peft_config["default"].orth_reg_weight
    torch.testing.assert_close(whole - plain, weight * penalty)


def test_arms_of_a_seed_see_the_same_examples_in_the_same_order(monkeypatch):
    seen = []

    def noted(learner, batch):
        seen[-1].append(batch["input_ids"])
        return training_loss(learner, batch)

    monkeypatch.setattr(experiment, "training_loss", noted)
    for name in ("CE", "AQ CAREF", "AdaLoRA"):
        seen.append([])
        experiment.fine_tune(CONDITIONS[name], 0)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_splits_share_no_question():
    world = dataclasses.replace(TOY, examples=200, validation=100, test=100)
    drawn = {
        split: experiment.examples_of(world, split, 3)
        for split in ("train", "validation", "test")
    }
    drawn["pretrain"] = experiment.corpus(TOY_BASE, 3)
    texts = {k: {e.question for e in v} for k, v in drawn.items()}
    for split, questions in texts.items():
        assert {split_of(question) for question in questions} == {split}
    for one, other in itertools.combinations(texts.values(), 2):
        assert not one & other


# -- the base --------------------------------------------------------------------------


def test_a_base_has_a_head_of_its_own():
    model = experiment.new_model(TOY_BASE)
    batch = evaluation.collate(evaluation.pairs(sample(4, "train", 0)))
    states = model(**batch, output_hidden_states=True)
    hidden = states.decoder_hidden_states[-1]
    torch.testing.assert_close(states.logits, hidden @ model.lm_head.weight.T)
    states.loss.backward()
    assert model.lm_head.weight.grad is not model.shared.weight.grad
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_a_base_is_pretrained_once_and_resumes(check_base):
    check_base(experiment, TOY_BASE)


# -- what is measured ------------------------------------------------------------------


def told(examples, shortcut=0.0):
    """Beliefs of a reader who knows the world."""
    label = np.zeros((len(examples), 128))
    wording = np.zeros((len(examples), 128))
    label[:, LABEL_TOKENS] = [posterior(e, shortcut) for e in examples]
    wording[:, evaluation.WORDING_TOKENS] = list(WORDINGS.values())
    return Beliefs(label, wording)


def test_the_exact_posterior_has_no_distance_and_believes_what_hedges_say():
    world = dataclasses.replace(TOY.world, shortcut=0.6)
    examples = sample(1500, "test", 0, world)
    beliefs = told(examples, 0.6)
    metrics = evaluation.decision_metrics(beliefs.labels, examples, 0.6)
    assert metrics["hedged distance"].value == pytest.approx(0, abs=1e-12)
    assert metrics["Brier"] == metrics["posterior Brier"]
    assert metrics["plain"].value == metrics["plain misled"].value == 1
    assert 0 < metrics["plain misled"].n < metrics["plain"].n
    for hedge, probability in HEDGES.items():
        belief = metrics[f"belief {hedge}"]
        assert belief.value == pytest.approx(probability, abs=4 * 0.35 / belief.n**0.5)
    spread = evaluation.distribution_metrics(beliefs)
    assert spread["wording entropy"].value == pytest.approx(WORDING_ENTROPY)
    assert spread["wording distance"].value == pytest.approx(0)
    assert spread["label mass"].value == pytest.approx(1)


def test_labels_without_probability_are_equally_likely():
    label = np.zeros((2, 128))
    label[0, LABEL_TOKENS[1]], label[0, 0], label[1, 0] = 0.25, 0.75, 1.0
    beliefs = Beliefs(label, label)
    assert beliefs.labels.tolist() == [[0, 1, 0], [1 / 3] * 3]
    assert evaluation.distribution_metrics(beliefs)["label mass"].value == 0.125


def test_histograms_count_every_entropy():
    counts = evaluation.histogram("x", np.array([0.0, 0.24, 0.26, 7.6]))
    assert {
        name.rpartition("/")[2]: metric.value for name, metric in counts.items()
    } == {
        "0": 2,
        "1": 1,
        "30": 1,
    }


def test_beliefs_stand_where_label_and_wording_are_predicted():
    """The example's own label is seen by what follows, and not when it is decided."""
    torch.manual_seed(0)
    model = experiment.new_model(TOY_BASE)
    [one] = sample(1, "test", 0)
    other = dataclasses.replace(
        one, label=LABELS[LABELS.index(one.label) - 1], wording="it says"
    )
    first, second = (
        evaluation.believe(model, [e], lambda z: z.softmax(-1)) for e in (one, other)
    )
    assert (first.label == second.label).all()
    assert (first.wording != second.wording).any()
    logits = model(**evaluation.collate(evaluation.pairs([one]))).logits
    expected = logits[0, 2].softmax(-1).detach().numpy()
    assert first.wording[0] == pytest.approx(expected, rel=1e-5)


def test_sparse_heads_are_judged_in_their_own_probabilities():
    assert CONDITIONS["sparsemax"].probabilities == SPARSEMAX.probabilities
    logits = torch.tensor([[3.0, 0.0, 0.0]])
    assert CONDITIONS["sparsemax"].probabilities(logits)[0, 1] == 0
    for name in ("base", "focal", "CAREF"):
        assert CONDITIONS[name].probabilities(logits)[0, 1] > 0


@pytest.mark.parametrize(
    ("output", "valid"),
    [
        ("neutral because we read nothing of tom", True),
        ("neutral because it says tom follows mia and mia is likely in rome", True),
        ("neutral because we read tom is rome", False),
        ("neutral because tom is in rome", False),
        ("mia because we read tom is in rome", False),
        ("neutral because we read tom is in rome and", False),
        ("neutral", False),
    ],
)
def test_format(output, valid):
    assert evaluation.is_well_formed(*tasks.read(output)) == valid


@pytest.mark.usefixtures("_judge")
def test_a_reader_who_knows_the_world_gets_full_marks():
    examples = sample(60, "test", 0, TOY.world)
    by_text = {e.text: e for e in examples}

    def predict(texts):
        known = [by_text[text] for text in texts]
        return [e.label for e in known], [e.explanations[0] for e in known]

    metrics = evaluation.explanation_metrics(predict, examples, 10)
    for name in ("valid", "evidence", "justified"):
        assert metrics[name].value == 1
    assert metrics["nBERT"].value == pytest.approx(100, abs=1e-3)
    assert metrics["nBERT"].n == 10


def test_writing_is_the_argmax_word_by_word():
    torch.manual_seed(0)
    model = experiment.new_model(TOY_BASE).eval()
    texts = [e.text for e in sample(3, "test", 0, dataclasses.replace(TOY.world))]
    for text, written in zip(texts, evaluation.write(model, texts), strict=True):
        ids, source = [VOCABULARY.pad], torch.tensor([VOCABULARY.encode(text)])
        for _ in range(evaluation.LONGEST):
            logits = model(source, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            ids.append(int(logits[: len(VOCABULARY)].argmax()))
            if ids[-1] == VOCABULARY.end:
                break
        assert VOCABULARY.decode(ids) == written


def test_the_predictor_asks_about_each_input_once(monkeypatch):
    asked = []

    def write(model, texts):
        asked.extend(texts)
        return [f"neutral because {text}" for text in texts]

    monkeypatch.setattr(evaluation, "write", write)
    predict = evaluation.predictor(None)
    assert predict(["a", "b", "a"]) == (["neutral"] * 3, ["a", "b", "a"])
    assert predict(["b", "c"])[1] == ["b", "c"]
    assert asked == ["a", "b", "c"]


def test_nothing_to_average_is_no_number():
    assert math.isnan(evaluation._mean(np.array([])).value)
