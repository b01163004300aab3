"""The plan runs, its arms differ in what they name, and nothing leaks into a test."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from ftlib import results
from ftlib.ctsft import experiment, languages, tuning
from ftlib.ctsft.heads import head_slices, norm_parameters
from ftlib.ctsft.languages import LABELS, PROXY, THINGS, Language, World
from ftlib.ctsft.runs import heads_to_train
from ftlib.ctsft.settings import (
    ARMS,
    LEARNING_RATES,
    MAIN_ARMS,
    SHOTS,
    TENSORS,
    BaseSettings,
    DiscoverySettings,
    TransferSettings,
    learning_rate,
)
from ftlib.ctsft.tuning import Recipe, weights_of
from ftlib.outcomes import outcomes
from ftlib.results import PACKED_PREFIX, NotRecordedError
from ftlib.sequences import IGNORED
from ftlib.splits import split_of
from ftlib.training import TrainingSettings

TOY_BASE = BaseSettings(
    width=16,
    layers=2,
    heads=4,
    feed_forward=16,
    world=World(people=2),
    asked=24,
    plain=20,
    foreign=20,
    training=TrainingSettings(
        steps=4, batch_size=16, learning_rate=1e-3, checkpoint_every=2
    ),
)
TOY = TransferSettings(
    base=TOY_BASE,
    discovery=DiscoverySettings(
        per_label=2, validation=2, sizes=(1, 3, 8), share=-9.0, draws=2
    ),
    shots=16,
    steps=4,
    batch_size=8,
    looks=2,
    validation=10,
    test=12,
)
NAMED = {"arm", "method", "recipe", "learning_rate", "shots"}
CONDITIONS = {
    c.name: c for c in experiment.conditions(TOY) if c.experiment == "transfer"
}
MODELS = ("all", "circuit", "near zero", "random", "norms", "lora")

pytestmark = pytest.mark.usefixtures("base_cache")


# -- the plan --------------------------------------------------------------------------


def test_arms_are_recorded_under_distinct_names():
    names = [str(arm) for arm in experiment.plan("cpu")]
    assert len(names) == len(set(names))
    assert {f"transfer/{name}" for name in ("base", *ARMS)} < set(names)
    assert {f"easier/{name}" for name in ("base", *ARMS)} < set(names)
    assert {f"tensors/{name}" for name in TENSORS} < set(names)
    # A tenth of full fine-tuning's rate is an arm of ``transfer`` already.
    assert len([n for n in names if n.startswith("rates/")]) == 11
    assert {f"shots/{a} {n}" for a in MAIN_ARMS for n in SHOTS} < set(names)
    assert "discovery/circuit" in names
    assert all(a.requires for a in experiment.plan("gpu"))


def test_every_arm_but_the_lower_rate_is_searched():
    arms = [a for a in experiment.plan("cpu") if a.experiment == "learning-rate"]
    assert {a.settings["method"] for a in arms} == {*ARMS} - {"full, lower rate"}
    assert {*LEARNING_RATES} == {*ARMS} - {"full, lower rate"}
    for arm in arms:
        name = arm.settings["method"]
        rates = {
            a.settings["learning_rate"] for a in arms if a.settings["method"] == name
        }
        assert learning_rate(name) in rates
    assert learning_rate("full, lower rate") < learning_rate("full")


def test_arms_differ_only_in_what_they_name():
    arms = experiment.transfer_arms(TOY)
    for arm in arms:
        its = TOY.easier() if arm.experiment == "easier" else TOY
        whole = json.loads(json.dumps(dataclasses.asdict(its)))
        for name, value in whole.items():
            assert name in NAMED or arm.settings[name] == value
        assert arm.settings.keys() - whole.keys() <= NAMED
    settings = [json.dumps(arm.settings, sort_keys=True) for arm in arms]
    assert len(set(settings)) == len(settings)
    assert TOY.easier().base.foreign == 2 * TOY.base.foreign
    assert {arm.settings["shots"] for arm in arms} == {TOY.shots, *SHOTS}


def test_learning_rates_are_searched_on_seeds_of_their_own(monkeypatch):
    seen = []

    def noted(condition, tests, seed):
        seen.append((condition.name, set(tests), seed))
        raise InterruptedError

    monkeypatch.setattr(experiment, "tune_checkpoint", noted)
    arms = experiment.transfer_arms(TOY)
    arm = next(a for a in arms if a.experiment == "learning-rate")
    with pytest.raises(InterruptedError):
        arm.run(1)
    assert seen == [(arm.name, {"validation"}, 1001)]


def test_what_is_chosen_is_the_best_of_the_records(best_settings):
    """Without records there is nothing yet that the choice could follow."""
    try:
        records = results.load("ctsft", "cpu").select(experiment="learning-rate")
    except NotRecordedError:
        pytest.skip("ctsft is not recorded yet")
    for name, settings in best_settings(records, "method").items():
        assert settings["learning_rate"] == learning_rate(name)
        assert settings["recipe"] == json.loads(
            json.dumps(dataclasses.asdict(ARMS[name]))
        )


@pytest.mark.parametrize("looks", [0, 3, 8])
def test_the_last_look_is_at_the_end(looks):
    with pytest.raises(ValueError, match=f"{looks} looks at 4 steps"):
        dataclasses.replace(TOY, looks=looks)


# -- runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "full", "circuit", "norms", "LoRA"])
def test_an_arm_runs_from_end_to_end(name):
    metrics = experiment.run(CONDITIONS[name], 0)
    for test in ("target", "source", "related"):
        right = outcomes(metrics, test)
        assert len(right) == TOY.test
        assert right.mean() == pytest.approx(metrics[test].value)
    steps = {int(key.rpartition("/")[2]) for key in metrics if "curve" in key}
    assert steps == ({0} if name == "base" else {0, 2, 4})
    curve = [metrics[f"{PACKED_PREFIX}curve/validation/{s}"].value for s in steps]
    assert metrics["best validation"].value == max(curve)
    first = min(s for s, value in zip(steps, curve, strict=True) if value == max(curve))
    assert metrics["best step"] == first
    assert metrics["best target"].value == (
        metrics[f"{PACKED_PREFIX}curve/target/{first}"].value
    )
    assert (metrics["distance"] > 0) == (name != "base")
    assert metrics[f"{PACKED_PREFIX}curve/distance/0"] == 0
    assert (metrics["heads"] > 0) == (name in ("circuit", "LoRA"))


def test_the_search_looks_at_validation_alone(monkeypatch):
    seen, drawn = [], []
    real, real_sample = experiment.questions_of, languages.sample

    def noted(settings, test, seed):
        seen.append((test, seed))
        return real(settings, test, seed)

    def noted_sample(n, split, *rest):
        drawn.append(split)
        return real_sample(n, split, *rest)

    monkeypatch.setattr(experiment, "questions_of", noted)
    monkeypatch.setattr(languages, "sample", noted_sample)
    metrics = experiment.search(CONDITIONS["circuit"], 0)
    assert set(seen) == {("validation", 1000)}
    assert "test" not in drawn
    assert set(metrics) == {"validation", "distance"}


@pytest.mark.parametrize("name", ["circuit", "near zero", "random", "norms"])
def test_what_an_arm_does_not_select_keeps_its_bits(name):
    start = weights_of(experiment.base_model(TOY_BASE, 0))
    recipe = ARMS[name]
    done = experiment.tune_checkpoint(CONDITIONS[name], {}, 0)
    selected = {id(p) for p in norm_parameters(done.model)}
    free = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in start.items()}
    names = {id(p): n for n, p in done.model.named_parameters()}
    for piece in head_slices(done.model, done.heads) if done.heads else ():
        mask = free[names[id(piece.parameter)]]
        mask.narrow(piece.dim, piece.start, piece.stop - piece.start).fill_(True)
    for n, p in done.model.named_parameters():
        moved = p.detach() != start[n]
        if id(p) in selected:
            assert moved.any()
        else:
            assert not (moved & ~free[n]).any()
    free_heads = sum(int(mask.sum()) for mask in free.values())
    assert done.trained == free_heads + sum(
        p.numel() for p in norm_parameters(done.model)
    )
    assert (free_heads > 0) == (recipe.weights != "norms")


def test_all_but_the_embeddings():
    start = weights_of(experiment.base_model(TOY_BASE, 0))
    done = experiment.tune_checkpoint(CONDITIONS["blocks"], {}, 0)
    words = done.model.get_input_embeddings().weight
    assert done.trained == sum(w.numel() for w in start.values()) - words.numel()
    for name, weight in done.model.named_parameters():
        assert torch.equal(weight, start[name]) == (weight is words)


def test_arms_of_heads_train_as_many_and_lora_takes_the_circuits_budget():
    circuit = experiment.circuit_of(TOY_BASE, TOY.discovery, 0)
    heads = {w: heads_to_train(Recipe(w), lambda: circuit, 0) for w in MODELS}
    assert heads["all"] == heads["norms"] == []
    sizes = {len(heads[w]) for w in ("circuit", "near zero", "random", "lora")}
    assert len(sizes) == 1
    assert heads["lora"] == heads["circuit"] != heads["near zero"]


def test_arms_of_a_seed_see_the_same_examples_in_the_same_order(monkeypatch):
    seen, real = [], tuning.label_loss

    def noted(model, batch):
        seen[-1].append(batch[0][0]["input_ids"])
        return real(model, batch)

    monkeypatch.setattr(tuning, "label_loss", noted)
    for name in ("full", "circuit", "random", "LoRA"):
        seen.append([])
        experiment.tune_checkpoint(CONDITIONS[name], {}, 0)
    assert len(seen[0]) == TOY.steps
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_more_shots_contain_the_fewer():
    few, many = (
        experiment.few_shots(dataclasses.replace(TOY, shots=n), 3) for n in (16, 64)
    )
    assert many[:16] == few
    assert len(many) == 64
    counts = np.bincount([example.label for example in few])
    assert counts.max() - counts.min() <= 1


# -- the circuit -----------------------------------------------------------------------


def test_the_circuit_is_found_without_target_or_test(monkeypatch):
    drawn, translated = [], []
    real, real_ask = languages.sample, languages.sentiment

    def noted(n, split, *rest):
        drawn.append(split)
        return real(n, split, *rest)

    def noted_ask(stories, language=PROXY):
        translated.append(language)
        return real_ask(stories, language)

    experiment.base_model(TOY_BASE, 5)
    monkeypatch.setattr(experiment, "corpus", lambda *_: [])
    monkeypatch.setattr(experiment, "kept_base", lambda model, *_: model)
    monkeypatch.setattr(languages, "sample", noted)
    monkeypatch.setattr(languages, "sentiment", noted_ask)
    experiment.circuit_of.cache_clear()
    experiment.circuit_of(TOY_BASE, TOY.discovery, 5)
    experiment.circuit_of.cache_clear()
    assert set(drawn) == {"train", "validation"}
    assert set(translated) == {PROXY}


def test_evidence_has_as_many_examples_of_each_label():
    found, judged = experiment.evidence(TOY_BASE, TOY.discovery, PROXY, 0)
    for asked in (found, judged):
        labels = torch.cat([labels for _, labels in asked.batches])
        assert labels.bincount().tolist() == [2, 2, 2]
    for asked in experiment.related_evidence(TOY_BASE, TOY.discovery, 0):
        labels = torch.cat([labels for _, labels in asked.batches])
        assert labels.bincount().tolist() == [2] * len(THINGS)


def test_discovery_records_maps_curves_and_overlap():
    metrics = experiment.discover(TOY, 0)
    for name in ("ours", "published", "ablation", "target", "tuned", "related"):
        maps = [key for key in metrics if key.startswith(f"{PACKED_PREFIX}map/{name}/")]
        assert len(maps) == TOY_BASE.layers * TOY_BASE.heads
    for name in ("ours", "published", "ablation", "random 0", "random 1"):
        assert metrics[f"{PACKED_PREFIX}faithful/{name}/8"] == pytest.approx(1)
    assert {"correlation ours", "correlation published", "beaten"} < set(metrics)
    assert 0 <= metrics["jaccard target"] <= 1
    circuit = experiment.circuit_of(TOY_BASE, TOY.discovery, 0)
    best = f"{PACKED_PREFIX}faithful/ours/{circuit.size}"
    assert metrics["faithful ours"] == metrics[best]
    assert circuit.faithful == pytest.approx(
        [metrics[f"{PACKED_PREFIX}faithful/ours/{k}"] for k in TOY.discovery.sizes]
    )


# -- examples --------------------------------------------------------------------------


def test_splits_share_no_text():
    texts = {}
    for purpose, split in (
        ("asked", "pretrain"),
        ("shots", "train"),
        ("validation", "validation"),
        ("target", "test"),
    ):
        drawn = experiment._stories(60, split, 3, TOY_BASE, purpose)
        texts[purpose] = {story.text for story in drawn}
        assert {split_of(text) for text in texts[purpose]} == {split}
    for one, other in itertools.combinations(texts.values(), 2):
        assert not one & other


def test_tests_ask_what_they_are_called():
    vocabulary, base = experiment.VOCABULARY, TOY_BASE
    settings = dataclasses.replace(
        TOY, base=dataclasses.replace(base, target=Language(0.0))
    )
    foreign = {word[::-1] for word in THINGS}
    for test in ("validation", "target", "source", "related"):
        asked = experiment.questions_of(settings, test, 0)
        words = THINGS if test == "related" else LABELS
        assert [vocabulary.words[t] for t in asked.token_ids] == list(words)
        for inputs, labels in asked.batches:
            for ids, label in zip(inputs["input_ids"], labels, strict=True):
                text = vocabulary.decode(ids.tolist()).split()
                is_foreign = bool(foreign & set(text))
                assert is_foreign == (test in ("validation", "target"))
                if test == "related":
                    assert THINGS[label] in text
                    assert text[-2:] == ["topic", ":"]


def test_the_checkpoint_knows_the_target_from_plain_texts_alone():
    lessons = experiment.corpus(TOY_BASE, 0)
    assert len(lessons) == 24 + 20 + 20
    known = set(Language(0.25).words.values()) - set(PROXY.words.values())
    kinds = [
        (bool(known & set(lesson.text.split())), lesson.turns[0][0] == " so i")
        for lesson in lessons
    ]
    assert set(kinds) == {(False, False), (False, True), (True, True)}


def test_only_answers_are_learnt():
    [lesson] = languages.lessons(
        [languages.Story((languages.Sentence("i", "hates", "tea"),))]
    )
    encoded = experiment.encoded(lesson)
    learnt = [i for i in encoded.targets if i != IGNORED]
    assert experiment.VOCABULARY.decode(learnt) == "tea negative"
    assert experiment.VOCABULARY.decode(encoded.ids) == (
        "hates tea says i . topic : tea . mood : negative ."
    )
    other = experiment.EncodedLesson([5, 6], [IGNORED, 6])
    batch = experiment.collate([encoded, other])
    assert batch["labels"][1].tolist() == [IGNORED, 6] + [IGNORED] * 11
    assert batch["attention_mask"].sum(1).tolist() == [len(encoded.ids), 2]


# -- the base --------------------------------------------------------------------------


def test_a_base_is_trained_once_and_resumes(check_base):
    check_base(experiment, TOY_BASE)
