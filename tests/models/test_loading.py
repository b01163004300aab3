import shutil

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from ftlib import models, runtime

NAME = "smollm2-135m"


@pytest.fixture
def folder(isolated, monkeypatch, tiny_llama):
    """The tiny Llama, under the name of a registered model."""
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(isolated))
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    return shutil.copytree(tiny_llama, isolated / NAME)


@pytest.mark.usefixtures("folder")
def test_defaults_are_the_runtimes():
    model, tokenizer = models.load_causal_lm(NAME)
    assert model.dtype == runtime.precision().dtype == torch.float32
    assert model.device == runtime.device()
    assert not model.training
    assert tokenizer.pad_token == "</s>"
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 2


@pytest.mark.usefixtures("folder")
def test_dtype_and_device_are_the_callers():
    model, _ = models.load_causal_lm(
        NAME, dtype=torch.bfloat16, device=torch.device("meta")
    )
    assert model.dtype == torch.bfloat16
    assert model.device.type == "meta"


@pytest.mark.usefixtures("folder")
def test_weights_are_those_saved(tiny_llama):
    from safetensors.torch import load_file

    model, _ = models.load_causal_lm(NAME)
    saved = load_file(tiny_llama / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[key], saved[key].float())


def test_truncated_weights_are_refused_by_name(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(models.ModelCorrupt, match=NAME):
        models.load_causal_lm(NAME)


def test_weights_under_another_name_are_refused_not_drawn_at_random(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content.replace(b"mlp.up_proj", b"mlp.up_prok", 1))
    with pytest.raises(models.ModelCorrupt, match=r"lack .*mlp\.up_proj\.weight"):
        models.load_causal_lm(NAME)


@pytest.mark.parametrize("file", ["config", "tokenizer", "generation_config"])
@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b[:40] + b"\xff" + b[40:]]
)
def test_a_damaged_json_file_is_refused_by_name(folder, file, damage):
    path = folder / f"{file}.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(models.ModelCorrupt, match=rf"{file}\.json is damaged"):
        models.load_causal_lm(NAME)


def test_pickled_weights_are_never_read(folder):
    model, _ = models.load_causal_lm(NAME)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(OSError, match="safetensors"):
        models.load_causal_lm(NAME)


def test_an_encoder_decoder_comes_as_it_was_saved(isolated, monkeypatch, tiny_llama):
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(isolated))
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    folder = shutil.copytree(tiny_llama, isolated / "flan-t5-small")
    config = T5Config(vocab_size=10, d_model=8, d_ff=8, d_kv=4, num_layers=1)
    saved = T5ForConditionalGeneration(config)
    saved.save_pretrained(folder)
    model, tokenizer = models.load_seq2seq_lm("flan-t5-small")
    assert model.config.is_encoder_decoder
    assert not model.training
    assert model.dtype == torch.float32
    assert torch.equal(model.shared.weight, saved.shared.weight)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 2


@pytest.mark.usefixtures("folder")
def test_a_decoder_is_no_encoder_decoder():
    with pytest.raises(ValueError, match="LlamaConfig"):
        models.load_seq2seq_lm(NAME)


@pytest.mark.parametrize("name", ["stories15m", "smollm2-135m"])
def test_real_model_tells_a_story(name):
    if not models.available(name):
        pytest.skip(f"{name} is neither in FTLIB_MODEL_DIR nor in a cache")
    model, tokenizer = models.load_causal_lm(name, device=torch.device("cpu"))
    prompt = tokenizer("Once upon a", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits = model(**prompt).logits[0, -1]
    assert tokenizer.decode(logits.argmax()).strip() == "time"
