"""What models are made of, and which weights belong to a head."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from ftlib.ctsft.architectures import describe
from ftlib.ctsft.heads import Head, all_heads, head_slices, norm_parameters
from ftlib.ctsft.tuning import lora

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **SPECIAL,
}
# Heads of 6 features, together 24 of 16; one layer of each type.
GEMMA3 = {
    **LLAMA,
    "head_dim": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
BERT = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **SPECIAL,
}
GPT2 = {
    "vocab_size": 30,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 8,
    **SPECIAL,
}
T5 = {
    "vocab_size": 30,
    "d_model": 16,
    "d_kv": 3,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
}

MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2-base": lambda: GPT2Model(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=6)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA3)),
    "gemma3-labels": lambda: Gemma3TextForSequenceClassification(
        Gemma3TextConfig(**GEMMA3)
    ),
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT)),
    "t5": lambda: T5EncoderModel(T5Config(**T5)),
    "t5-stack": lambda: T5ForConditionalGeneration(T5Config(**T5)).get_encoder(),
}
SHARED = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3-labels")
WIDTHS = {"qwen3": 6, "gemma3": 6, "gemma3-labels": 6, "t5": 3, "t5-stack": 3}


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def recorded(model, get):
    """Return what each module of a list gets in a plain pass."""
    torch.manual_seed(0)
    ids, seen = torch.randint(3, 30, (2, 5)), []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        for module in get(describe(model))
    ]
    with torch.no_grad():
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
    for hook in hooks:
        hook.remove()
    return seen


def gathered(model):
    """Return z of each layer, (B, T, heads, head_dim)."""
    found = recorded(model, lambda parts: [b.attention.o.module for b in parts.blocks])
    return [z.unflatten(-1, (4, -1)) for z in found]


def test_a_projection_is_what_its_module_computes(model):
    for block in describe(model).blocks:
        attention, mlp = block.attention, block.mlp
        parts = (attention.q, attention.k, attention.v, attention.o, mlp.up, mlp.down)
        for projection in parts:
            x = torch.randn(3, projection.weight.shape[1])
            whole = projection.module(x)
            found = nn.functional.linear(x, projection.weight, projection.bias)
            expected = whole[:, projection.start : projection.stop]
            torch.testing.assert_close(found, expected)


def test_the_projections_of_a_fused_matrix_are_its_thirds():
    model = MODELS["gpt2"]()
    attention = describe(model).blocks[1].attention
    weights = [p.weight for p in (attention.q, attention.k, attention.v)]
    fused = model.transformer.h[1].attn.c_attn.weight
    assert torch.equal(torch.cat(weights).T, fused)
    assert weights[0].data_ptr() == fused.data_ptr()


def test_a_norm_is_what_its_module_computes(model):
    for norm in describe(model).norms:
        x = torch.randn(3, len(norm.weight))
        if norm.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        found = x * norm.weight / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        if norm.bias is not None:
            found = found + norm.bias
        torch.testing.assert_close(norm.module(x), found)


def test_a_scale_stored_minus_one_is_not_rounded_to_bf16():
    model = MODELS["gemma3"]().bfloat16()
    norm = describe(model).blocks[0].mlp.output_norm
    norm.module.weight.data.fill_(1e-3)
    assert (norm.weight - 1).min() > 9e-4
    assert (1 + norm.module.weight == 1).all()


def test_the_parts_have_the_sizes_of_the_model(model, family):
    parts = describe(model)
    sizes = (parts.layers, parts.heads, parts.head_dim)
    assert sizes == (2, 4, WIDTHS.get(family, 4))
    assert parts.blocks[0].attention.kv_heads == (2 if family in SHARED else 4)
    assert parts.is_post_norm == (family == "bert")
    assert bool(parts.head) == (family not in ("gpt2-base", "t5", "t5-stack"))
    assert all_heads(model) == [Head(a, b) for a in range(2) for b in range(4)]


# --- weights of heads -----------------------------------------------------------------


def selected(slices):
    """Return, for each parameter, which of its weights are in a slice."""
    masks = {}
    for piece in slices:
        mask = masks.setdefault(
            piece.parameter, torch.zeros_like(piece.parameter, dtype=torch.bool)
        )
        part = mask.narrow(piece.dim, piece.start, piece.stop - piece.start)
        assert not part.any()
        part.fill_(True)
    return masks


def test_columns_of_o_are_what_a_head_writes(model):
    """Without them the output is as if the head had gathered nothing."""
    head = Head(1, 2)
    (piece,) = head_slices(model, [head], ["o"])
    output = describe(model).blocks[1].attention.o.module
    z = torch.randn(5, describe(model).heads, describe(model).head_dim)
    without = z.clone()
    without[:, head.index] = 0
    expected = output(without.flatten(1))
    with torch.no_grad():
        piece.parameter.narrow(piece.dim, piece.start, piece.stop - piece.start).zero_()
    torch.testing.assert_close(output(z.flatten(1)), expected)
    assert not torch.allclose(without, z)


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_rows_of_q_k_and_v_change_the_heads_that_read_them(model, family, tensor):
    before = gathered(model)
    slices = head_slices(model, [Head(1, 2)], [tensor])
    for parameter, mask in selected(slices).items():
        parameter.data[mask] += 1.0
    after = gathered(model)
    assert torch.equal(after[0], before[0])
    changed = [not torch.equal(after[1][:, :, h], before[1][:, :, h]) for h in range(4)]
    reads_with_it = [h in (2, 3) for h in range(4)]
    alone = [h == 2 for h in range(4)]
    shares = tensor != "q" and family in SHARED
    assert changed == (reads_with_it if shares else alone)


def test_biases_are_among_the_rows():
    kinds = {
        (piece.parameter.ndim, piece.dim)
        for piece in head_slices(MODELS["qwen2"](), [Head(0, 1)], ["q"])
    }
    assert kinds == {(2, 0), (1, 0)}
    kinds = {
        (piece.parameter.ndim, piece.dim)
        for piece in head_slices(MODELS["gpt2"](), [Head(0, 1)], ["q", "o"])
    }
    assert kinds == {(2, 1), (1, 0), (2, 0)}


def test_what_heads_share_is_given_once():
    model = MODELS["llama"]()
    heads = [Head(0, 1), Head(0, 0), Head(0, 2), Head(0, 1)]
    masks = selected(head_slices(model, heads, ["q", "k", "v", "o"]))
    sizes = [int(mask.sum()) for mask in masks.values()]
    # Three heads of q and o, and both of k and v; 4 features each, 16 wide.
    assert sorted(sizes) == [2 * 64, 2 * 64, 3 * 64, 3 * 64]


def test_the_weights_of_a_circuit_of_qwen_are_as_many_as_expected():
    """114,752 for a head of Qwen2.5-0.5B: 2 · 64 · 896 weights and 64 biases."""
    config = Qwen2Config(
        vocab_size=10,
        hidden_size=896,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    slices = head_slices(model, [Head(0, 9)])
    sizes = [
        s.parameter.numel() // s.parameter.shape[s.dim] * (s.stop - s.start)
        for s in slices
    ]
    assert sum(sizes) == 114_752


def test_norm_parameters_are_those_of_the_norms(model):
    found = {id(parameter) for parameter in norm_parameters(model)}
    expected = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if any(part in name.lower() for part in ("norm", "ln_"))
    }
    assert found == expected
    assert found


def test_gemma_has_six_norms_in_each_block():
    model = MODELS["gemma3"]()
    assert len(norm_parameters(model)) == 2 * 6 + 1
    found = {id(norm.module.weight) for norm in describe(model).norms}
    assert found == {id(parameter) for parameter in norm_parameters(model)}


@pytest.mark.parametrize("family", SHARED)
def test_lora_adapts_q_and_o_of_every_layer(family):
    model = MODELS[family]()
    inner = 4 * WIDTHS.get(family, 4)
    per_rank = 2 * 2 * (16 + inner)
    config = lora(model, 3 * per_rank + 1)
    assert config.r == 3
    before = sum(p.numel() for p in model.parameters())
    adapted = get_peft_model(model, config)
    added = sum(p.numel() for p in adapted.parameters()) - before
    assert added == 3 * per_rank
    assert {name.rpartition(".")[2] for name in config.target_modules} == {
        "q_proj",
        "o_proj",
    }


def test_an_empty_circuit_is_refused():
    model = MODELS["gpt2"]()
    with pytest.raises(ValueError, match="the circuit is empty"):
        head_slices(model, [])
    with pytest.raises(ValueError, match="the circuit is empty"):
        head_slices(model, [Head(0, 0)], [])
    with pytest.raises(ValueError, match="no tensor 'w'"):
        head_slices(model, [Head(0, 0)], ["q", "w"])
    with pytest.raises(ValueError, match=r"no Head\(layer=0, index=4\)"):
        head_slices(model, [Head(0, 4)])


# --- what is not supported ------------------------------------------------------------


def test_an_unknown_architecture_is_refused():
    with pytest.raises(
        ValueError, match=r"Linear is not supported\. Supported are GPT"
    ):
        describe(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("build", "matrix"),
    [
        (
            lambda: GPTNeoXForCausalLM(
                GPTNeoXConfig(
                    vocab_size=30,
                    hidden_size=16,
                    intermediate_size=24,
                    num_hidden_layers=1,
                    num_attention_heads=4,
                    **SPECIAL,
                )
            ),
            "query_key_value",
        ),
        (lambda: Phi3ForCausalLM(Phi3Config(**LLAMA)), "qkv_proj"),
    ],
)
def test_a_fused_projection_of_unknown_layout_is_refused(build, matrix):
    with pytest.raises(ValueError, match=rf"one matrix, {matrix}.*Supported are"):
        describe(build())


def test_an_encoder_decoder_is_refused():
    model = T5ForConditionalGeneration(T5Config(**T5))
    with pytest.raises(ValueError, match=r"only the encoder.*get_encoder\(\)"):
        describe(model)
    with pytest.raises(ValueError, match="T5's decoder"):
        describe(model.get_decoder())


def test_other_gemmas_are_refused():
    with pytest.raises(ValueError, match="Gemma2ForCausalLM is not supported"):
        describe(Gemma2ForCausalLM(Gemma2Config(**LLAMA)))
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = Gemma3Config(
        text_config=GEMMA3, vision_config=vision, mm_tokens_per_image=1
    )
    with pytest.raises(ValueError, match=r"Conditional.*Gemma 3's text models"):
        describe(Gemma3ForConditionalGeneration(config))


def test_adapters_are_refused():
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="merge_and_unload"):
        describe(get_peft_model(MODELS["qwen2"](), config))
    inside = inject_adapter_in_model(config, MODELS["qwen2"]())
    del inside.peft_config
    with pytest.raises(ValueError, match="not a plain linear layer: merge adapters"):
        describe(inside)


def test_heads_of_mixed_sizes_are_refused():
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    attention = model.model.layers[1].self_attn
    attention.q_proj = nn.Linear(16, 12, bias=False)
    attention.o_proj = nn.Linear(12, 16, bias=False)
    with pytest.raises(ValueError, match=r"mixed sizes.*layer 1 have \[12, 8, 8\]"):
        describe(model)
    model = MODELS["bert"]()
    attention = model.bert.encoder.layer[1].attention.self
    attention.num_attention_heads, attention.attention_head_size = 2, 8
    with pytest.raises(ValueError, match="mixed sizes"):
        describe(model)


def test_variants_without_a_rule_are_refused():
    with pytest.raises(ValueError, match=r"'tanh' is not supported: choose from gelu"):
        describe(GPT2Model(GPT2Config(**GPT2, activation_function="tanh")))
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        with pytest.raises(ValueError, match="Gemma 3 with softcapping"):
            describe(Gemma3TextModel(Gemma3TextConfig(**GEMMA3, **{cap: 30.0})))
    with pytest.raises(ValueError, match="cross-attention"):
        describe(GPT2Model(GPT2Config(**GPT2, add_cross_attention=True)))
    config = BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match="cross-attention"):
        describe(BertModel(config))
    with pytest.raises(ValueError, match="head of BertForQuestionAnswering"):
        describe(BertForQuestionAnswering(BertConfig(**BERT)))
