"""The real language model's experiment, on a toy of the same kind."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ftlib.cgm import experiment, tales
from ftlib.cgm.settings import TALES, TaleSettings
from ftlib.experiments import run_plan
from ftlib.results import Metric, read

WORDS = (
    "<s> </s> Once upon a time there was an doctor nurse pilot athlete named "
    "Lily Tom She He likes to run . Mrs Mr"
).split()
TOY = TaleSettings(
    model="smollm2-135m",
    trained=("doctor", "nurse"),
    held_out=("athlete",),
    max_new_tokens=5,
    batch_size=32,
    steps=2,
    learning_rate=1e-3,
    kl_weights=(0.1,),
    dual_samples=(256,),
    evaluation_samples=16,
    score_chunk=8,
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A Llama of a few thousand random weights, under a real model's short name."""
    folder = tmp_path_factory.mktemp("models") / TOY.model
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<s>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<s>"
    )
    tokenizer.save_pretrained(folder)
    model = tiny_llama(
        len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=1,
    )
    model.save_pretrained(folder)
    return folder.parent


@pytest.fixture
def teller(model_folder, monkeypatch):
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(model_folder))
    return experiment.storyteller(TOY)


def test_the_gpu_scale_runs_unattended_on_any_device(
    model_folder, monkeypatch, tmp_path
):
    """What `make gpu` runs, at toy size, with the device overridden."""
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(model_folder))
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setitem(TALES, "gpu", TOY)
    run = partial(run_plan, "cgm", "gpu", range(1), experiment="tales")
    recorded = run(directory=tmp_path)
    assert recorded.arms() == ["base", "relax λ=0.1, baseline", "reward N=256"]
    stored = read(tmp_path / "cgm" / "gpu.json")
    assert [r.key for r in stored] == [r.key for r in recorded]
    base = recorded.select(arm="base")[0]
    assert base.metrics["kl"].value == pytest.approx(0, abs=1e-6)
    assert recorded.select(arm="relax λ=0.1, baseline")[0].metrics["kl"].value > 0
    before = json.loads((tmp_path / "cgm" / "gpu.json").read_text())
    run(directory=tmp_path)  # finds all of it done
    assert json.loads((tmp_path / "cgm" / "gpu.json").read_text()) == before


def test_constraints_follow_the_rule_and_the_prompt(teller):
    torch.manual_seed(0)
    samples = teller.sample(64)
    h = teller.gender_constraints(samples)
    assert h.shape == (64, 2)
    assert set(h.unique().tolist()) <= {-2.0, 0.0, 2.0}
    assert (h[samples.prompt == 0, 1] == 0).all()
    for text, row in zip(teller.texts(samples), h.sum(1) / 2, strict=True):
        assert row == tales.gender(text)


def test_the_opening_takes_the_right_article():
    assert tales.opening("nurse").endswith("was a nurse named")
    assert tales.opening("athlete").endswith("was an athlete named")


def test_report_counts_every_profession_equally(teller):
    torch.manual_seed(0)
    report = tales.gender_report(teller, samples=10, chunk=7)
    assert report["female/doctor"].n == report["male/nurse"].n == 10
    gaps = [
        abs(report[f"female/{p}"].value - report[f"male/{p}"].value)
        for p in ("doctor", "nurse")
    ]
    overall = tales.mean_abs_imbalance(report, teller.professions)
    assert overall.value == pytest.approx(np.mean(gaps))
    assert overall.n == 20


def test_report_where_no_text_tells_is_not_a_number(teller, monkeypatch):
    monkeypatch.setattr(type(teller), "texts", lambda self, s: ["run"] * len(s))
    report = tales.gender_report(teller, samples=3, chunk=8)
    assert tales.mean_abs_imbalance(report, teller.professions).value == 0
    assert math.isnan(report["name_fits_pronoun"].value)
    assert report["name_fits_pronoun"].n == 0


def test_kl_to_balance_comes_from_the_shares():
    shares = {"female/doctor": 0.2, "male/doctor": 0.7}
    report = {name: Metric(value, 100) for name, value in shares.items()}
    expected = -math.log(0.1 + 2 * math.sqrt(0.14))
    assert tales.kl_to_balance(report, ["doctor"]) == pytest.approx(expected)


def test_asking_about_others_keeps_the_weights(teller):
    other = teller.asked_about(["pilot", "athlete", "nurse"])
    assert other.model is teller.model
    assert len(other.prompts) == 3
    assert len(teller.prompts) == 2
