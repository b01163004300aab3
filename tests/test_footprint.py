"""Every count is compared with what a real step of a small model does."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ftlib import footprint as counts
from ftlib.footprint import Decoder, footprint, measured_peak
from ftlib.ops import TokenLoss, vocabulary_head

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
}
PRECISIONS = {
    "fp32": counts.FP32,
    "autocast": counts.AUTOCAST,
    "bf16": counts.BF16,
}
RELATIVE_ERROR = 0.05


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")


def make_model(kind="llama", **changes):
    model_class, config_class = MODELS[kind]
    torch.manual_seed(0)
    return model_class._from_config(
        config_class(**SIZES | changes), attn_implementation="sdpa"
    ).train()


def make_step(model, name="fp32", sequences=4, length=48, optimizer=None):
    ids = torch.zeros(sequences, length, dtype=torch.int64)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()

    return step


# --- weights ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}]
)
def test_weights_are_those_of_the_model(kind, changes):
    model_class, config_class = MODELS[kind]
    config = config_class(**SIZES | changes)
    with torch.device("meta"):
        model = model_class(config)
    assert Decoder.from_config(config).weights == model.num_parameters()


@pytest.mark.parametrize(
    ("name", "kind"), [("Qwen2.5-7B", "qwen2"), ("Llama 3 70B", "llama")]
)
def test_the_large_shapes_have_the_weights_of_the_models_that_transformers_builds(
    name, kind
):
    decoder = counts.SHAPES[name]
    model_class, config_class = MODELS[kind]
    config = config_class(
        vocab_size=decoder.vocabulary,
        hidden_size=decoder.width,
        intermediate_size=decoder.mlp_width,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        tie_word_embeddings=False,
    )
    assert Decoder.from_config(config) == decoder
    with torch.device("meta"):
        model = model_class(config)
    assert decoder.weights == model.num_parameters()


def test_a_width_of_heads_that_is_not_the_quotient_is_read():
    config = LlamaConfig(**SIZES, head_dim=24)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert Decoder.from_config(config).weights == model.num_parameters()


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match=r"no formulas for a gpt2.*measured_peak"):
        Decoder.from_config(GPT2Config())


# --- what is trained ----------------------------------------------------------------


def test_adapters_have_the_weights_that_peft_makes():
    config = LoraConfig(r=3, target_modules="all-linear")
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config)
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    decoder = Decoder.from_config(LlamaConfig(**SIZES))
    assert counts.lora(decoder, rank=3).weights == made


def test_queries_and_circuits_have_the_weights_of_their_matrices():
    model = make_model()
    decoder = Decoder.from_config(model.config)
    attentions = [layer.self_attn for layer in model.model.layers]
    made = sum(a.q_proj.weight.numel() for a in attentions)
    assert counts.queries(decoder).weights == made
    # All heads of one layer, and the matrices that they make up.
    first = attentions[0].q_proj.weight.numel() + attentions[0].o_proj.weight.numel()
    assert counts.circuit(decoder, heads=4, layers=1) == (first,) * 4 + (False,)
    assert counts.circuit(decoder, heads=1, layers=1).weights == first // 4


# --- bytes --------------------------------------------------------------------------


def saved_bytes(model, name, sequences=2, length=48):
    """Bytes that the layers keep for the backward pass, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(sequences, length, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"),
    ):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}])
def test_a_layer_keeps_what_is_counted_to_the_byte(kind, name, changes):
    kept = []
    for layers in (1, 3):
        model = make_model(kind, num_hidden_layers=layers, **changes)
        model = model.bfloat16() if name == "bf16" else model
        kept.append(saved_bytes(model, name))
    decoder = Decoder.from_config(model.config)
    per_token = counts.saved_per_token(decoder, PRECISIONS[name])
    # Of the weights, autocast keeps copies.
    casts = 2 * decoder.matrices if name == "autocast" else 0
    assert kept[1] - kept[0] == 2 * (2 * 48 * per_token + casts)


def counted_and_measured(name, checkpointing, sequences, foreach=False):
    model = make_model()
    model = model.bfloat16() if name == "bf16" else model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    step = make_step(model, name, sequences, optimizer=optimizer)
    step()  # makes the optimiser's state
    measured = measured_peak(step, model, optimizer)
    decoder = Decoder.from_config(model.config)
    counted = footprint(
        decoder,
        counts.everything(decoder),
        sequences * 48,
        PRECISIONS[name],
        checkpointing=checkpointing,
    )
    return counted, measured


@pytest.mark.parametrize("sequences", [8, 24])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", PRECISIONS)
def test_the_peak_of_many_tokens_is_at_the_head(name, checkpointing, sequences):
    counted, measured = counted_and_measured(name, checkpointing, sequences)
    assert counted.saved + counted.head > counted.gradients + counted.update
    assert counted.peak == pytest.approx(measured, rel=RELATIVE_ERROR)
    # The tolerance is narrow enough to miss one of the three tables of logits.
    without = replace(counted, head=counted.head * 2 // 3)
    assert without.peak != pytest.approx(measured, rel=RELATIVE_ERROR)


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_peak_of_few_tokens_is_at_the_update(name):
    counted, measured = counted_and_measured(name, False, 1, foreach=True)
    assert counted.saved + counted.head < counted.gradients + counted.update
    assert counted.peak == pytest.approx(measured, rel=RELATIVE_ERROR)
    without = replace(counted, update=0, saved=0, head=0)
    assert without.peak != pytest.approx(measured, rel=RELATIVE_ERROR)


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_the_update_copies_the_second_moments_unless_it_is_fused(how):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), **{how: True})
    make_step(model, optimizer=optimizer)()  # makes the optimiser's state
    make_step(model)()  # makes gradients
    measured = measured_peak(optimizer.step, model, optimizer)
    decoder = Decoder.from_config(model.config)
    counted = footprint(decoder, counts.everything(decoder), 1, counts.FP32)
    without = counted.weights + counted.optimizer + counted.gradients
    copies = {"foreach": counted.update, "fused": 0}
    assert measured == pytest.approx(without + copies.pop(how), rel=0.01)
    (other,) = copies.values()
    assert measured != pytest.approx(without + other, rel=0.01)


@pytest.mark.parametrize("trains", ["lora", "queries"])
def test_few_trained_weights_keep_less_than_is_counted(trains):
    model = make_model()
    decoder = Decoder.from_config(model.config)
    if trains == "lora":
        trained = counts.lora(decoder, rank=2)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    else:
        trained = counts.queries(decoder)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name)
    counted = footprint(decoder, trained, 12 * 48, counts.FP32)
    measured = measured_peak(make_step(model, sequences=12), model)
    assert 0.75 < measured / (counted.peak - counted.optimizer) <= 1


def head_peak(tokens, stores_logits):
    """Peak of the head alone, above the hidden states and the weight."""
    hidden = nn.Parameter(torch.randn(1, tokens, 64))
    weight = nn.Parameter(torch.randn(1024, 64))
    targets = torch.zeros(1, tokens, dtype=torch.int64)

    def step():
        if stores_logits:
            logits = (hidden @ weight.T).float().flatten(0, 1)
            F.cross_entropy(logits, targets.flatten()).backward()
        else:
            vocabulary_head(hidden, weight, targets, loss=TokenLoss()).loss.backward()

    given = nn.ParameterList([hidden, weight])
    return measured_peak(step, given) - hidden.nbytes - weight.nbytes


def test_without_a_table_of_logits_the_head_grows_by_the_hidden_states_alone():
    growth = head_peak(2048, stores_logits=False) - head_peak(1024, stores_logits=False)
    decoder = Decoder(1024, 1, 64, 1, 1, 64, 64)
    full = counts.everything(decoder)
    sizes = [
        footprint(decoder, full, tokens, counts.FP32, stores_logits=False).head
        for tokens in (2**20, 2**20 + 1)
    ]
    assert growth < 1024 * 16 * 64
    assert sizes[1] - sizes[0] == 4 * 64
    stored = head_peak(2048, stores_logits=True) - head_peak(1024, stores_logits=True)
    assert stored >= 1024 * 8 * 1024


def test_the_peak_is_of_what_is_alive_at_once_and_views_are_nothing_new():
    owner = nn.Linear(16, 16, bias=False)

    def step():
        first = torch.zeros(1000)
        second = first.view(10, 100)[:5] + 1  # 500 numbers, beside the first
        del first, second
        torch.zeros(1200)

    given = owner.weight.nbytes
    assert measured_peak(step) == 4 * 1500
    assert measured_peak(step, owner) == 4 * 1500 + given


# --- several processes --------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)]
)
def test_shards_are_those_of_the_zero_paper(stage, gigabytes):
    """Its figure 1: 7.5 billion weights, Adam in mixed precision, 64 processes."""
    decoder = Decoder(0, 1, 0, 1, 1, 0, 0)
    trained = counts.Trained(int(7.5e9), int(7.5e9), 0, 0)
    parts = footprint(
        decoder, trained, 1, counts.BF16_WITH_MASTER, processes=64, stage=stage
    )
    weights = 2 * 7.5e9 / (64 if stage == 3 else 1)
    found = weights + parts.optimizer + parts.gradients
    assert found / 1e9 == pytest.approx(gigabytes, abs=0.1)


def test_ddp_holds_gradients_twice_and_fsdp_some_units_whole():
    decoder = counts.SHAPES["Qwen2.5-7B"]
    full = counts.everything(decoder)
    alone = footprint(decoder, full, 1024)
    copies = footprint(decoder, full, 1024, processes=8)
    assert copies == replace(alone, exchanged=alone.gradients)
    shards = footprint(decoder, full, 1024, processes=8, stage=3)
    assert shards.exchanged > 2 * 2 * decoder.root
    assert shards.gradients == alone.gradients / 8


def exchanged(decoder, trained):
    return footprint(decoder, trained, 1024, processes=8, stage=3).exchanged


@pytest.mark.parametrize("name", counts.SHAPES)
def test_fsdp_gathers_frozen_weights_but_only_gradients_that_there_are(name):
    decoder = counts.SHAPES[name]
    gathered = 2 * (decoder.root + 2 * decoder.layer)
    adapters = counts.lora(decoder, rank=16)
    share = -(-adapters.weights // decoder.layers)
    assert exchanged(decoder, adapters) == gathered + 2 * share
    assert exchanged(decoder, counts.queries(decoder)) == gathered + 2 * decoder.queries
    some = counts.circuit(decoder, heads=32, layers=16)
    assert exchanged(decoder, some) == gathered + 4 * decoder.queries
    # Of full fine-tuning it is the larger of a layer and what is outside the layers.
    largest = max(decoder.root, decoder.layer)
    assert exchanged(decoder, counts.everything(decoder)) == gathered + 2 * largest
    assert share < 0.01 * largest  # so that taking the one for the other would show


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_process_has_nothing_to_divide(stage):
    decoder = counts.SHAPES["Qwen2.5-7B"]
    full = counts.everything(decoder)
    alone = footprint(decoder, full, 1024)
    assert footprint(decoder, full, 1024, stage=stage) == alone


@pytest.mark.parametrize(("tokens", "processes"), [(0, 1), (1, 0)])
def test_nothing_to_do_is_refused(tokens, processes):
    decoder = counts.SHAPES["Qwen2.5-7B"]
    full = counts.everything(decoder)
    with pytest.raises(ValueError, match="at least 1"):
        footprint(decoder, full, tokens, processes=processes)


# --- arithmetic ---------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trains", ["everything", "queries"])
def test_flops_are_those_that_torch_counts(trains, checkpointing):
    model = LlamaForCausalLM._from_config(
        LlamaConfig(**SIZES), attn_implementation="eager"
    ).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains == "everything" or "q_proj" in name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    decoder = Decoder.from_config(model.config)
    step = make_step(model, sequences=2, length=48)
    with FlopCounterMode(display=False) as counter:
        step()
    counted = counts.train_flops(
        decoder, getattr(counts, trains)(decoder), 2, 48, checkpointing=checkpointing
    )
    assert counted == pytest.approx(
        counter.get_total_flops(), rel=0 if trains == "everything" else 0.1
    )
