"""The decomposition, against two streams in float64 and against real ablation."""

import dataclasses
import math
from types import SimpleNamespace as Parts

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForTokenClassification,
)
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.t5 import modeling_t5

from ftlib.ctsft.ablation import label_logits, mean_ablated
from ftlib.ctsft.batches import margins
from ftlib.ctsft.decomposition import (
    OURS,
    PUBLISHED,
    Rules,
    head_means,
    propagate,
    scores,
    trace,
)
from ftlib.ctsft.heads import Head, all_heads

LAYERS, HEADS, WIDTH = 3, 4, 8
TOKENS = torch.tensor([0, 2, 1])
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MIXED = Rules("frozen", "split", True, "average")

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    **SPECIAL,
}
# Heads of 6 features, together 24 of 32, whose scores are not divided by √6; windows
# shorter than the texts, and two bases of RoPE that differ where texts are short.
GEMMA3 = {
    **LLAMA,
    "head_dim": 6,
    "query_pre_attn_scalar": 9,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 3.0},
        "full_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
BERT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_labels": 3,
    **SPECIAL,
}
GPT2 = {
    "vocab_size": 40,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 16,
    **SPECIAL,
}
# Heads of T5 need not have d_model / heads features: these have 6, together 24 of 32.
T5 = {
    "vocab_size": 40,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "num_labels": 3,
    "relative_attention_num_buckets": 8,
}

FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=6)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA3)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT)),
    "bert-tokens": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "t5": lambda: T5ForTokenClassification(T5Config(**T5)),
    "t5-gated": lambda: T5ForTokenClassification(
        T5Config(**T5, feed_forward_proj="gated-gelu")
    ),
}


def build(family, seed=0):
    """Return a model whose every weight matters, biases and norms' too."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().double().eval()
    for parameter in model.parameters():
        spread = 1 / math.sqrt(32) if parameter.ndim > 1 else 0.3
        centre = 1.0 if (parameter == 1).all() else 0.0
        parameter.data = centre + spread * torch.randn_like(parameter)
    return model


def batch(seed=0, lengths=(9, 6), labels=None):
    torch.manual_seed(seed)
    ids = torch.randint(3, 40, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def random_means(model, seed=1):
    torch.manual_seed(seed)
    attention = trace(model, batch()).architecture.blocks[0].attention
    return 0.1 * torch.randn(LAYERS, HEADS, attention.head_dim, dtype=torch.float64)


@pytest.fixture
def exact(monkeypatch):
    """Let transformers compute in float64 what it always computes in float32."""

    def rms_norm(self, x):
        mean_square = x.square().mean(-1, keepdim=True)
        return self.weight * x * (mean_square + self.variance_epsilon).rsqrt()

    def rms_norm_minus_one(self, x):
        mean_square = x.square().mean(-1, keepdim=True)
        return (1 + self.weight) * x * (mean_square + self.eps).rsqrt()

    def attention(module, query, key, value, attention_mask, scaling, **_):
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        scores = query @ key.mT * scaling + attention_mask
        probabilities = scores.softmax(-1)
        return (probabilities @ value).transpose(1, 2), probabilities

    monkeypatch.setattr(modeling_gemma3.Gemma3RMSNorm, "forward", rms_norm_minus_one)
    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", attention)
    for module, norm in (
        (modeling_llama, modeling_llama.LlamaRMSNorm),
        (modeling_qwen2, modeling_qwen2.Qwen2RMSNorm),
        (modeling_qwen3, modeling_qwen3.Qwen3RMSNorm),
        (modeling_t5, modeling_t5.T5LayerNorm),
    ):
        monkeypatch.setattr(norm, "forward", rms_norm)
        if module is not modeling_t5:
            monkeypatch.setattr(module, "eager_attention_forward", attention)


# --- the reference: two streams, from the rules as they are published -------------


def linear(module):
    """Return weight (out, in) and bias of nn.Linear."""
    return module.weight, module.bias


def conv1d(module, part=slice(None)):
    return module.weight.T[part], module.bias[part]


def norm(module):
    if isinstance(module, torch.nn.LayerNorm):
        return module.weight, module.bias, module.eps, "layer"
    if isinstance(module, modeling_gemma3.Gemma3RMSNorm):
        return 1 + module.weight, None, module.eps, "rms"
    return module.weight, None, module.variance_epsilon, "rms"


def gpt2_parts(model):
    def block(b):
        q, k, v = (conv1d(b.attn.c_attn, slice(i, i + 32)) for i in (0, 32, 64))
        return Parts(
            norm1=norm(b.ln_1),
            norm2=norm(b.ln_2),
            q=q,
            k=k,
            v=v,
            o=conv1d(b.attn.c_proj),
            up=conv1d(b.mlp.c_fc),
            gate=None,
            down=conv1d(b.mlp.c_proj),
            act=lambda x: F.gelu(x, approximate="tanh"),
            scale=8**-0.5,
            modules=b,
        )

    base = model.transformer
    head = [("norm", norm(base.ln_f)), ("linear", linear(model.lm_head))]
    return [block(b) for b in base.h], head, True, False


def llama_parts(model):
    def block(b):
        a, mlp = b.self_attn, b.mlp
        return Parts(
            norm1=norm(b.input_layernorm),
            norm2=norm(b.post_attention_layernorm),
            q=linear(a.q_proj),
            k=linear(a.k_proj),
            v=linear(a.v_proj),
            o=linear(a.o_proj),
            up=linear(mlp.up_proj),
            gate=linear(mlp.gate_proj),
            down=linear(mlp.down_proj),
            act=F.silu,
            scale=a.head_dim**-0.5,
            qk_norms=[norm(a.q_norm), norm(a.k_norm)] if hasattr(a, "q_norm") else None,
            modules=b,
        )

    base = model.model
    head = [("norm", norm(base.norm)), ("linear", linear(model.lm_head))]
    return [block(b) for b in base.layers], head, True, False


def gemma3_parts(model):
    def block(i, b):
        a, mlp = b.self_attn, b.mlp
        is_sliding = GEMMA3["layer_types"][i] == "sliding_attention"
        return Parts(
            norm1=norm(b.input_layernorm),
            norm2=norm(b.pre_feedforward_layernorm),
            attention_output_norm=norm(b.post_attention_layernorm),
            mlp_output_norm=norm(b.post_feedforward_layernorm),
            q=linear(a.q_proj),
            k=linear(a.k_proj),
            v=linear(a.v_proj),
            o=linear(a.o_proj),
            up=linear(mlp.up_proj),
            gate=linear(mlp.gate_proj),
            down=linear(mlp.down_proj),
            act=lambda x: F.gelu(x, approximate="tanh"),
            scale=9**-0.5,
            qk_norms=[norm(a.q_norm), norm(a.k_norm)],
            window=4 if is_sliding else None,
            rope_base=3.0 if is_sliding else 100.0,
            modules=b,
        )

    base = model.model
    head = [("norm", norm(base.norm)), ("linear", linear(model.lm_head))]
    return [block(i, b) for i, b in enumerate(base.layers)], head, True, False


def bert_parts(model):
    def block(b):
        a, out = b.attention.self, b.attention.output
        return Parts(
            norm1=norm(out.LayerNorm),
            norm2=norm(b.output.LayerNorm),
            q=linear(a.query),
            k=linear(a.key),
            v=linear(a.value),
            o=linear(out.dense),
            up=linear(b.intermediate.dense),
            gate=None,
            down=linear(b.output.dense),
            act=F.gelu,
            scale=8**-0.5,
            modules=b,
        )

    if hasattr(model, "classifier"):
        head = [
            ("linear", linear(model.bert.pooler.dense)),
            ("activation", torch.tanh),
            ("linear", linear(model.classifier)),
        ]
    else:
        transform = model.cls.predictions.transform
        head = [
            ("linear", linear(transform.dense)),
            ("activation", F.gelu),
            ("norm", norm(transform.LayerNorm)),
            ("linear", linear(model.cls.predictions.decoder)),
        ]
    return [block(b) for b in model.bert.encoder.layer], head, False, True


def t5_parts(model):
    def block(b):
        a, mlp = b.layer[0].SelfAttention, b.layer[1].DenseReluDense
        gated = hasattr(mlp, "wi_0")
        return Parts(
            norm1=norm(b.layer[0].layer_norm),
            norm2=norm(b.layer[1].layer_norm),
            q=linear(a.q),
            k=linear(a.k),
            v=linear(a.v),
            o=linear(a.o),
            up=linear(mlp.wi_1 if gated else mlp.wi),
            gate=linear(mlp.wi_0) if gated else None,
            down=linear(mlp.wo),
            act=(lambda x: F.gelu(x, approximate="tanh")) if gated else torch.relu,
            scale=1.0,
            modules=b,
        )

    stack = model.transformer.encoder
    head = [
        ("norm", norm(stack.final_layer_norm)),
        ("linear", linear(model.classifier)),
    ]
    return [block(b) for b in stack.block], head, False, False


class TwoStreams:
    """β and γ of one source, from the first layer on; every pair in ``seen``."""

    def __init__(self, model, rules):
        self.model, self.rules = model, rules
        kind = model.config.model_type
        parts = {
            "gpt2": gpt2_parts,
            "gemma3_text": gemma3_parts,
            "bert": bert_parts,
            "t5": t5_parts,
        }
        parts = parts.get(kind, llama_parts)(model)
        self.blocks, self.head, self.causal, self.post_norm = parts
        self.seen = {}

    def share(self, bias, rel, irrel):
        """Return the two parts of a bias."""
        if bias is None:
            return 0.0, 0.0
        if self.rules.bias == "irrelevant":
            return 0.0, bias
        whole = rel.abs() + irrel.abs()
        w = torch.where(whole == 0, 0, rel.abs() / whole)
        return w * bias, (1 - w) * bias

    def linear(self, x, parameters):
        weight, bias = parameters
        rel, irrel = (part @ weight.T for part in x)
        b_rel, b_irrel = self.share(bias, rel, irrel)
        return rel + b_rel, irrel + b_irrel

    def norm(self, x, parameters):
        weight, bias, eps, kind = parameters
        rel, irrel = x
        b_rel, b_irrel = self.share(bias, rel, irrel)
        total = rel + irrel
        if kind == "layer":
            scale = total.var(-1, unbiased=False, keepdim=True)
            rel, irrel = (part - part.mean(-1, keepdim=True) for part in x)
        else:
            scale = total.square().mean(-1, keepdim=True)
        scale = weight / (scale + eps).sqrt()
        return rel * scale + b_rel, irrel * scale + b_irrel

    def clean(self, x):
        if not self.rules.clean_up:
            return x
        rel, irrel = x
        total, opposite = rel + irrel, rel * irrel < 0
        is_larger = rel.abs() >= irrel.abs()
        return (
            torch.where(opposite, torch.where(is_larger, total, 0), rel),
            torch.where(opposite, torch.where(is_larger, 0, total), irrel),
        )

    def activation(self, f, *arguments):
        """Return the parts of f of several decomposed arguments."""
        rels, irrels = zip(*arguments, strict=True)
        total = f(*(a + b for a, b in arguments))
        if self.rules.mlp == "irrelevant_alone":
            irrel = f(*irrels)
            return total - irrel, irrel
        nothing = f(*(torch.zeros_like(part) for part in rels))
        rel = (total - f(*irrels) + f(*rels) - nothing) / 2
        return rel, total - rel

    def attention(self, x, b, mask):
        q, k, v = (self.linear(x, p) for p in (b.q, b.k, b.v))
        if self.rules.attention == "beta_softmax":
            self.note(q=q, k=k)
        self.note(v=v)
        width = len(b.q[0]) // HEADS
        q, k, v = ([part.unflatten(-1, (-1, width)) for part in y] for y in (q, k, v))
        if getattr(b, "qk_norms", None):
            q, k = (self.norm(y, n) for y, n in zip((q, k), b.qk_norms, strict=True))
        if (turns := self.turns(b, x[0], width)) is not None:
            cos, sin = (y[:, :, None] for y in turns)
            q, k = ([self.rotate(p, cos, sin) for p in y] for y in (q, k))
        k, v = (
            [part.repeat_interleave(HEADS // part.shape[2], 2) for part in y]
            for y in (k, v)
        )

        def probabilities(q, k):
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * b.scale
            return (scores + mask).softmax(-1)

        def gather(a, v):
            return torch.einsum("bhqk,bkhd->bqhd", a, v).flatten(-2)

        a = probabilities(sum(q), sum(k))
        if self.rules.attention == "frozen":
            return gather(a, v[0]), gather(a, v[1])
        rel = gather(probabilities(q[0], k[0]), v[0])
        return rel, gather(a, sum(v)) - rel

    def turns(self, b, x, width):
        """Return the cosines and sines of RoPE, (1, T, width)."""
        positions = torch.arange(x.shape[1])[None]
        if hasattr(b, "rope_base"):
            # In float32, rounded where transformers rounds.
            frequencies = 1 / b.rope_base ** (torch.arange(0, width, 2) / width)
            angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
            return angles.cos().double(), angles.sin().double()
        rotary = getattr(self.base(), "rotary_emb", None)
        return None if rotary is None else rotary(x, positions)

    @staticmethod
    def rotate(x, cos, sin):
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * cos + turned * sin

    def base(self):
        return self.model.base_model

    def mask(self, inputs):
        allowed = inputs["attention_mask"].bool()[:, None, None]
        if self.causal:
            length = allowed.shape[-1]
            allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(allowed.shape, dtype=torch.float64)
        mask = mask.masked_fill(~allowed, -torch.inf)
        if self.model.config.model_type == "t5":
            first = self.blocks[0].modules.layer[0].SelfAttention
            length = allowed.shape[-1]
            mask = mask + first.compute_bias(length, length)
        return mask

    def windowed(self, b, mask):
        """Return the mask of a block, which may look back only so far."""
        if (window := getattr(b, "window", None)) is None:
            return mask
        places = torch.arange(mask.shape[-1])
        too_far = places[:, None] - places >= window
        return mask.masked_fill(too_far, -torch.inf)

    def update(self, b, part, x):
        """Return what is added to the stream: behind a norm, if there is one."""
        self.note(**{part: x})
        name = f"{part}_output_norm"
        if hasattr(b, name):
            x = self.norm(x, getattr(b, name))
            self.note(**{name: x})
        return x

    def note(self, **pairs):
        for part, pair in pairs.items():
            self.seen[self.layer, part] = pair

    def block(self, b, x, mask, mean):
        h = x if self.post_norm else self.norm(x, b.norm1)
        if not self.post_norm:
            self.note(attention_norm=h)
        z = self.attention(h, b, self.windowed(b, mask))
        if self.layer == self.source.layer:
            total = z[0] + z[1]
            width = total.shape[-1] // HEADS
            here = slice(self.source.index * width, (self.source.index + 1) * width)
            z = (z[0].clone(), z[1].clone())
            z[0][..., here] = total[..., here] - mean
            z[1][..., here] = mean
        self.note(z=z)
        o = self.update(b, "attention", self.linear(z, b.o))
        x = (x[0] + o[0], x[1] + o[1])
        h = self.norm(x, b.norm1 if self.post_norm else b.norm2)
        x = h if self.post_norm else x
        self.note(middle=x)
        if not self.post_norm:
            self.note(mlp_norm=h)
        up = self.clean(self.linear(h, b.up))
        self.note(up=up)
        if b.gate is None:
            inner = self.activation(b.act, up)
        else:
            gate = self.clean(self.linear(h, b.gate))
            self.note(gate=gate)
            inner = self.activation(lambda g, u: b.act(g) * u, gate, up)
        down = self.update(b, "mlp", self.clean(self.linear(inner, b.down)))
        x = self.clean((x[0] + down[0], x[1] + down[1]))
        x = self.norm(x, b.norm2) if self.post_norm else x
        self.note(output=x)
        return x

    @torch.no_grad()
    def run(self, inputs, source, mean, positions):
        """Return β and γ of all logits at one position of each example."""
        self.source = source
        embeddings = []
        first = self.blocks[0].modules
        hook = first.register_forward_pre_hook(
            lambda _, args: embeddings.append(args[0])
        )
        self.base()(**inputs)
        hook.remove()
        x = (torch.zeros_like(embeddings[0]), embeddings[0])
        mask = self.mask(inputs)
        for layer, b in enumerate(self.blocks):
            self.layer = layer
            x = self.block(b, x, mask, mean)
        x = [part[torch.arange(len(part)), positions] for part in x]
        for kind, parameters in self.head:
            x = getattr(self, kind)(
                *((parameters, x) if callable(parameters) else (x, parameters))
            )
        return x


def all_rules():
    return {
        "published": PUBLISHED,
        "ours": OURS,
        "mixed": MIXED,
        "average": dataclasses.replace(OURS, mlp="average", attention="beta_softmax"),
    }


def read_positions(model, inputs):
    if model.config.model_type == "bert" and hasattr(model, "classifier"):
        return torch.zeros(2, dtype=torch.long)
    return inputs["attention_mask"].sum(-1) - 1


def unpadded(tensor, mask):
    """Return what stands at tokens; the last block has nothing else anyway."""
    return tensor[..., mask, :] if tensor.dim() > 2 else tensor


@pytest.mark.parametrize("rules", all_rules().values(), ids=all_rules())
@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_is_that_of_two_streams(family, rules, exact):
    model, inputs = build(family), batch()
    means = random_means(model)
    sources = [Head(2, 1), Head(0, 3), Head(1, 0)]
    shown = []
    found = propagate(
        trace(model, inputs),
        sources,
        means,
        TOKENS,
        rules=rules,
        watch=lambda site, beta: shown.append((site, beta.clone())),
    )
    plain = label_logits(model, inputs, TOKENS)
    torch.testing.assert_close(found.total, plain, rtol=1e-10, atol=1e-10)
    positions = read_positions(model, inputs)
    mask = inputs["attention_mask"].bool()
    for i, source in enumerate(sources):
        reference = TwoStreams(model, rules)
        rel, irrel = reference.run(inputs, source, means[source], positions)
        beta = found.relevant[i]
        torch.testing.assert_close(beta, rel[:, TOKENS], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            beta + irrel[:, TOKENS], plain, rtol=1e-10, atol=1e-10
        )
        seen = 0
        for site, betas in shown:
            if source not in site.sources:
                assert site.layer < source.layer or site.part in (
                    *("attention_norm", "q", "k", "v"),
                )
                continue
            rel, irrel = reference.seen[site.layer, site.part]
            if betas.dim() == 3:
                rel = rel[torch.arange(len(rel)), positions]
                beta = betas[site.sources.index(source)]
            else:
                rel = rel[mask]
                beta = betas[site.sources.index(source)][mask]
            torch.testing.assert_close(beta, rel, rtol=1e-9, atol=1e-11, msg=str(site))
            seen += 1
        # All that comes at the source's layer and behind it was looked at.
        ahead = [key for key in reference.seen if key[0] > source.layer]
        own = [key for key in reference.seen if key[0] == source.layer]
        begins = [p for _, p in own if p in ("attention_norm", "q", "k", "v")]
        assert seen == len(ahead) + len(own) - len(begins)


@pytest.mark.parametrize("rules", [PUBLISHED, OURS], ids=["published", "ours"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_the_parts_add_up_to_the_plain_activations(family, rules):
    model, inputs = build(family), batch()
    means, source = random_means(model), Head(0, 2)
    reference = TwoStreams(model, rules)
    positions = read_positions(model, inputs)
    irrel = reference.run(inputs, source, means[source], positions)[1]
    model.float()
    traced = trace(model, inputs)
    sums = {}

    def add(site, betas):
        gamma = reference.seen[site.layer, site.part][1]
        if betas.dim() == 3:
            gamma = gamma[torch.arange(len(gamma)), positions]
        sums[site.layer, site.part] = betas[0] + gamma

    found = propagate(traced, [source], means, TOKENS, rules=rules, watch=add)
    plain = label_logits(model, inputs, TOKENS).double()
    total = found.relevant[0] + irrel[:, TOKENS]
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-5)
    parts = traced.architecture
    following = [*(b.attention_norm for b in parts.blocks[1:]), parts.final_norm]
    for layer, block in enumerate(parts.blocks):
        recorded = {
            "z": traced.z[layer],
            "attention": traced.outputs[block.attention.o.module],
            "up": traced.outputs[block.mlp.up.module],
            "mlp": traced.outputs[block.mlp.down.module],
        }
        if not parts.is_post_norm:
            recorded["middle"] = traced.norm_inputs[block.mlp_norm.module]
            recorded["output"] = traced.norm_inputs[following[layer].module]
        for part, expected in recorded.items():
            if layer == LAYERS - 1 and part != "z":
                expected = expected[torch.arange(2), positions]
            else:
                expected = expected[inputs["attention_mask"].bool()]
                sums[layer, part] = sums[layer, part][inputs["attention_mask"].bool()]
            scale = expected.abs().max().item()
            torch.testing.assert_close(
                sums[layer, part], expected.double(), rtol=0, atol=1e-5 * max(1, scale)
            )


# --- what holds for any rules ------------------------------------------------------


@pytest.mark.parametrize("rules", [PUBLISHED, OURS, MIXED], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma3", "bert"])
def test_nothing_is_relevant_before_the_source(family, rules):
    model, inputs = build(family), batch()
    source, means = Head(2, 1), random_means(model)
    reference = TwoStreams(model, rules)
    reference.run(inputs, source, means[source], read_positions(model, inputs))
    before = [rel for (layer, _), (rel, _) in reference.seen.items() if layer < 2]
    assert len(before) >= 14
    assert all((rel == 0).all() for rel in before)
    sites = []
    propagate(
        trace(model, inputs),
        [source, Head(1, 0)],
        means,
        TOKENS,
        rules=rules,
        watch=lambda site, beta: sites.append((site, beta)),
    )
    assert min(site.layer for site, _ in sites) == 1
    others = 0
    for site, beta in sites:
        assert len(beta) == len(site.sources)
        if source in site.sources:
            assert site.layer == 2
        if site.part == "z" and site.layer == 2:
            z = beta[site.sources.index(source)].unflatten(-1, (HEADS, -1))
            others = z[..., [0, 2, 3], :]
            assert z[..., 1, :].abs().max() > 0.01
    assert (others == 0).all()


@pytest.mark.parametrize("rules", [PUBLISHED, OURS], ids=["published", "ours"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sources_together_are_sources_one_by_one(family, rules):
    model = build(family)
    traced, means = trace(model, batch()), random_means(model)
    sources = all_heads(model)[::-1]
    together = propagate(traced, sources, means, TOKENS, rules=rules).relevant
    for memory in (1, 80_000):
        at_once = []
        few = propagate(
            traced,
            sources,
            means,
            TOKENS,
            rules=rules,
            memory=memory,
            watch=lambda site, beta, seen=at_once: seen.append(len(beta)),
        )
        assert 1 <= max(at_once) < (2 if memory == 1 else len(sources))
        torch.testing.assert_close(few.relevant, together, rtol=1e-10, atol=1e-12)
    one = propagate(traced, [Head(1, 2)], means, TOKENS, rules=rules).relevant[0]
    index = sources.index(Head(1, 2))
    torch.testing.assert_close(one, together[index], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rules", [PUBLISHED, OURS], ids=["published", "ours"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bert"])
def test_padding_changes_nothing_on_either_side(family, rules, exact):
    model = build(family)
    right = batch(lengths=(9, 5))
    left = {name: value.clone() for name, value in right.items()}
    for name, value in right.items():
        left[name][1] = value[1].roll(4)
    alone = {name: value[1:, :5] for name, value in right.items()}
    means = random_means(model)

    def of(inputs):
        traced = trace(model, inputs)
        return propagate(traced, all_heads(model), means, TOKENS, rules=rules)

    expected = of(alone)
    for inputs in (left, right):
        found = of(inputs)
        torch.testing.assert_close(
            found.relevant[:, 1:], expected.relevant, rtol=1e-8, atol=1e-10
        )
        torch.testing.assert_close(
            found.total[1:], expected.total, rtol=1e-8, atol=1e-10
        )
    labels = torch.tensor([0, 1])
    for inputs in (left, right):
        found = head_means(model, [(inputs, labels)], classes=2)
        torch.testing.assert_close(
            found,
            head_means(model, [(right, labels)], classes=2),
            rtol=1e-8,
            atol=1e-10,
        )


# --- where theory says that it is exact --------------------------------------------


class FrozenNorm:
    """A norm that goes on dividing by what it divided by before."""

    def __init__(self, module):
        self.module, self.scale = module, None

    def __call__(self, x):
        weight, bias, eps, kind = norm(self.module)
        x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        if self.scale is None:
            self.scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = x * self.scale * weight
        return normed if bias is None else normed + bias


class FrozenAttention:
    """An attention that goes on looking where each layer looked before."""

    def __init__(self, attend):
        self.attend, self.probabilities = attend, {}

    def __call__(self, module, query, key, value, mask, **options):
        if module not in self.probabilities:
            out = self.attend(module, query, key, value, mask, **options)
            self.probabilities[module] = out[1]
        probabilities = self.probabilities[module]
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (probabilities @ value).transpose(1, 2), probabilities


def linear_gpt2(mlp):
    """Return a GPT-2 whose MLP is 0, or is linear where it is used."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**GPT2, activation_function="relu"))
    model.set_attn_implementation("eager")
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
        if name.endswith("c_fc.bias"):
            parameter.data += 30.0
        if name.endswith("mlp.c_proj.weight") and mlp == "zero":
            parameter.data.zero_()
    return model


def gemma3_without_mlp():
    model = build("gemma3")
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    return model


@pytest.mark.parametrize(
    ("make", "modeling", "freezes_attention", "first"),
    [
        (lambda: linear_gpt2("zero"), modeling_gpt2, False, 2),
        (lambda: linear_gpt2("linear"), modeling_gpt2, False, 2),
        (lambda: linear_gpt2("linear"), modeling_gpt2, True, 0),
        (gemma3_without_mlp, modeling_gemma3, False, 2),
        (gemma3_without_mlp, modeling_gemma3, True, 0),
    ],
    ids=[
        "GPT-2, last layer, no MLP",
        "GPT-2, last layer, linear MLP",
        "GPT-2, all frozen, linear MLP",
        "Gemma 3, last layer, no MLP",
        "Gemma 3, all frozen, no MLP",
    ],
)
def test_it_is_the_ablation_where_the_rest_of_the_network_is_linear(
    make, modeling, freezes_attention, first, monkeypatch, exact
):
    """With norms frozen and a linear MLP, in the last layer or with frozen attention.

    Then the logits are an affine function of the source's z, and the rules of ours
    apply its linear part to z − μ, which is what replacing z by μ takes away.
    """
    model, inputs = make(), batch()
    means = random_means(model)
    sources = [head for head in all_heads(model) if head.layer >= first]
    traced = trace(model, inputs)
    found = propagate(traced, sources, means, TOKENS, rules=OURS).relevant
    unfrozen = label_logits(model, inputs, TOKENS)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            monkeypatch.setattr(module, "forward", FrozenNorm(module))
    if freezes_attention:
        frozen = FrozenAttention(modeling.eager_attention_forward)
        monkeypatch.setattr(modeling, "eager_attention_forward", frozen)
    whole = label_logits(model, inputs, TOKENS)
    torch.testing.assert_close(whole, unfrozen, rtol=1e-9, atol=1e-9)
    for source, contribution in zip(sources, found, strict=True):
        with mean_ablated(model, [source], means):
            effect = whole - label_logits(model, inputs, TOKENS)
        assert effect.abs().max() > 1e-4
        torch.testing.assert_close(contribution, effect, rtol=1e-7, atol=1e-11)


def correlations(model, seed):
    """Return how contributions to the margin and real effects of heads correlate.

    Over heads and examples, for the published rules and for ours.
    """
    inputs, labels = batch(seed, (9,) * 6), torch.arange(6) % 3
    means = head_means(model, [(inputs, labels)], classes=3)
    whole = margins(label_logits(model, inputs, TOKENS), labels)
    effects = []
    for head in all_heads(model):
        with mean_ablated(model, [head], means):
            left = margins(label_logits(model, inputs, TOKENS), labels)
        effects.append(whole - left)
    traced, found = trace(model, inputs), []
    for rules in (PUBLISHED, OURS):
        beta = propagate(traced, all_heads(model), means, TOKENS, rules=rules).relevant
        pair = torch.stack([margins(beta, labels), torch.stack(effects)])
        found.append(torch.corrcoef(pair.flatten(1))[0, 1])
    return torch.stack(found)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma3", "bert"])
def test_our_rules_agree_better_with_ablation_than_the_published(family):
    """On random weights: a caution, not a verdict on trained models."""
    found = [correlations(build(family, seed).float(), seed) for seed in range(3)]
    published, ours = torch.stack(found).mean(0)
    assert ours > 0.75
    assert ours > published + 0.2


# --- means and scores -----------------------------------------------------------------


def test_means_count_each_label_the_same():
    model = build("gpt2")
    inputs, labels = batch(lengths=(9, 6, 4, 7)), torch.tensor([0, 0, 1, 0])
    traced = trace(model, inputs)
    z = torch.stack(traced.z, 2).unflatten(-1, (HEADS, -1))
    mask = inputs["attention_mask"].bool()
    tokens = [z[i][mask[i]] for i in range(4)]
    first, second = torch.cat([tokens[0], tokens[1], tokens[3]]), tokens[2]
    expected = (first.mean(0) + second.mean(0)) / 2
    halves = [
        ({name: value[i : i + 2] for name, value in inputs.items()}, labels[i : i + 2])
        for i in (0, 2)
    ]
    for batches in ([(inputs, labels)], halves):
        found = head_means(model, batches, classes=2)
        assert found.shape == (LAYERS, HEADS, WIDTH)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_scores_are_balanced_margins_of_the_contributions(family):
    model, means = build(family), random_means(build(family))
    inputs, labels = batch(lengths=(9, 6, 4, 7)), torch.tensor([1, 0, 2, 1])
    traced = trace(model, inputs)
    beta = propagate(traced, all_heads(model), means, TOKENS).relevant
    right = beta[:, torch.arange(4), labels]
    others = torch.stack(
        [beta[:, torch.arange(4), (labels + i) % 3] for i in (1, 2)]
    ).mean(0)
    r = right - others
    expected = ((r[:, 0] + r[:, 3]) / 2 + r[:, 1] + r[:, 2]) / 3
    found = scores(model, [(inputs, labels)], means, TOKENS)
    assert found.shape == (LAYERS, HEADS)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-9, atol=1e-12)


def test_a_classifier_of_a_decoder_reads_its_last_token():
    torch.manual_seed(0)
    model = GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=3)).double()
    inputs = batch()
    found = propagate(
        trace(model, inputs), [Head(0, 0)], random_means(model), torch.arange(3)
    )
    torch.testing.assert_close(
        found.total, model.eval()(**inputs).logits, rtol=1e-10, atol=1e-10
    )


def test_positions_of_the_logits_can_be_given():
    model, inputs = build("bert-tokens"), batch()
    positions = torch.tensor([3, 1])
    traced = trace(model, inputs, positions)
    found = propagate(traced, [Head(0, 1)], random_means(model), TOKENS)
    expected = model(**inputs).logits[torch.arange(2), positions][:, TOKENS]
    torch.testing.assert_close(found.total, expected, rtol=1e-10, atol=1e-10)


def test_without_tokens_only_the_heads_are_reached():
    model = GPT2Model(GPT2Config(**GPT2)).double()
    sites = []
    found = propagate(
        trace(model, batch()),
        [Head(0, 1)],
        random_means(model),
        torch.tensor([], dtype=torch.long),
        watch=lambda site, beta: sites.append((site.layer, site.part, beta.shape)),
    )
    assert found.relevant.shape == (1, 2, 0)
    assert sites[-1] == (2, "z", (1, 2, 9, 32))


def test_bf16_models_are_decomposed_in_bf16():
    model, inputs = build("qwen2"), batch()
    means = random_means(model)
    sources = all_heads(model)
    expected = propagate(trace(model, inputs), sources, means, TOKENS).relevant
    model.bfloat16()
    found = propagate(trace(model, inputs), sources, means, TOKENS).relevant
    assert found.dtype == torch.bfloat16
    error = (found - expected).norm() / expected.norm()
    assert error < 0.05


# --- the model is left as it was ------------------------------------------------------


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks, *module._forward_pre_hooks)
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = build("gpt2")
    model.set_attn_implementation("sdpa")
    model.train()
    model.transformer.h[1].eval()
    if fails:
        model.transformer.ln_f.weight.data = torch.ones(5, dtype=torch.float64)
        with pytest.raises(RuntimeError):
            trace(model, batch())
    else:
        trace(model, batch())
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert not model.transformer.h[1].mlp.training
    assert not hooks_of(model)


def test_dropout_is_off():
    model = GPT2LMHeadModel(GPT2Config(**GPT2)).train()
    first, second = (trace(model, batch()).last_hidden for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad


# --- what goes wrong ------------------------------------------------------------------


def test_sources_must_exist():
    model = build("gpt2")
    traced, means = trace(model, batch()), random_means(model)
    with pytest.raises(ValueError, match="no sources"):
        propagate(traced, [], means, TOKENS)
    with pytest.raises(ValueError, match=r"no Head\(layer=3, index=0\).*3 layers of 4"):
        propagate(traced, [Head(0, 0), Head(3, 0)], means, TOKENS)


def test_means_must_be_of_the_model():
    model = build("gpt2")
    with pytest.raises(ValueError, match=r"means have shape \(2, 4, 8\), not \(3, 4"):
        propagate(trace(model, batch()), [Head(0, 0)], torch.zeros(2, 4, 8), TOKENS)


def test_logits_take_a_head():
    model = GPT2Model(GPT2Config(**GPT2))
    with pytest.raises(ValueError, match="GPT2Model has no head"):
        propagate(trace(model, batch()), [Head(0, 0)], torch.zeros(3, 4, 8), TOKENS)


@pytest.mark.parametrize("name", ["attention", "bias", "mlp"])
def test_rules_have_names(name):
    with pytest.raises(ValueError, match=f"{name} is 'linear'"):
        Rules(**{name: "linear"})


def test_every_label_needs_an_example():
    model, means = build("gpt2"), random_means(build("gpt2"))
    batches = [(batch(), torch.tensor([0, 2]))]
    with pytest.raises(ValueError, match="no example has label 1"):
        head_means(model, batches, classes=3)
    with pytest.raises(ValueError, match="no example has label 1"):
        scores(model, batches, means, TOKENS)
    with pytest.raises(ValueError, match="label 2, but there are 2 labels"):
        head_means(model, batches, classes=2)
    with pytest.raises(ValueError, match="labels run from 0 to 2"):
        scores(model, batches, means, TOKENS[:2])


def test_a_margin_is_between_labels():
    with pytest.raises(ValueError, match="two or more"):
        margins(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))


def test_activations_that_are_no_numbers_are_refused():
    model, inputs = build("qwen2"), batch()
    model.model.layers[1].mlp.down_proj.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"not finite.*left padding in float64"):
        trace(model, inputs)


def test_logits_are_not_read_from_padding():
    inputs = batch()
    with pytest.raises(ValueError, match="where it has no token"):
        trace(build("gpt2"), inputs, torch.tensor([8, 8]))
    left = {name: value.flip(1) for name, value in inputs.items()}
    with pytest.raises(ValueError, match="pad on the right"):
        trace(build("bert"), left)


def test_batches_need_tokens():
    model = build("gpt2")
    with pytest.raises(ValueError, match="needs input_ids"):
        trace(model, {"inputs_embeds": torch.zeros(1, 2, 32)})
    inputs = batch()
    inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="has no token"):
        trace(model, inputs)
