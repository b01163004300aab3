"""The variants' weights by name, and the published shares of Flan-T5-large."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ftlib.caref.objective import CAREF, caref_loss
from ftlib.caref.selection import (
    PUBLISHED_SHARES,
    RELEASED_PATTERNS,
    Selection,
    adalora,
    lora,
    matching,
    select,
    train_only,
)

WEIGHTS = 783_150_080


def flan_t5_large():
    config = T5Config(
        vocab_size=32128,
        d_model=1024,
        d_kv=64,
        d_ff=2816,
        num_layers=24,
        num_heads=16,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
        # The checkpoint has a head of its own; a new T5 of transformers 5 never has.
        model.lm_head = torch.nn.Linear(1024, 32128, bias=False)
    return model


@pytest.fixture(scope="module")
def large():
    return flan_t5_large()


def small_t5(layers=1):
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2}
    config = T5Config(
        **sizes, num_layers=layers, decoder_start_token_id=0, pad_token_id=0
    )
    torch.manual_seed(0)
    return T5ForConditionalGeneration(config)


def small_bart():
    config = BartConfig(
        vocab_size=32,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
    )
    return BartForConditionalGeneration(config)


def small_llama():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def small_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2))


# --- Flan-T5-large ---------------------------------------------------------------


COUNTS = {
    "BASE": WEIGHTS,
    "DEC": 409_019_904,
    "AQKV": 3 * 48 * 1024**2,
    "LAQ": 48 * 1024**2 + 122 * 1024,
    "AQ": 48 * 1024**2,
}


@pytest.mark.parametrize("attentions", ["decoder", "self"])
@pytest.mark.parametrize("variant", COUNTS)
def test_the_published_shares(large, variant, attentions):
    found = select(large, variant, attentions=attentions)
    assert (found.parameters, found.total) == (COUNTS[variant], WEIGHTS)
    assert round(found.share, 4) == PUBLISHED_SHARES[variant]
    trained = {n: p for n, p in large.named_parameters() if p.requires_grad}
    assert tuple(trained) == found.names
    assert sum(p.numel() for p in trained.values()) == found.parameters


@pytest.mark.parametrize(
    ("variant", "share", "percent"),
    [("AQKV", 0.916, 1), ("LAQ", 0.0964, 2), ("AQ", 0.0643, 2)],
)
def test_what_the_released_patterns_select(large, variant, share, percent):
    found = matching(large, [RELEASED_PATTERNS[variant]])
    assert round(found.share, percent + 2) == share
    if variant == "AQ":
        assert found == select(large, "AQ")
    else:
        assert found.parameters > select(large, variant).parameters


def test_why_the_released_pattern_selects_nearly_everything(large):
    found = set(matching(large, [RELEASED_PATTERNS["AQKV"]]).names)
    left_out = [n for n, _ in large.named_parameters() if n not in found]
    assert all("block" in name for name in found)
    assert [n for n in left_out if "block" in n] == []


@pytest.mark.parametrize(
    ("config", "percent"),
    [(lora(4), 0.58), (lora(128), 15.74), (adalora(100), 4.46)],
    ids=["lora 4", "lora 128", "adalora"],
)
def test_the_published_shares_of_adapters(config, percent):
    model = get_peft_model(flan_t5_large(), config)
    trained, total = model.get_nb_trainable_parameters()
    assert round(100 * trained / total, 2) == percent
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert not [n for n in names if "lm_head" in n or "shared" in n]


# --- names -----------------------------------------------------------------------


T5_NAMES = {
    ("AQ", "decoder"): {
        "decoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
    },
    ("AQ", "self"): {
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "decoder.block.0.layer.0.SelfAttention.q.weight",
    },
    ("AQKV", "decoder"): {
        f"decoder.block.0.layer.{place}.{matrix}.weight"
        for place in ("0.SelfAttention", "1.EncDecAttention")
        for matrix in "qkv"
    },
    ("AQKV", "self"): {
        f"{side}.block.0.layer.0.SelfAttention.{matrix}.weight"
        for side in ("encoder", "decoder")
        for matrix in "qkv"
    },
}
T5_NORMS = {
    "encoder.block.0.layer.0.layer_norm.weight",
    "encoder.block.0.layer.1.layer_norm.weight",
    "encoder.final_layer_norm.weight",
    "decoder.block.0.layer.0.layer_norm.weight",
    "decoder.block.0.layer.1.layer_norm.weight",
    "decoder.block.0.layer.2.layer_norm.weight",
    "decoder.final_layer_norm.weight",
}
for reading in ("decoder", "self"):
    T5_NAMES["LAQ", reading] = T5_NAMES["AQ", reading] | T5_NORMS


@pytest.mark.parametrize(("variant", "attentions"), T5_NAMES)
def test_names_in_t5(variant, attentions):
    found = select(small_t5(), variant, attentions=attentions)
    assert set(found.names) == T5_NAMES[variant, attentions]


def test_the_decoder_of_t5_has_neither_embedding_nor_head():
    names = set(select(small_t5(), "DEC").names)
    everything = {n for n, _ in small_t5().named_parameters()}
    assert names == {n for n in everything if n.startswith("decoder.")}
    assert (
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in names
    )
    assert everything - names >= {"shared.weight"}


def test_names_in_bart():
    both = ("self_attn", "encoder_attn")
    expected = {
        f"model.decoder.layers.0.{place}.q_proj.{part}"
        for place in both
        for part in ("weight", "bias")
    }
    assert set(select(small_bart(), "AQ").names) == expected
    own = set(select(small_bart(), "AQ", attentions="self").names)
    assert {n.split(".")[1] for n in own} == {"encoder", "decoder"}
    assert all("self_attn" in n for n in own)
    assert all(
        n.startswith("model.decoder.layer") for n in select(small_bart(), "DEC").names
    )


def test_names_in_llama():
    queries = {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert set(select(small_llama(), "AQ").names) == queries
    norms = {
        f"model.layers.{i}.{name}_layernorm.weight"
        for i in range(2)
        for name in ("input", "post_attention")
    }
    assert set(select(small_llama(), "LAQ").names) == queries | norms | {
        "model.norm.weight"
    }
    assert len(select(small_llama(), "AQKV").names) == 6
    assert select(small_llama(), "BASE").share == 1


def test_only_selected_weights_get_a_gradient():
    model = small_t5()
    found = select(model, "AQ")
    ids = torch.tensor([[3, 4, 5]])
    caref_loss(model, labels=ids, loss=CAREF, input_ids=ids).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == set(found.names)
    assert all(model.get_parameter(n).grad.abs().max() > 0 for n in trained)


def test_another_variant_replaces_the_first():
    model = small_t5()
    select(model, "BASE")
    found = select(model, "AQ")
    assert found.names == tuple(
        n for n, p in model.named_parameters() if p.requires_grad
    )


# --- errors ----------------------------------------------------------------------


def test_what_cannot_be_selected_is_refused():
    with pytest.raises(ValueError, match=r"no variant 'aqv'.*AQ"):
        select(small_t5(), "aqv")
    with pytest.raises(ValueError, match="choose decoder or self"):
        select(small_t5(), "AQ", attentions="cross")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no encoder.*BASE"):
        select(small_llama(), "DEC")
    with pytest.raises(ValueError, match=r"one matrix \(transformer.h.0.attn.c_attn"):
        select(small_gpt2(), "AQ")
    with pytest.raises(ValueError, match=r"matches 'SelfAttn\.q'.*SelfAttention\.q"):
        matching(small_t5(), ["SelfAttn.q"])
    with pytest.raises(ValueError, match=r"matches 'zzz'.*shared.weight"):
        matching(small_t5(), ["decoder", "zzz"])
    with pytest.raises(ValueError, match=r"no model.layers.0.self_attn.q_proj"):
        train_only(small_t5(), select(small_llama(), "AQ"))


def test_a_selection_counts_tied_weights_once():
    model = small_t5()
    assert model.lm_head.weight is model.shared.weight
    unique = {id(p): p.numel() for p in model.parameters()}
    found = select(model, "BASE")
    assert found == Selection(found.names, sum(unique.values()), sum(unique.values()))
