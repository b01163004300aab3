"""The factors of the logits against the logits that the model itself computes."""

import dataclasses
from contextlib import nullcontext

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from ftlib.ops.output_head import OutputHead, output_head
from ftlib.ops.token_loss import TokenLoss
from ftlib.ops.vocabulary_head import vocabulary_head

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 4,
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
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}


def randomised(model, std=0.3):
    """A model in float64 whose every parameter matters, adapters included."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.double().eval()


def gpt2():
    return randomised(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32
            )
        )
    )


def llama(tie=False, **changes):
    config = LlamaConfig(**COMMON, tie_word_embeddings=tie, **changes)
    return randomised(LlamaForCausalLM(config))


def qwen2(tie=False):
    return randomised(Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=tie)))


def t5(**changes):
    return randomised(T5ForConditionalGeneration(T5Config(**T5, **changes)))


def gemma2(softcap=1.5):
    config = Gemma2Config(**COMMON, head_dim=4, final_logit_softcapping=softcap)
    return randomised(Gemma2ForCausalLM(config))


def cohere():
    return randomised(CohereForCausalLM(CohereConfig(**COMMON, logit_scale=0.3)))


def granite():
    return randomised(GraniteForCausalLM(GraniteConfig(**COMMON, logits_scaling=3.0)))


def bart():
    return randomised(BartForConditionalGeneration(BartConfig(**BART)))


def marian():
    return randomised(MarianMTModel(MarianConfig(**BART)))


def batch(model):
    torch.manual_seed(2)
    inputs = {
        "input_ids": torch.randint(3, VOCABULARY, (2, 7)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
    }
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 4))
    return inputs


def logits_of(head: OutputHead):
    z = head.logit_scale * (head.hidden @ head.weight.T)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def gradients(model, logits):
    if not logits.requires_grad:
        return {}
    model.zero_grad()
    torch.manual_seed(3)
    (logits * torch.randn_like(logits)).sum().backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same_logits(model, seed=None):
    """Logits and all gradients agree with the model's, which is left as it was."""
    inputs = batch(model)
    if seed is not None:
        torch.manual_seed(seed)
    want = model(**inputs).logits
    expected = gradients(model, want)
    if seed is not None:
        torch.manual_seed(seed)
    head = output_head(model, **inputs)
    torch.testing.assert_close(logits_of(head), want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradients(model, logits_of(head)), expected, rtol=1e-9, atol=1e-11
    )
    if seed is not None:
        torch.manual_seed(seed)
    torch.testing.assert_close(model(**inputs).logits, want)
    return head, want


@pytest.mark.parametrize(
    ("build", "scale", "softcap"),
    [
        (gpt2, 1, None),
        (lambda: llama(tie=True), 1, None),
        (llama, 1, None),
        (lambda: qwen2(tie=True), 1, None),
        (qwen2, 1, None),
        (t5, 1, None),
        (
            lambda: t5(tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
            1,
            None,
        ),
        (gemma2, 1, 1.5),
        (lambda: gemma2(softcap=None), 1, None),
        (cohere, 0.3, None),
        (granite, 1 / 3, None),
        (bart, 1, None),
        (marian, 1, None),
    ],
    ids=(
        "gpt2 llama-tied llama qwen2-tied qwen2 t5 t5-v1.1 gemma2 gemma2-uncapped"
        " cohere granite bart marian"
    ).split(),
)
def test_models(build, scale, softcap):
    model = build()
    head, want = assert_same_logits(model)
    assert head.weight is model.get_output_embeddings().weight
    assert head.logit_scale == pytest.approx(scale, rel=1e-12)
    assert (head.softcap or 0) == pytest.approx(softcap or 0, rel=1e-12)
    if scale != 1 or softcap:  # what the bare product misses is not small
        assert (head.hidden @ head.weight.T - want).abs().max() > 0.1


@pytest.mark.parametrize("scaled", [True, False])
def test_the_scale_of_t5_is_in_its_hidden_states(scaled):
    """Whichever way a version of transformers decides whether there is one."""
    model = t5()
    model.config.scale_decoder_outputs = scaled
    head, _ = assert_same_logits(model)
    decoded = model(**batch(model), output_hidden_states=True).decoder_hidden_states
    factor = 16**-0.5 if scaled else 1
    torch.testing.assert_close(head.hidden, decoded[-1] * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_scale_and_the_softcap_are_exact_in_low_precision(dtype):
    for build, scale, softcap in ((cohere, 0.3, None), (gemma2, 1, 1.5)):
        model = build().to(dtype)
        head = output_head(model, **batch(model))
        assert head.hidden.dtype == head.weight.dtype == dtype
        assert head.logit_scale == pytest.approx(scale, rel=2e-7)
        assert (head.softcap or 0) == pytest.approx(softcap or 0, rel=2e-7)


def test_scale_and_softcap_together():
    model = cohere()
    model.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: 2 * torch.tanh(logits * 5 / 2)
    )
    model.logit_scale = 1.0
    head, _ = assert_same_logits(model)
    assert head.logit_scale == pytest.approx(5)
    assert head.softcap == pytest.approx(2)


def test_a_head_by_itself():
    linear = nn.Linear(8, 30, bias=False)
    hidden = torch.randn(3, 8)
    head = output_head(linear, hidden)
    assert (head.logit_scale, head.softcap) == (1.0, None)
    assert head.hidden is hidden
    assert head.weight is linear.weight


def test_logits_to_keep():
    model = llama()
    inputs = {**batch(model), "logits_to_keep": 2}
    head = output_head(model, **inputs)
    assert head.hidden.shape == (2, 2, 16)
    torch.testing.assert_close(logits_of(head), model(**inputs).logits)


def test_the_loss_and_its_gradients_are_the_models_own():
    model = adapted(llama(), target_modules=["lm_head", "q_proj"])
    ids = batch(model)["input_ids"]
    model.zero_grad()
    want = model(input_ids=ids, labels=ids).loss
    want.backward()
    expected = {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }
    model.zero_grad()
    head = output_head(model, input_ids=ids)
    loss = vocabulary_head(
        head.hidden[:, :-1],
        head.weight,
        ids[:, 1:],
        loss=TokenLoss(),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    ).loss
    loss.backward()
    torch.testing.assert_close(loss, want, check_dtype=False, rtol=1e-6, atol=0)
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------- adapters


def adapted(model, **settings):
    """The model with LoRA, lora_B not zero."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["lm_head"], **settings}
    return randomised(get_peft_model(model, LoraConfig(**settings)))


def two_adapters(model, active, **second):
    model = adapted(model)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, **second))
    model = randomised(model)
    model.base_model.set_adapter(active)
    return model


def merged(model):
    model.merge_adapter()
    return model


@pytest.mark.parametrize(
    ("build", "ranks"),
    [
        (lambda: adapted(llama()), 4),
        (lambda: adapted(llama(), use_rslora=True), 4),
        (lambda: adapted(qwen2(tie=True), target_modules=["lm_head", "q_proj"]), 4),
        (
            lambda: adapted(
                gpt2(), target_modules=["lm_head", "c_attn"], fan_in_fan_out=True
            ),
            4,
        ),
        (lambda: adapted(gemma2()), 4),
        (lambda: adapted(t5()), 4),
        (lambda: two_adapters(llama(), ["default"], target_modules=["lm_head"]), 4),
        (lambda: two_adapters(llama(), ["other"], target_modules=["lm_head"]), 3),
        (
            lambda: two_adapters(
                llama(), ["default", "other"], target_modules=["lm_head"]
            ),
            7,
        ),
        (
            lambda: two_adapters(
                llama(), ["default", "other"], target_modules=["q_proj"]
            ),
            4,
        ),
        (lambda: two_adapters(llama(), ["other"], target_modules=["q_proj"]), 0),
        (lambda: merged(adapted(llama())), 0),
        (lambda: merged(adapted(llama(), use_dora=True)), 0),
        (lambda: adapted(llama()).merge_and_unload(), 0),
        (lambda: adapted(llama(), target_modules="all-linear"), 0),
    ],
    ids=(
        "lora rslora tied fan-in-fan-out softcap t5 first second both both-one-on-head"
        " none-on-head merged merged-dora unloaded all-linear"
    ).split(),
)
@pytest.mark.filterwarnings("ignore:.*(tie|tied|fan_in_fan_out).*")
def test_lora(build, ranks):
    head, _ = assert_same_logits(build())
    assert head.hidden.shape[-1] == head.weight.shape[1] == 16 + ranks


def test_lora_changes_the_logits():
    """What every one of these tests would miss if the adapter were nothing."""
    model = adapted(llama())
    head = output_head(model, **batch(model))
    bare = head.hidden[..., :16] @ head.weight[:, :16].T
    assert (logits_of(head) - bare).abs().max() > 0.5


@pytest.mark.parametrize("first_merged", [False, True])
def test_disabled_lora(first_merged):
    model = adapted(llama(), target_modules=["lm_head", "q_proj"])
    with model.disable_adapter():
        want = model(**batch(model)).logits
    if first_merged:
        model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(output_head(model, **batch(model))), want)


def test_lora_dropout_in_training_is_the_models_own():
    model = adapted(llama(), lora_dropout=0.5)
    model.add_adapter("other", LoraConfig(target_modules=["lm_head"], lora_dropout=0.3))
    model = randomised(model)
    model.base_model.set_adapter(["default", "other"])
    model.train()
    head, _ = assert_same_logits(model, seed=4)
    torch.manual_seed(5)
    again = output_head(model, **batch(model))
    assert not torch.equal(head.hidden, again.hidden)


def test_a_small_lora_survives_bf16():
    """Rounded into the weight it would lose most of its effect."""
    torch.manual_seed(0)
    head = nn.Linear(256, 500, bias=False).bfloat16()
    layer = get_peft_model(
        nn.Sequential(head), LoraConfig(target_modules=["0"])
    ).base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=1e-5)
    hidden = torch.randn(40, 256).bfloat16()
    x, weight, *_ = output_head(layer, hidden)
    assert x.dtype == weight.dtype == torch.bfloat16
    effect = x.double() @ weight.double().T - hidden.double() @ head.weight.double().T
    low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    want = hidden.double() @ low_rank.double().T * layer.scaling["default"]
    torch.testing.assert_close(effect, want, rtol=0.05, atol=0.01 * want.std().item())


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.filterwarnings("ignore:.*(tie|tied).*")
def test_modules_to_save(tie, disabled):
    model = adapted(
        llama(tie=tie), target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    with model.disable_adapter() if disabled else nullcontext():
        head, _ = assert_same_logits(model)
    wrapper = model.get_output_embeddings()
    used = wrapper.original_module if disabled else wrapper.modules_to_save["default"]
    assert head.weight is used.weight
    assert head.weight.requires_grad is not disabled


def test_modules_to_save_of_another_adapter():
    model = adapted(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model = randomised(model)
    model.set_adapter("other")
    head, _ = assert_same_logits(model)
    assert head.weight is model.get_output_embeddings().original_module.weight


@pytest.mark.parametrize("state", ["active", "disabled", "merged"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.filterwarnings("ignore:.*(tie|tied|trainable_token).*")
def test_trainable_tokens(tie, state):
    tokens = [5, 9] if tie else {"lm_head": [5, 9]}
    model = adapted(
        llama(tie=tie), target_modules=["q_proj"], trainable_token_indices=tokens
    )
    base = model.get_output_embeddings().token_adapter.base_layer.weight
    if state == "merged":
        model.merge_adapter()
    with model.disable_adapter() if state == "disabled" else nullcontext():
        head, _ = assert_same_logits(model)
    changed = (head.weight != base).any(dim=1).nonzero().flatten().tolist()
    assert changed == ([5, 9] if state == "active" else [])


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["lora", "modules-to-save"],
)
def test_adapters_tied_to_the_embeddings(settings):
    model = adapted(llama(tie=True), ensure_weight_tying=True, **settings)
    if type(model.get_output_embeddings()) is nn.Linear:
        pytest.skip("this version of peft does not tie the head")
    assert_same_logits(model)


def test_adapter_added_by_transformers():
    model = llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["lm_head", "v_proj"]))
    head, _ = assert_same_logits(randomised(model))
    assert head.weight.shape == (VOCABULARY, 20)


def test_prompt_tuning():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    head, _ = assert_same_logits(randomised(get_peft_model(llama(), config)))
    assert head.hidden.shape == (2, 3 + 7, 16)


# -------------------------------------------------------------------------- refusals


def refused(model, error, *words, **inputs):
    """The call fails with these words in its message, and restores the model."""
    with pytest.raises(error) as caught:
        output_head(model, **(inputs or batch(model)))
    for word in words:
        assert word in str(caught.value)
    for module in model.modules():
        assert "forward" not in vars(module)


@pytest.mark.parametrize(
    "config",
    [
        peft.VeraConfig(target_modules=["lm_head"]),
        peft.IA3Config(target_modules=["lm_head"], feedforward_modules=["lm_head"]),
        peft.LoHaConfig(target_modules=["lm_head"]),
        peft.LoKrConfig(target_modules=["lm_head"]),
        peft.AdaLoraConfig(target_modules=["lm_head"], init_r=4, total_step=10),
        peft.MissConfig(target_modules=["lm_head"], r=4),
    ],
    ids=lambda config: type(config).__name__,
)
def test_other_adapters_on_the_head_are_refused(config):
    model = get_peft_model(llama(), config)
    kind = type(model.get_output_embeddings())
    name = f"{kind.__module__}.{kind.__qualname__}"
    refused(model, TypeError, name, "leave the head out of target_modules", "merge")


def test_dora_is_refused():
    model = adapted(llama(), use_dora=True)
    refused(model, TypeError, "DoraLinearVariant", "use plain LoRA")
    with model.disable_adapter():
        assert_same_logits(model)


def test_lora_bias_is_refused():
    with pytest.warns(UserWarning, match="lora_bias"):
        model = adapted(llama(), lora_bias=True)
    refused(model, ValueError, "bias", "lora_bias=False")


def test_an_adapter_for_each_example_is_refused():
    model = adapted(llama())
    names = ["default", "__base__"]
    inputs = {**batch(model), "adapter_names": names}
    refused(model, ValueError, "adapter_names", "model(...).logits", **inputs)


def phi():
    return randomised(PhiForCausalLM(PhiConfig(**COMMON)))


def bert():
    return randomised(BertForMaskedLM(BertConfig(**COMMON)))


@pytest.mark.parametrize("build", [phi, bert])
def test_a_bias_is_refused(build):
    refused(build(), ValueError, "bias", "model(...).logits")


@pytest.mark.parametrize("build", [bart, marian])
def test_a_final_bias_is_refused_unless_it_is_zero(build):
    model = build()
    assert not model.final_logits_bias.any()
    model.final_logits_bias[0, -1] = 1e-3
    refused(model, ValueError, "after its head", "bias")


@pytest.mark.parametrize(
    "build",
    [
        lambda: BertModel(BertConfig(**COMMON)),
        lambda: T5EncoderModel(T5Config(**T5)),
        lambda: GPT2ForSequenceClassification(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY)
        ),
    ],
)
def test_a_model_without_a_head_is_refused(build):
    model = build()
    refused(model, TypeError, type(model).__name__, "AutoModelForCausalLM")


def test_labels_are_refused():
    model = t5()
    inputs = {**batch(model), "labels": torch.ones(2, 4, dtype=torch.long)}
    refused(model, ValueError, "labels", "decoder_input_ids", **inputs)


class Int8Linear(nn.Linear):
    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight.to(hidden.dtype) / 64)


def test_quantised_heads_are_refused():
    model = llama()
    quantised = Int8Linear(16, VOCABULARY, bias=False)
    model.lm_head = quantised
    refused(model, TypeError, "Int8Linear", "quantised")
    model = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    refused(model, TypeError, "Int8Linear", "quantised")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        model = llama()
        weight = model.lm_head.weight.detach().to(dtype)
        model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
        refused(model, TypeError, str(dtype), "quantised")


def partitioned(weight):
    return nn.Parameter(weight.new_empty(0))


def flat_shard(weight):
    return nn.Parameter(weight.detach().flatten()[:100])


def offloaded(weight):
    return nn.Parameter(weight.detach().to("meta"))


@pytest.mark.parametrize("state", [partitioned, flat_shard, offloaded])
@pytest.mark.parametrize("lora", [False, True])
def test_a_weight_that_is_not_here_is_refused(state, lora):
    model = adapted(llama()) if lora else llama()
    head = model.get_output_embeddings()
    linear = head.base_layer if lora else head
    linear.weight = state(linear.weight)
    refused(model, ValueError, "partitioned or offloaded", "GatheredParameters")


@pytest.fixture
def process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_sharded_and_wrapped_models_are_refused():
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    model = llama()
    wrapper = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(TypeError, match=r"DistributedDataParallel.*let it wrap"):
        output_head(wrapper, **batch(model))
    mesh = init_device_mesh("cpu", (1,))
    shard = distribute_tensor(model.lm_head.weight.detach(), mesh)
    model.lm_head.weight = nn.Parameter(shard)
    refused(model, TypeError, "DTensor", "leave the head out of the sharding")


class OddLlama(LlamaForCausalLM):
    """A model whose logits are not what its head gave."""

    change = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        return dataclasses.replace(outputs, logits=self.change(outputs.logits))


def one_hot(token):
    return nn.functional.one_hot(torch.tensor(token), VOCABULARY).double()


def masked(logits):
    logits = logits.clone()
    logits[..., 17] = torch.finfo(logits.dtype).min
    return logits


CHANGES = {
    "bias": lambda z: z + 0.5,
    "bias of the first token": lambda z: z + 1e-9 * one_hot(0),
    "bias of the last token": lambda z: z + 1e-9 * one_hot(VOCABULARY - 1),
    "mask": masked,
    "normalised": lambda z: z.log_softmax(-1),
    "clamped": lambda z: z.clamp(-50, 50),
    "soft sign": lambda z: 30 * z / (30 + z.abs()),
    "only positive": lambda z: z.relu(),
    "column scale": lambda z: z * torch.linspace(1, 2, VOCABULARY),
    "position scale": lambda z: z * torch.linspace(1, 2, 7).double()[:, None],
    "example scale": lambda z: z * torch.tensor([1.0, 2.0]).double()[:, None, None],
    "padded": lambda z: nn.functional.pad(z, (0, 3)),
    "reversed": lambda z: z.flip(-1),
    "not finite": lambda z: z.half(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_any_other_change_of_the_logits_is_refused(change):
    model = randomised(OddLlama(LlamaConfig(**COMMON)))
    assert_same_logits(model)
    model.change = change
    refused(model, ValueError, "logits", "model(...).logits")


def test_a_hidden_rescaling_is_followed():
    """MuP-like models, and hooks, that change the input of the head."""
    model = llama()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] / 7,))
    assert_same_logits(model)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_head_that_is_not_called_once_is_refused(calls):
    model = llama()

    class Others(nn.Module):
        def forward(self, hidden):
            logits = hidden @ head.weight.T
            for _ in range(calls):
                logits = head(hidden)
            return logits

    head, model.lm_head = model.lm_head, Others()
    model.get_output_embeddings = lambda: head
    refused(model, ValueError, f"called its head {calls} times")


def test_an_embedding_as_the_head_is_refused():
    model = llama(tie=True)
    model.get_output_embeddings = model.get_input_embeddings
    refused(model, TypeError, "Embedding", "not known")


def test_a_forward_set_on_the_head_is_put_back():
    """Accelerate's device map sets one, for example."""
    model = llama()
    own = vars(model.lm_head)["forward"] = model.lm_head.forward
    assert_same_logits(model)
    assert model.lm_head.forward is own
