"""CT-SFT on real text, with toys: arms run, and no text is where it must not be."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_models import byte_level_bpe, tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ftlib import data, experiments, models, results
from ftlib.ctsft import benchmarks, tasks
from ftlib.ctsft.benchmarks import (
    FOUR,
    LEARNING_RATES,
    MODELS,
    SMALL,
    SMALL_ARMS,
    TASKS,
    TRIED,
    Discovery,
    Protocol,
    Teaching,
    large,
    learning_rate,
)
from ftlib.ctsft.settings import ARMS, MAIN_ARMS
from ftlib.ctsft.tuning import weights_of
from ftlib.data import DataUnavailable
from ftlib.outcomes import outcomes
from ftlib.results import PACKED_PREFIX, NotRecordedError

MODEL = "smollm2-135m"
WORDS = (*tasks.SENTIMENT_WORDS, *tasks.INFERENCE_WORDS)
SIZES = {"train": 48, "valid": 12, "test": 18, "dev": 48}
TOY_BASE = Teaching(
    "nusax",
    MODEL,
    steps=4,
    batch_size=8,
    learning_rate=1e-3,
    looks=2,
    related=6,
    max_length=48,
)
TOY = Protocol(
    TOY_BASE,
    Discovery(per_label=2, validation=2, sizes=(0.1, 0.5, 1), share=-9.0, draws=2),
    steps=4,
    batch_size=4,
    looks=2,
    shots=8,
    test=10,
)


def label(n, words):
    return words[n % 3]


@pytest.fixture(autouse=True)
def read(monkeypatch, base_cache, model_folder):
    """Toy data and models; what is read of the data is noted."""
    noted = []

    def nusax(language, split):
        noted.append((language, split))
        return [
            {
                "id": str(n),
                "text": f"{language} {split} {n}",
                "label": label(n, tasks.SENTIMENT_WORDS),
            }
            for n in range(SIZES[split])
        ]

    def pairs(language, split):
        noted.append((language, split))
        names = ("entailment", "neutral", "contradiction")
        return [
            {
                "premise": f"{language} {split} {n}",
                "hypothesis": "x",
                "label": label(n, names),
            }
            for n in range(SIZES.get(split, 24))
        ]

    monkeypatch.setattr(tasks, "load_nusax", nusax)
    monkeypatch.setattr(tasks, "load_xnli", pairs)
    monkeypatch.setattr(tasks, "load_indonli", lambda split: pairs("indonli", split))
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(model_folder))
    benchmarks._pretrained.cache_clear()
    benchmarks.circuit_of.cache_clear()
    yield noted
    benchmarks._pretrained.cache_clear()
    benchmarks.circuit_of.cache_clear()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model of a few thousand random weights, under the short name of a real one."""
    folder = tmp_path_factory.mktemp("models") / MODEL
    tokenizer = toy_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24}
    model = tiny_llama(len(tokenizer), seed=1, tie_word_embeddings=True, **sizes)
    model.save_pretrained(folder)
    return folder.parent


def toy_tokenizer():
    corpus = [f"\nSentiment: {word}\nAnswer: {word}" for word in WORDS]
    made = byte_level_bpe(corpus, ["</s>"], 400)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def condition(name, protocol=TOY, language="buginese"):
    toy = dataclasses.replace(protocol.base, model=MODEL)
    one = benchmarks._condition(dataclasses.replace(protocol, base=toy), name, language)
    return dataclasses.replace(one, learning_rate=1e-2 if one.recipe else 0.0)


def numbers(items):
    return {item.text.split()[2] for item in items}


# --- the plan -------------------------------------------------------------------------


def test_the_plan_at_gpu():
    arms = benchmarks.benchmark_arms()
    assert len({str(arm) for arm in arms}) == len(arms)
    experiments_of = Counter(arm.experiment for arm in arms)
    for model in MODELS:
        for language in TASKS["nusax"].targets:
            assert experiments_of[f"nusax {model} {language}"] == 1 + len(ARMS)
        for language in FOUR:
            assert experiments_of[f"nusax-16 {model} {language}"] == len(MAIN_ARMS)
            assert experiments_of[f"nusax-128 {model} {language}"] == len(MAIN_ARMS)
        for task in TASKS:
            assert experiments_of[f"{task}-discovery {model}"] == 1
            assert experiments_of[f"{task}-learning-rate {model}"] > 0
        assert f"xnli {model} sw" in experiments_of
    assert len(TASKS["nusax"].targets) == 10
    for arm in arms:
        assert arm.requires == [arm.settings["model"]]
        assert arm.settings["language" if "arm" in arm.settings else "languages"]
        if arm.experiment.startswith("xnli"):
            assert list(arm.data) == ["xnli/XNLI-1.0.zip"]
        else:
            assert {"indonli/train.jsonl", "indonli/test_expert.jsonl"} < set(arm.data)
            assert "indonli/val.jsonl" not in arm.data
            files = [path for path in arm.data if path.startswith("nusax")]
            languages = {path.split("/")[2] for path in files}
            named = arm.settings.get("languages") or [arm.settings["language"]]
            assert languages == {"indonesian", *named}
            assert len(files) == 3 * len(languages)


def test_the_plan_at_cpu():
    arms = benchmarks.small_arms()
    names = [str(arm) for arm in arms]
    assert len(set(names)) == len(names)
    compared = {"nusax stories15m javanese/" + name for name in ("base", *SMALL_ARMS)}
    assert compared < set(names)
    assert "nusax-discovery stories15m/circuit" in names
    for arm in arms:
        assert "stories15m/model.safetensors" in arm.data
        assert not any(path.startswith("indonli") for path in arm.data)


def test_arms_differ_only_in_what_they_name():
    for arm in benchmarks.benchmark_arms():
        named = arm.settings
        whole = json.loads(
            json.dumps(dataclasses.asdict(large(named["task"], named["model"])))
        )
        for name, value in whole.items():
            assert named[name] == value or name == "shots"
        if recipe := named.get("recipe"):
            expected = dataclasses.asdict(ARMS[named["method"]])
            assert recipe == json.loads(json.dumps(expected))
            assert named["learning_rate"] > 0


def test_every_arm_has_a_rate_that_is_tried():
    bases = [SMALL.base, *(large(t, m).base for t in TASKS for m in MODELS)]
    for base in bases:
        scale = "cpu" if base == SMALL.base else "gpu"
        for name in SMALL_ARMS if scale == "cpu" else ARMS:
            if name == "full, lower rate":
                assert learning_rate(base, name) < learning_rate(base, "full")
            else:
                tried = TRIED[scale][ARMS[name].weights]
                assert learning_rate(base, name) in tried


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_learning_rates_are_the_best_of_the_records(scale, best_rates):
    """Without records there is nothing they could follow."""
    try:
        records = results.load("ctsft", scale)
    except NotRecordedError:
        pytest.skip(f"ctsft is not recorded at scale {scale} yet")
    searches = {r.experiment for r in records if "-learning-rate " in r.experiment}
    for experiment in searches:
        found = records.select(experiment=experiment)
        where = f"{found[0].settings['task']}/{found[0].settings['model']}"
        for arm, rate in best_rates(found, "method").items():
            assert LEARNING_RATES[f"{where}/{arm}"] == rate, arm


@pytest.mark.parametrize("looks", [0, 3])
@pytest.mark.parametrize("settings", [TOY, TOY_BASE])
def test_the_last_look_is_at_the_end(settings, looks):
    with pytest.raises(ValueError, match=f"{looks} looks at 4 steps"):
        dataclasses.replace(settings, looks=looks)


# --- texts ----------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_no_shot_is_the_translation_of_what_was_taught(task):
    source, target = TASKS[task].source, TASKS[task].targets[0]
    for seed in range(5):
        one, other = (TASKS[task].parts(name, seed) for name in (source, target))
        assert all(item.text.startswith(f"{source} ") for part in one for item in part)
        taught, shots = numbers(one.taught), numbers(other.shots)
        assert not taught & shots
        assert numbers(other.taught) == taught
        assert numbers(one.shots) == shots
        if task == "xnli":
            assert not (taught | shots) & numbers(other.validation)
            assert len(taught) == 24 == 2 * len(shots)
        else:
            assert len(taught) == len(shots) == 24
        for part in one:
            counts = Counter(item.label for item in part)
            assert max(counts.values()) - min(counts.values()) <= 1
    assert numbers(TASKS[task].parts(source, 0).taught) != numbers(
        TASKS[task].parts(source, 1).taught
    )


def test_no_real_shot_is_the_translation_of_what_was_taught(monkeypatch):
    here = {row.name: row.where != "not here" for row in data.catalogue()}
    if not here["nusax"]:
        pytest.skip("NusaX is not here")
    monkeypatch.setattr(tasks, "load_nusax", data.sets.nusax)
    ids = {
        (language, row["text"]): row["id"]
        for language in ("indonesian", "javanese")
        for row in data.sets.nusax(language, "train")
    }
    known = {
        ids["indonesian", i.text]
        for i in benchmarks.nusax_parts("indonesian", 0).taught
    }
    drawn = {
        ids["javanese", i.text] for i in benchmarks.nusax_parts("javanese", 0).shots
    }
    assert len(known) == len(drawn) == 250
    assert not known & drawn


def test_what_an_arm_trains_on_and_is_asked():
    one = condition("full")
    drawn = numbers(TASKS["nusax"].parts("buginese", 3).shots)
    tokenizer = benchmarks._pretrained(MODEL)[1]
    examples, tokens = benchmarks.shots_of(one, 3)
    texts = [tokenizer.decode(example.ids) for example in examples]
    assert len(texts) == len(set(texts)) == 8
    assert all(text.startswith("buginese train ") for text in texts)
    assert {text.split()[2] for text in texts} <= drawn
    assert [tokenizer.decode([t]) for t in tokens] == [
        f" {word}" for word in tasks.SENTIMENT_WORDS
    ]
    tests = benchmarks.tests_of(one, 3)
    begins = {
        "validation": "buginese valid",
        "target": "buginese test",
        "source": "indonesian test",
        "related": "indonli test_expert",
    }
    asked = {}
    for name, begin in begins.items():
        asked[name] = [
            tokenizer.decode(ids[mask.bool()])
            for inputs, _ in tests[name].batches
            for ids, mask in zip(*inputs.values(), strict=True)
        ]
        assert all(text.startswith(begin) for text in asked[name])
        words = tasks.INFERENCE_WORDS if name == "related" else tasks.SENTIMENT_WORDS
        decoded = [tokenizer.decode([t]) for t in tests[name].token_ids]
        assert decoded == [f" {word}" for word in words]
        assert len(asked[name]) == (12 if name == "validation" else 10)
    places = [{text.split()[2] for text in asked[n]} for n in ("target", "source")]
    assert places[0] == places[1]


def test_phase_0_learns_both_tasks():
    base = dataclasses.replace(TOY_BASE, repeats=2)
    examples, tokens = benchmarks.lessons(base, 0)
    tokenizer = benchmarks._pretrained(MODEL)[1]
    assert [tokenizer.decode([t]) for t in tokens] == [f" {word}" for word in WORDS]
    texts = [tokenizer.decode(example.ids) for example in examples]
    assert sum(text.startswith("indonesian train") for text in texts) == 2 * 24
    assert sum(text.startswith("indonli train") for text in texts) == 6
    for text, example in zip(texts, examples, strict=True):
        assert ("Yes, maybe or no?" in text) == (example.label > 2)
        assert (
            label(int(text.split()[2]), WORDS[3:] if example.label > 2 else WORDS)
            == (WORDS[example.label])
        )


def test_the_circuit_is_found_without_target_or_test(read):
    benchmarks.base_model(TOY_BASE, 5)
    read.clear()
    benchmarks.circuit_of(TOY_BASE, TOY.discovery, 5)
    assert set(read) == {
        ("indonesian", "train"),
        ("indonesian", "valid"),
        ("indonesian", "test"),  # with the others, and nothing is made of it
        ("indonli", "train"),
    }
    by = benchmarks.evidence(TOY_BASE, TOY.discovery, "indonesian", 5)
    tokenizer = benchmarks._pretrained(MODEL)[1]
    taught = numbers(TASKS["nusax"].parts("indonesian", 5).taught)
    for questions, split in zip(by, ("train", "valid"), strict=True):
        for inputs, labels in questions.batches:
            assert labels.bincount().tolist() == [2, 2, 2]
            texts = tokenizer.batch_decode(inputs["input_ids"])
            assert all(text.startswith(f"indonesian {split}") for text in texts)
            if split == "train":
                assert {text.split()[2] for text in texts} <= taught


# --- runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", *ARMS])
def test_an_arm_runs_from_end_to_end(name):
    metrics = benchmarks.run(condition(name), 0)
    for test in ("target", "source", "related"):
        right = outcomes(metrics, test)
        assert len(right) == TOY.test == metrics[test].n
        assert right.mean() == pytest.approx(metrics[test].value)
    steps = {int(key.rpartition("/")[2]) for key in metrics if "curve" in key}
    assert steps == ({0} if name == "base" else {0, 2, 4})
    curve = {s: metrics[f"{PACKED_PREFIX}curve/validation/{s}"].value for s in steps}
    best = max(sorted(curve), key=curve.__getitem__)
    assert metrics["best step"] == best
    assert metrics["best source"].value == (
        metrics[f"{PACKED_PREFIX}curve/source/{best}"].value
    )
    assert (metrics["distance"] > 0) == (name != "base")
    with_heads = ("circuit", "near zero", "random", "LoRA")
    assert (metrics["heads"] > 0) == (name in with_heads)
    assert math.isfinite(metrics["distance"])


def test_arms_of_a_seed_start_from_the_same_weights_and_examples():
    starts = []
    for name in ("full", "circuit"):
        one = condition(name)
        tuned = benchmarks.tune_checkpoint(one, benchmarks.tests_of(one, 0), 0)
        starts.append(tuned.looks[0])
    first, second = starts
    assert all((first.right[t] == second.right[t]).all() for t in first.right)
    examples = [benchmarks.shots_of(condition(n), 0)[0] for n in ("full", "norms")]
    assert examples[0] == examples[1]
    more = dataclasses.replace(
        condition("full"), protocol=dataclasses.replace(TOY, shots=16)
    )
    assert benchmarks.shots_of(more, 0)[0][:8] == examples[0]


def test_without_a_related_task_nothing_is_read_or_said_of_it(read):
    base = dataclasses.replace(TOY_BASE, related=0)
    metrics = benchmarks.run(condition("norms", dataclasses.replace(TOY, base=base)), 0)
    assert "related" not in metrics
    assert "source" in metrics
    assert not any(name == "indonli" for name, _ in read)


def test_the_other_task_runs():
    base = dataclasses.replace(TOY_BASE, task="xnli", related=0)
    metrics = benchmarks.run(
        condition("circuit", dataclasses.replace(TOY, base=base), "sw"), 0
    )
    assert metrics["target"].n == metrics["source"].n == 10
    assert metrics["validation"].n == 12


def test_the_search_looks_at_validation_alone(monkeypatch):
    seen = []
    real = benchmarks.tune_checkpoint

    def noted(one, tests, seed):
        seen.append((one.name, set(tests), seed))
        return real(one, tests, seed)

    monkeypatch.setattr(benchmarks, "tune_checkpoint", noted)
    arms = benchmarks.small_arms(TOY)
    [arm] = [arm for arm in arms if arm.name == "norms 0.003"]
    assert arm.experiment == f"nusax-learning-rate {MODEL}"
    metrics = arm.run(1)
    assert set(metrics) == {"validation", "distance"}
    assert seen == [("norms 0.003", {"validation"}, 1001)]


def test_discovery_records_maps_curves_and_overlap():
    metrics = benchmarks.discover(TOY, ("javanese", "buginese"), 0)
    for name in ("ours", "published", "ablation", "javanese", "buginese", "again"):
        maps = [key for key in metrics if key.startswith(f"{PACKED_PREFIX}map/{name}/")]
        assert len(maps) == 8
    for name in ("ours", "published", "ablation", "random 0", "random 1"):
        assert metrics[f"{PACKED_PREFIX}faithful/{name}/8"] == pytest.approx(1)
    for name in ("javanese", "buginese", "again"):
        assert 0 <= metrics[f"jaccard {name}"] <= 1
        assert -1 <= metrics[f"rank correlation {name}"] <= 1
        assert math.isfinite(metrics[f"faithful {name}"])
    assert {"correlation ours", "correlation published", "beaten"} < set(metrics)
    assert metrics["share reached"] == 1
    assert metrics["heads"] == 1


def test_where_no_circuit_is_enough_the_largest_is_taken_and_said_to_be():
    sizes = dataclasses.replace(TOY.discovery, sizes=(0.1, 0.5), share=1e9)
    protocol = dataclasses.replace(TOY, discovery=sizes)
    metrics = benchmarks.discover(protocol, ("javanese",), 0)
    assert metrics["share reached"] == 0
    assert metrics["heads"] == 4
    assert benchmarks.run(condition("circuit", protocol), 0)["heads"] == 4


@pytest.mark.usefixtures("as_on_a_gpu")
def test_in_mixed_precision_only_training_passes_are_in_bf16(monkeypatch):
    seen = []
    real = LlamaForCausalLM.forward

    def spy(self, *given, **named):
        output = real(self, *given, **named)
        seen.append((self.training, output.logits.dtype))
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", spy)
    benchmarks._pretrained.cache_clear()
    one = condition("full", dataclasses.replace(TOY, base=other_base(seed=7)))
    tuned = benchmarks.tune_checkpoint(one, benchmarks.tests_of(one, 0), 0)
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in tuned.model.parameters()} == {torch.float32}


# --- phase 0 --------------------------------------------------------------------------


def other_base(seed):
    """Settings under which no base is kept yet."""
    return dataclasses.replace(TOY_BASE, learning_rate=1e-3 + seed * 1e-6)


def test_the_checkpoint_best_on_validation_is_kept(monkeypatch):
    accuracies, seen = iter([0.25, 0.75, 0.75, 0.5]), []

    def judge(model, asked):
        seen.append(weights_of(model))
        right = next(accuracies)
        return np.arange(8) < 8 * right

    monkeypatch.setattr(benchmarks, "is_right", judge)
    base = dataclasses.replace(other_base(1), looks=4)
    kept = weights_of(benchmarks.base_model(base, 0))
    assert len(seen) == 4
    assert all(torch.equal(kept[name], w) for name, w in seen[1].items())
    assert not all(torch.equal(kept[name], w) for name, w in seen[2].items())


def test_a_base_is_taught_once_per_seed_and_settings(monkeypatch):
    first = weights_of(benchmarks.base_model(TOY_BASE, 2))
    other = weights_of(benchmarks.base_model(TOY_BASE, 3))
    assert not all(torch.equal(first[name], w) for name, w in other.items())

    def refuse(*given, **named):
        raise AssertionError("taught a second time")

    monkeypatch.setattr(benchmarks, "tune", refuse)
    again = weights_of(benchmarks.base_model(TOY_BASE, 2))
    assert all(torch.equal(again[name], w) for name, w in first.items())
    with pytest.raises(AssertionError, match="second time"):
        benchmarks.base_model(other_base(2), 2)


# --- from the command -----------------------------------------------------------------


def test_recorded_runs_are_not_run_again(monkeypatch, tmp_path):
    arms = [a for a in benchmarks.small_arms(TOY) if a.name in ("base", "norms")]
    monkeypatch.setattr(experiments, "load_plan", lambda method, scale: arms)
    first = experiments.run_plan("ctsft", "cpu", [0], arms=["base"], directory=tmp_path)
    counted = []
    real = benchmarks.tune_checkpoint

    def noted(one, *given):
        counted.append(one.name)
        return real(one, *given)

    monkeypatch.setattr(benchmarks, "tune_checkpoint", noted)
    whole = experiments.run_plan("ctsft", "cpu", [0], directory=tmp_path)
    assert counted == ["norms"]
    assert len(whole) == 2
    assert whole.select(arm="base")[0].metrics == first[0].metrics


def test_a_model_that_is_not_to_be_had_is_said_to_be(monkeypatch):
    monkeypatch.setenv("FTLIB_MODEL_DIR", "/nowhere")
    monkeypatch.setattr(models.sources, "_REMOTE", {})
    base = dataclasses.replace(TOY_BASE, model="qwen2.5-0.5b")
    with pytest.raises(
        models.ModelUnavailable, match=r"qwen2\.5-0\.5b is not available"
    ):
        benchmarks.base_model(base, 0)


def test_data_that_are_not_to_be_had_are_said_to_be(monkeypatch):
    def missing(language, split):
        raise DataUnavailable("data file xnli/XNLI-1.0.zip (xnli) is not available")

    monkeypatch.setattr(tasks, "load_xnli", missing)
    base = dataclasses.replace(TOY_BASE, task="xnli", related=0)
    with pytest.raises(DataUnavailable, match=r"XNLI-1\.0\.zip"):
        benchmarks.run(condition("full", dataclasses.replace(TOY, base=base), "sw"), 0)
