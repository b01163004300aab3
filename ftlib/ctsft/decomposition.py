r"""Contextual decomposition of transformers (CD-T), with one stream.

What does an attention head contribute to the logits? CD-T (Hsu et al., arXiv
2407.00886) writes every activation as t = β + γ, relevant and irrelevant to a *source*,
and has a rule for each module that keeps the sum. A source here is a whole head s, at
all positions: behind its attention, and before the output projection, β_z = z_s − μ_s
and γ_z = μ_s, with μ_s the head's mean over data. The β that arrives at a logit is what
the head adds to it, compared with being replaced by its mean, if the rules are right.

Since γ = t − β, and t is the plain activation whatever the source is, only β is
carried. One pass of the model stores t (:func:`trace`), and all sources share it. A
source's β is 0 before its layer, so that its work begins there; and behind the last
attention only the position that the logits are read at is followed.

The rules are choices (:class:`Rules`), of which two sets have names: :data:`PUBLISHED`,
as the released code for GPT-2 has them, and :data:`OURS`, which on small networks of
random weights agrees best with real ablation (:mod:`ftlib.ctsft.ablation`). That β and
γ add up to t shows only that nothing was lost: any rules do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ftlib.ctsft.architectures import (
    MLP,
    Architecture,
    Attention,
    Block,
    Norm,
    Projection,
    describe,
)
from ftlib.ctsft.batches import (
    BalancedMean,
    Inputs,
    LabelledBatch,
    complete,
    evaluating,
    last_positions,
    margins,
)
from ftlib.ctsft.heads import Head, all_heads, check_heads
from ftlib.ops.decomposition import (
    BiasRule,
    decomposed_activation,
    decomposed_gate,
    decomposed_linear,
    decomposed_norm,
    relevant_epilogue_,
)

AttentionRule = Literal["beta_softmax", "frozen"]
MLPRule = Literal["irrelevant_alone", "average"]

MEMORY = 2**30


@dataclass(frozen=True)
class Rules:
    r"""How modules that are not linear divide what they give.

    Where a norm divides by the spread of t, both parts are divided by it, under all
    rules (:func:`ftlib.ops.decomposed_norm`).

    Attributes:
        attention: ``frozen``: the probabilities A are the model's own, β_z = A β_v, as
            in the simpler examples of the released code. ``beta_softmax``: β_z =
            softmax(scale · β_q β_kᵀ + mask) β_v, and all cross terms are irrelevant, as
            in its path for GPT-2. T5's relative position bias, which that code has not,
            counts as part of the mask.
        bias: ``split``: a bias b is shared in proportion,
            ``b ⊙ |Wβ| / (|Wβ| + |Wγ|)``, as published. ``irrelevant``: it goes to γ,
            since it is there without the source.
        clean_up: whether signs are cleaned up, as in the released path for GPT-2:
            behind each linear layer of the MLP and behind the block's last sum, where β
            and γ have opposite signs, the smaller becomes 0 and the larger t.
        mlp: of activations, in the head too. ``irrelevant_alone``: β' = f(t) − f(γ),
            as published; and for a gated MLP f(g)u − f(γ_g)γ_u, our reconstruction.
            ``average``: β' = ½ (f(t) − f(γ) + f(β) − f(0)), the mean over both orders
            of adding β and γ, as in the first contextual decomposition (Murdoch et al.,
            arXiv 1801.05453).
    """

    attention: AttentionRule = "frozen"
    bias: BiasRule = "irrelevant"
    clean_up: bool = False
    mlp: MLPRule = "irrelevant_alone"

    def __post_init__(self) -> None:
        for name, choices in (
            ("attention", AttentionRule),
            ("bias", BiasRule),
            ("mlp", MLPRule),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: choose from"
                    f" {', '.join(get_args(choices))}"
                )


PUBLISHED = Rules("beta_softmax", "split", True, "irrelevant_alone")
"""The path for GPT-2 in the released code, which its paper's results come from."""

OURS = Rules("frozen", "irrelevant", False, "irrelevant_alone")
"""The rules that agree best with real ablation."""


class Site(NamedTuple):
    """Where a relevant part is seen on its way.

    Attributes:
        layer: of the block.
        part: ``attention_norm``, ``q``, ``k``, ``v``, ``z``, ``attention``,
            ``attention_output_norm``, ``middle`` (the stream behind the attention;
            behind its norm under post-norm), ``mlp_norm``, ``up``, ``gate``, ``mlp``,
            ``mlp_output_norm`` or ``output`` (the stream that enters the next layer).
            ``q`` and ``k`` are there under ``beta_softmax``, before norm and rotation.
        sources: to whom the first dimension belongs.
    """

    layer: int
    part: str
    sources: tuple[Head, ...]


Watch = Callable[[Site, Tensor], None]
"""Sees β, (S, B, T, features); in the last block behind ``z``, (S, B, features)."""


class Relevance(NamedTuple):
    """What sources contribute to logits.

    Attributes:
        relevant: β of the logits, (sources, B, tokens).
        total: the logits themselves, (B, tokens).
    """

    relevant: Tensor
    total: Tensor


# --- what all sources share ------------------------------------------------------


class _Attended(NamedTuple):
    """What an attention did in the plain pass.

    Attributes:
        probabilities: (B, heads, T, T).
        score_bias: added to the scores, mask and position bias; (B or 1, heads or 1, T,
            T), or None.
        rotary: cosines and sines, (B or 1, T, head_dim) each, or None.
    """

    probabilities: Tensor
    score_bias: Tensor | None
    rotary: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Trace:
    """The plain activations of a batch; B examples, T positions.

    Attributes:
        architecture: of the model.
        mask: which positions have a token, (B, T), bool. What stands at the others is
            read by nobody.
        positions: where the logits of each example are read, int64 (B,).
        norm_inputs: of each norm of the blocks, (B, T, features).
        outputs: of each linear layer of the blocks, (B, T, features).
        z: of each layer, what the heads gathered, (B, T, heads · head_dim).
        attended: of each layer.
        last_hidden: behind the last block and its norm, (B, T, features).
    """

    architecture: Architecture
    mask: Tensor
    positions: Tensor
    norm_inputs: dict[nn.Module, Tensor]
    outputs: dict[nn.Module, Tensor]
    z: tuple[Tensor, ...]
    attended: tuple[_Attended, ...]
    last_hidden: Tensor


def trace(model: Any, inputs: Inputs, positions: Tensor | None = None) -> Trace:
    """Run a model once, in evaluation mode, and keep what all sources share.

    Args:
        model: see :func:`ftlib.ctsft.architectures.describe`.
        inputs: ``input_ids`` (B, T), ``attention_mask``, and what else the model
            takes. Padding may be on either side; positions are counted from each
            example's first token, unless ``position_ids`` are given.
        positions: where to read each example's logits, int64 (B,). By default the last
            token, or the first position for a head that reads that one.

    Raises:
        ValueError: the model or the batch is not supported, or its activations are not
            finite.
    """
    parts = describe(model)
    inputs = complete(model, inputs)
    mask = inputs["attention_mask"].bool()
    if positions is None:
        first = torch.zeros_like(mask[:, 0], dtype=torch.long)
        positions = first if parts.reads_first else last_positions(mask)
    positions = positions.to(mask.device)
    if not mask.gather(1, positions[:, None]).all():
        raise ValueError(
            "the logits of an example would be read where it has no token: give other"
            " positions, or pad on the right if the head reads the first one"
        )
    with evaluating(model), _eager_attention(parts.base), _Recorder(parts) as seen:
        last_hidden = parts.base(**inputs).last_hidden_state
    _check_finite(last_hidden[mask])
    attentions = [block.attention for block in parts.blocks]
    return Trace(
        parts,
        mask,
        positions,
        seen.inputs,
        seen.outputs,
        tuple(seen.inputs[attention.o.module] for attention in attentions),
        tuple(seen.attended[attention.module] for attention in attentions),
        last_hidden,
    )


def _check_finite(hidden: Tensor) -> None:
    if not hidden.isfinite().all():
        raise ValueError(
            "the model's activations are not finite. float16 overflows in some models,"
            " and left padding in float64 makes transformers' Llama divide 0 by 0: try"
            " float32"
        )


@contextmanager
def _eager_attention(base: Any) -> Iterator[None]:
    """Have attentions return their probabilities, which fused ones never form."""
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(before)


class _Recorder:
    """Keeps what goes into and comes out of the modules of the blocks, in one pass."""

    def __init__(self, parts: Architecture) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        self.attended: dict[nn.Module, _Attended] = {}
        self._parts = parts
        self._hooks = ExitStack()

    def __enter__(self) -> _Recorder:
        with ExitStack() as hooks:
            for block in self._parts.blocks:
                self._watch_block(hooks, block)
            if (norm := self._parts.final_norm) is not None:
                self._watch(hooks, norm.module, self._keep_input)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _watch_block(self, hooks: ExitStack, block: Block) -> None:
        a, mlp = block.attention, block.mlp
        for norm in (block.attention_norm, block.mlp_norm):
            self._watch(hooks, norm.module, self._keep_input)
        linear = [a.q, a.k, a.v, a.o, mlp.up, mlp.down, *([mlp.gate] * bool(mlp.gate))]
        for module in {projection.module for projection in linear if projection}:
            self._watch(hooks, module, self._keep_output)
        self._watch(hooks, a.o.module, self._keep_input)

        def keep_attention(
            module: nn.Module, _: Any, kwargs: dict[str, Any], output: Any
        ) -> None:
            self.attended[module] = _attended(a, kwargs, output)

        handle = a.module.register_forward_hook(keep_attention, with_kwargs=True)
        hooks.callback(handle.remove)

    def _watch(self, hooks: ExitStack, module: nn.Module, keep: Any) -> None:
        hooks.callback(module.register_forward_hook(keep).remove)

    def _keep_input(self, module: nn.Module, args: tuple[Tensor], _: Tensor) -> None:
        self.inputs[module] = args[0]

    def _keep_output(self, module: nn.Module, _: Any, output: Tensor) -> None:
        self.outputs[module] = output


def _attended(attention: Attention, kwargs: dict[str, Any], output: Any) -> _Attended:
    # T5 calls its mask by another name, and makes the position bias by itself.
    bias = kwargs.get("attention_mask", kwargs.get("mask"))
    if attention.position_bias is not None:
        position_bias = output[attention.position_bias]
        bias = position_bias if bias is None else bias + position_bias
    rotary = kwargs.get("position_embeddings")
    return _Attended(output[attention.probabilities], bias, rotary)


# --- one source after another ----------------------------------------------------


@torch.no_grad()
def propagate(
    traced: Trace,
    sources: Sequence[Head],
    means: Tensor,
    token_ids: Tensor,
    *,
    rules: Rules = OURS,
    memory: int = MEMORY,
    watch: Watch | None = None,
) -> Relevance:
    """Return what each source contributes to some logits of each example.

    Args:
        traced: the batch.
        sources: heads, each over all positions.
        means: μ of every head, (layers, heads, head_dim); see :func:`head_means`.
        token_ids: which logits, int64 (V',), token ids or labels; the others are never
            formed. If empty, the work ends at the last heads.
        rules: what each module does.
        memory: bytes that the relevant parts of the sources that are worked on at a
            time may take, roughly; one source is always worked on.
        watch: is shown β at every site. In the last block, β behind ``z`` is there only
            at the positions whose logits are read.

    Returns:
        The contributions in the order of the sources, with the logits.

    Raises:
        ValueError: there are no sources, the model has no such head or no logits, or
            the means do not fit.
    """
    parts = traced.architecture
    _check(parts, sources, means, token_ids)
    order = sorted(range(len(sources)), key=lambda i: sources[i])
    size = max(1, memory // _bytes_per_source(traced))
    found = []
    for start in range(0, len(order), size):
        chunk = tuple(sources[i] for i in order[start : start + size])
        found.append(_Propagation(traced, chunk, rules, watch).logits(means, token_ids))
    relevant = torch.cat(found)
    unsorted = torch.empty_like(relevant)
    unsorted[order] = relevant
    return Relevance(unsorted, _head_totals(traced, token_ids)[-1])


def _check(
    parts: Architecture, sources: Sequence[Head], means: Tensor, token_ids: Tensor
) -> None:
    if not sources:
        raise ValueError("there are no sources: give at least one head")
    check_heads(parts, sources)
    expected = (parts.layers, parts.heads, parts.head_dim)
    if means.shape != expected:
        raise ValueError(
            f"means have shape {tuple(means.shape)}, not {expected}: take them with"
            " head_means of this model"
        )
    if len(token_ids) and not parts.head:
        raise ValueError(
            f"{type(parts.base).__name__} has no head, so it has no logits: load a"
            " model for language modelling or classification"
        )


def _bytes_per_source(traced: Trace) -> int:
    """Estimate the largest sum of a source's tensors that are there at a time."""
    hidden = traced.last_hidden
    block = traced.architecture.blocks[0]
    inner = len(block.mlp.up.weight) * (3 if block.mlp.gate else 2)
    gathered = 4 * traced.z[0].shape[-1]
    per_position = 3 * hidden.shape[-1] + max(inner, gathered)
    return traced.mask.numel() * per_position * hidden.element_size()


class _Propagation:
    """Carries the β of some sources, sorted by layer, to the logits.

    The stream between the blocks is kept as a sum that the next norm takes, so that
    adding and normalising are one kernel.
    """

    def __init__(
        self,
        traced: Trace,
        sources: tuple[Head, ...],
        rules: Rules,
        watch: Watch | None,
    ) -> None:
        self.traced = traced
        self.parts = traced.architecture
        self.sources = sources
        self.rules = rules
        self.watch = watch
        self.is_reading = False

    def logits(self, means: Tensor, token_ids: Tensor) -> Tensor:
        """Return β of the logits, (S, B, V')."""
        stream: Tensor | None = None
        update: Tensor | None = None
        for layer in range(self.sources[0].layer, self.parts.layers):
            block, z = self.parts.blocks[layer], None
            if stream is not None:
                inputs, stream = self.attention_inputs(layer, stream, update)
                z = self.attention(layer, inputs)
            z, stream = self.joined(layer, means, z, stream)
            self.show(layer, "z", z)
            if layer == self.parts.layers - 1:
                if not len(token_ids):
                    return z.new_empty(len(z), len(self.traced.mask), 0)
                self.is_reading = True
                z, stream = self.at_positions(z, 1), self.at_positions(stream, 1)
            a = block.attention
            update = self.update(layer, "attention", a.o, a.output_norm, z)
            stream, update = self.behind_attention(layer, stream, update)
        assert stream is not None
        return self.head(stream, update, token_ids)

    def attention_inputs(
        self, layer: int, stream: Tensor, update: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return what the attention reads, and the stream with its update."""
        if self.parts.is_post_norm:
            return stream, stream
        norm = self.parts.blocks[layer].attention_norm
        normed, stream = self.norm(norm, stream, update)
        self.show(layer, "attention_norm", normed)
        return normed, stream

    def joined(
        self, layer: int, means: Tensor, z: Tensor | None, stream: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Let the sources of a layer begin, behind those that are on their way."""
        starting = [head for head in self.sources if head.layer == layer]
        if not starting and z is not None and stream is not None:
            return z, stream
        hidden = self.traced.last_hidden
        total = self.traced.z[layer].unflatten(-1, means.shape[1:])
        centred = total - means[layer].to(total)
        began = total.new_zeros(len(starting), *total.shape)
        index = torch.tensor([head.index for head in starting], device=total.device)
        rows = torch.arange(len(starting), device=total.device)
        began[rows, :, :, index] = centred.permute(2, 0, 1, 3)[index]
        began = began.flatten(-2)
        nothing = hidden.new_zeros(len(starting), *hidden.shape)
        if z is None or stream is None:
            return began, nothing
        return torch.cat([z, began]), torch.cat([stream, nothing])

    def behind_attention(
        self, layer: int, stream: Tensor, update: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Add the attention, run the MLP; return the stream and what is to be added."""
        block = self.parts.blocks[layer]
        if self.parts.is_post_norm:
            stream, _ = self.norm(block.attention_norm, stream, update)
            inputs = stream
            self.show(layer, "middle", stream)
        else:
            inputs, stream = self.norm(block.mlp_norm, stream, update)
            self.show(layer, "middle", stream)
            self.show(layer, "mlp_norm", inputs)
        made = self.mlp(layer, block.mlp, inputs)
        added: Tensor | None = made
        following = self.norm_behind(layer)
        if self.rules.clean_up:
            total = self.total(self.traced.norm_inputs[following.module])
            stream = relevant_epilogue_(stream + made, total, clean_up=True)
            added = None
        if self.parts.is_post_norm:
            stream, _ = self.norm(following, stream, added)
            added = None
        if self.watch:
            self.show(layer, "output", stream if added is None else stream + added)
        return stream, added

    def norm_behind(self, layer: int) -> Norm:
        """Return the norm that takes the sum at the end of a block."""
        blocks = self.parts.blocks
        if self.parts.is_post_norm:
            return blocks[layer].mlp_norm
        if layer + 1 < len(blocks):
            return blocks[layer + 1].attention_norm
        assert self.parts.final_norm is not None
        return self.parts.final_norm

    # --- modules -----------------------------------------------------------------

    def norm(
        self, norm: Norm, stream: Tensor, update: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return β behind a norm, and the sum that went into it."""
        total = self.total(self.traced.norm_inputs[norm.module])
        if update is None:
            return self.norm_of(norm, stream, total), stream
        return decomposed_norm(
            update,
            total,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            kind=norm.kind,
            residual=stream,
            bias_rule=self.rules.bias,
        )

    def norm_of(self, norm: Norm, relevant: Tensor, total: Tensor) -> Tensor:
        """Return β behind a norm of t."""
        return decomposed_norm(
            relevant,
            total,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            kind=norm.kind,
            bias_rule=self.rules.bias,
        )

    def linear(
        self,
        layer: int,
        part: str,
        projection: Projection,
        relevant: Tensor,
        clean_up: bool = False,
    ) -> Tensor:
        """Return β behind a linear layer of a block."""
        found = decomposed_linear(
            relevant,
            self.total(self.output(projection)),
            projection.weight,
            projection.bias,
            bias_rule=self.rules.bias,
            clean_up=clean_up,
        )
        self.show(layer, part, found)
        return found

    def update(
        self,
        layer: int,
        part: str,
        projection: Projection,
        norm: Norm | None,
        relevant: Tensor,
        clean_up: bool = False,
    ) -> Tensor:
        """Return β of what is added to the stream: a projection, perhaps normed."""
        found = self.linear(layer, part, projection, relevant, clean_up)
        if norm is not None:
            found = self.norm_of(norm, found, self.total(self.output(projection)))
            self.show(layer, f"{part}_output_norm", found)
        return found

    def attention(self, layer: int, relevant: Tensor) -> Tensor:
        """Return β of what the heads gather, (S, B, T, heads · head_dim)."""
        attention = self.parts.blocks[layer].attention
        v = self.linear(layer, "v", attention.v, relevant).unflatten(
            -1, (attention.kv_heads, -1)
        )
        if self.rules.attention == "frozen":
            return _frozen(self.traced.attended[layer].probabilities, v)
        q = self.rotated(layer, "q", attention.q, attention.q_norm, relevant)
        k = self.rotated(layer, "k", attention.k, attention.k_norm, relevant)
        bias = self.traced.attended[layer].score_bias
        return _beta_softmax(q, k, v, bias, attention.scaling)

    def rotated(
        self,
        layer: int,
        part: str,
        projection: Projection,
        norm: Norm | None,
        relevant: Tensor,
    ) -> Tensor:
        """Return β of queries or keys, (S, B, T, heads, head_dim)."""
        found = self.linear(layer, part, projection, relevant)
        found = found.unflatten(-1, (-1, self.parts.head_dim))
        if norm is not None:
            total = self.output(projection).unflatten(-1, (-1, self.parts.head_dim))
            found = self.norm_of(norm, found, total)
        rotary = self.traced.attended[layer].rotary
        return found if rotary is None else _rotate(found, *rotary)

    def mlp(self, layer: int, mlp: MLP, relevant: Tensor) -> Tensor:
        """Return β of what an MLP adds to the stream."""
        clean_up = self.rules.clean_up
        up = self.linear(layer, "up", mlp.up, relevant, clean_up)
        up_total = self.total(self.output(mlp.up))
        if mlp.gate is None:
            inner = self.either_order(
                lambda b, t: decomposed_activation(b[0], t[0], mlp.activation),
                (up,),
                (up_total,),
            )
        else:
            gate = self.linear(layer, "gate", mlp.gate, relevant, clean_up)
            inner = self.either_order(
                lambda b, t: decomposed_gate(b[0], t[0], b[1], t[1], mlp.activation),
                (gate, up),
                (self.total(self.output(mlp.gate)), up_total),
            )
        return self.update(layer, "mlp", mlp.down, mlp.output_norm, inner, clean_up)

    def either_order(
        self,
        change: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
        relevant: Sequence[Tensor],
        total: Sequence[Tensor],
    ) -> Tensor:
        """Return f(t) − f(γ), or its mean with f(β) − f(0), by the rule for MLPs.

        Args:
            change: of β and t, f(t) − f(t − β).
            relevant: β of each of f's arguments.
            total: t of each.
        """
        last = change(relevant, total)
        if self.rules.mlp == "irrelevant_alone":
            return last
        # One "source" that is all of t: what f makes of β alone.
        alone = change([beta[None] for beta in relevant], relevant)[0]
        return (last + alone) / 2

    def activation(
        self, function: Callable[[Tensor], Tensor], relevant: Tensor, total: Tensor
    ) -> Tensor:
        """Return β behind an activation of the model's head."""
        return self.either_order(
            lambda b, t: function(t[0]) - function(t[0] - b[0]), (relevant,), (total,)
        )

    def head(self, stream: Tensor, update: Tensor | None, token_ids: Tensor) -> Tensor:
        """Return β of the logits, (S, B, V'), from the last stream, (S, B, D)."""
        relevant = stream
        if self.parts.final_norm is not None:
            relevant, _ = self.norm(self.parts.final_norm, stream, update)
        totals = _head_totals(self.traced, token_ids)
        last = len(self.parts.head) - 1
        for i, stage in enumerate(self.parts.head):
            before, behind = totals[i], totals[i + 1]
            if isinstance(stage, Norm):
                relevant = self.norm_of(stage, relevant, before)
            elif isinstance(stage, Projection):
                weight, bias = _rows_of(stage, token_ids if i == last else None)
                relevant = decomposed_linear(
                    relevant, behind, weight, bias, bias_rule=self.rules.bias
                )
            else:
                relevant = self.activation(stage, relevant, before)
        return relevant

    # --- what they share ---------------------------------------------------------

    def show(self, layer: int, part: str, relevant: Tensor) -> None:
        """Show β to who watches."""
        if self.watch:
            self.watch(Site(layer, part, self.sources[: len(relevant)]), relevant)

    def output(self, projection: Projection) -> Tensor:
        """Return what a projection gave in the plain pass, (B, T, outputs)."""
        whole = self.traced.outputs[projection.module]
        return whole[..., projection.start : projection.stop]

    def total(self, plain: Tensor) -> Tensor:
        """Return (B, T, ...), or (B, ...) once only the read positions are left."""
        return self.at_positions(plain, 0) if self.is_reading else plain

    def at_positions(self, tensor: Tensor, dim: int) -> Tensor:
        """Take each example's position out of (B, T, ...), which begin at ``dim``."""
        examples = torch.arange(len(self.traced.mask), device=tensor.device)
        flat = examples * self.traced.mask.shape[1] + self.traced.positions
        return tensor.flatten(dim, dim + 1).index_select(dim, flat)


def _head_totals(traced: Trace, token_ids: Tensor) -> list[Tensor]:
    """Return what goes into each stage of the head, and the logits, (B, ...) each."""
    examples = torch.arange(len(traced.mask), device=traced.last_hidden.device)
    totals = [traced.last_hidden[examples, traced.positions]]
    last = len(traced.architecture.head) - 1
    for i, stage in enumerate(traced.architecture.head):
        if isinstance(stage, Norm):
            totals.append(stage.module(totals[-1]))
        elif isinstance(stage, Projection):
            rows = _rows_of(stage, token_ids if i == last else None)
            totals.append(F.linear(totals[-1], *rows))
        else:
            totals.append(stage(totals[-1]))
    return totals


def _rows_of(
    projection: Projection, token_ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    weight, bias = projection.weight, projection.bias
    if token_ids is None:
        return weight, bias
    return weight[token_ids], None if bias is None else bias[token_ids]


def _frozen(probabilities: Tensor, v: Tensor) -> Tensor:
    """Return A β_v of all heads, (S, B, T, heads · head_dim).

    One product for each example and each head of v, in which the sources lie beside
    one another: A is read once for all of them.

    Args:
        probabilities: A, (B, heads, T, T).
        v: β_v, (S, B, T, kv_heads, head_dim).
    """
    S, B, T, shared, width = v.shape
    queries = probabilities.reshape(B, shared, -1, T).to(v.dtype)
    values = v.permute(1, 3, 2, 0, 4).reshape(B, shared, T, S * width)
    z = (queries @ values).view(B, shared, -1, T, S, width)
    return z.permute(4, 0, 3, 1, 2, 5).reshape(S, B, T, -1)


def _beta_softmax(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """Return softmax(scaling · β_q β_kᵀ + bias) β_v, (S, B, T, heads · head_dim).

    Args:
        q: β_q, (S, B, T, heads, head_dim).
        k: β_k, (S, B, T, kv_heads, head_dim).
        v: β_v, likewise.
        bias: (B or 1, heads or 1, T, T), or None.
        scaling: multiplies the scores.
    """
    S, B, T, heads, _ = q.shape
    if bias is not None:
        bias = bias.to(q.dtype).expand(B, -1, -1, -1).repeat(S, 1, 1, 1)
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
    shared = k.shape[1]
    z = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias,
        scale=scaling,
        enable_gqa=heads != shared,
    )
    return z.transpose(1, 2).reshape(S, B, T, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return rotary embeddings of x, (S, B, T, heads, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[..., None, :] + turned * sin[..., None, :]


# --- over data -------------------------------------------------------------------


def head_means(model: Any, batches: Iterable[LabelledBatch], *, classes: int) -> Tensor:
    """Return each head's mean z, with each label counting the same.

    Within a label it is the mean over all tokens of all its examples, because positions
    of natural text have nothing in common. The released code keeps a mean for each
    position, which takes texts of equal length.

    Args:
        model: see :func:`ftlib.ctsft.architectures.describe`.
        batches: inputs, and the label of each example, int64 (B,) in [0, classes).
        classes: number of labels.

    Returns:
        μ, (layers, heads, head_dim), at least float32.

    Raises:
        ValueError: a label has no example.
    """
    parts = describe(model)
    means = BalancedMean(classes)
    for given, labels in batches:
        inputs = complete(model, given)
        mask = inputs["attention_mask"].bool()
        with evaluating(model), _Recorder(parts) as seen:
            parts.base(**inputs)
        gathered = [seen.inputs[block.attention.o.module] for block in parts.blocks]
        sums = [
            z.masked_fill(~mask[..., None], 0).sum(1, dtype=_wide(z)) for z in gathered
        ]
        z = torch.stack(sums, dim=1).unflatten(-1, (parts.heads, parts.head_dim))
        means.add(z, mask.sum(-1), labels)
    return means.mean()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def scores(
    model: Any,
    batches: Iterable[LabelledBatch],
    means: Tensor,
    token_ids: Tensor,
    *,
    rules: Rules = OURS,
    memory: int = MEMORY,
) -> Tensor:
    r"""Return how much each head moves the answer towards the right label.

    Of an example with label y, head s scores

        r(s) = β_logit[y] − mean over the other labels y' of β_logit[y'],

    and R(s) is the mean of r over the examples of a label, and then over labels. This
    signed, task-directional score is **our reconstruction**: what is known of the
    paper's is that it has these properties, not its formula.

    Args:
        model: see :func:`ftlib.ctsft.architectures.describe`.
        batches: inputs, and the label of each example, int64 (B,): c for the c-th of
            ``token_ids``.
        means: μ of every head; see :func:`head_means`.
        token_ids: the token of each label, or 0, 1, … for a classifier; int64 (C,).
        rules: of the decomposition.
        memory: as in :func:`propagate`.

    Returns:
        R, (layers, heads), at least float32.

    Raises:
        ValueError: a label has no example, or see :func:`propagate`.
    """
    heads = all_heads(model)
    balanced = BalancedMean(len(token_ids))
    for inputs, labels in batches:
        traced = trace(model, inputs)
        found = propagate(
            traced, heads, means, token_ids, rules=rules, memory=memory
        ).relevant
        balanced.add(margins(found, labels).T, torch.ones_like(labels), labels)
    return balanced.mean().view(means.shape[:2])
