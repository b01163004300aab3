"""What a model's output head multiplies, so that its logits need never be stored.

A loss that takes the hidden states and ``lm_head.weight`` and forms the logits by
itself replaces the end of the model's forward pass. It is wrong, and says nothing,
wherever the model does more there than one product: T5 scales its hidden states,
Cohere and Granite scale their logits, Gemma 2 caps them, Marian adds a bias, and a
LoRA adapter on the head is not in ``lm_head.weight`` at all.

:func:`.output_head` keeps no list of such models. It runs the model with a probe in
the head's place. What reaches the probe is the input of the head, so all that
happens before it has happened: the adapters, the prompts, T5's scale. The probe
answers with known numbers, and what becomes of them in the model's ``logits`` shows
what happens after it. If that is a scale and a softcap, they are returned; if it is
anything else, that is an error. An architecture that nobody has looked at is
therefore measured, or refused, and never guessed. Between the two lies the head
itself, and there only layers whose product is known are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftlib.kernels.types import Logits

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OTHERWISE = "Otherwise compute the loss from model(...).logits."


class OutputHead(NamedTuple):
    """The factors of a model's logits.

    ``z = logit_scale · hidden @ weight.T``, then ``c · tanh(z / c)`` if there is a
    softcap c, equals ``model(...).logits``.

    Attributes:
        hidden: the input of the head, (batch, time, features).
        weight: (vocabulary, features).
        logit_scale: multiplies the product.
        softcap: c; ``None`` leaves the logits as they are.
    """

    hidden: Tensor
    weight: Tensor
    logit_scale: float
    softcap: float | None

    @property
    def transform(self) -> Logits:
        """How products of hidden states and weights become logits."""
        return Logits(self.logit_scale, self.softcap)


def output_head(model: nn.Module, *args: Any, **inputs: Any) -> OutputHead:
    """Run a model up to its output head, and return what the head would multiply.

    For example, for the mean cross-entropy of a causal model::

        head = output_head(model, input_ids=ids, attention_mask=mask)
        loss = vocabulary_head(
            head.hidden[:, :-1], head.weight, targets[:, 1:], loss=TokenLoss(),
            logit_scale=head.logit_scale, softcap=head.softcap,
        ).loss

    Both factors are in the autograd graph; without adapters on the head, ``weight``
    is the parameter itself. The cost is a forward pass without the head's product,
    and 2·V numbers read back from the device.

    An unmerged LoRA adapter on the head is exact, with its dropout: for every
    active adapter of rank r, the hidden states get r more features, ``scaling · A
    dropout(x)``, and the weight r more columns, B. ``weight + scaling · B A`` would
    be the same product, but where B is small, as at the start of training, rounding
    that sum to bf16 removes most of the adapter. The longer weight is a copy. Ranks
    that are multiples of 8 keep its rows aligned.

    Args:
        model: a transformers model with an output head, wrapped by PEFT or not; or a
            head by itself, such as an ``nn.Linear``, called with hidden states.
        args: what the model is called with.
        inputs: what the model is called with by name, without ``labels``.

    Returns:
        The factors of ``model(*args, **inputs).logits``.

    Raises:
        TypeError: the model has no output head, or one of a kind that is not known
            to be a product: quantised, or adapted by anything but plain LoRA.
        ValueError: the head has a bias, its weight is not wholly here, the model
            does something else to its logits than a scale and a softcap, or the
            inputs contain labels.
    """
    if inputs.get("labels") is not None:
        raise ValueError(
            "output_head got labels, which belong to the loss: pass them to it as its"
            " targets. An encoder-decoder model takes decoder_input_ids instead, from"
            " model.prepare_decoder_input_ids_from_labels(labels)."
        )
    head = _find_head(model)
    layer = _layer(head)
    vocabulary = len(_weight(getattr(layer, "base_layer", layer)))
    calls: list[tuple[Tensor, Tensor]] = []

    def answer(hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        if others or named:
            raise ValueError(
                f"The model passes {[*others, *named]} to its head beside the hidden"
                " states, such as an adapter for each example, which is not known"
                f" here. {_OTHERWISE}"
            )
        calls.append((hidden, _probe(hidden, vocabulary)))
        return calls[-1][1]

    with _replaced_forward(head, answer):
        outputs = model(*args, **inputs)
    if len(calls) != 1:
        raise ValueError(
            f"{type(model).__name__} called its head {len(calls)} times, not once, in"
            f" a forward pass, so its logits are not one product. {_OTHERWISE}"
        )
    hidden, probe = calls[0]
    return OutputHead(*_factors(layer, hidden), *_measure(probe, outputs))


def _find_head(model: Any) -> nn.Module:
    if not hasattr(model, "get_output_embeddings"):
        return model
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"{type(model).__name__} has no output head over a vocabulary. Load it with"
            " AutoModelForCausalLM or AutoModelForSeq2SeqLM."
        )
    return head


@contextmanager
def _replaced_forward(
    module: nn.Module, forward: Callable[..., Tensor]
) -> Iterator[None]:
    """Let a module run another forward; its hooks stay, and run before and after it."""
    attributes = vars(module)
    own = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        if own is not None:
            attributes["forward"] = own


def _probe(hidden: Tensor, vocabulary: int) -> Tensor:
    """Return numbers from 2⁻⁴⁰ to 2¹⁰⁰, and as many zeros, in place of the logits.

    They are powers of two, so that a scale can be read off exactly, of both signs, a
    different one in nearly every column, and at least float32. Beside the large ones a
    bias would be lost; the zeros show it. Both rows lie in a new first dimension, where
    nothing that depends on the example or on the position can be mistaken for them.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    exponents = torch.linspace(-40, 100, vocabulary, dtype=torch.float64).round()
    values = torch.exp2(exponents)
    values[1::2] *= -1
    rows = torch.stack([values, torch.zeros_like(values)]).to(hidden.device, dtype)
    return rows.view(2, *[1] * (hidden.dim() - 1), vocabulary)


def _measure(probe: Tensor, outputs: Any) -> tuple[float, float | None]:
    """Read the scale and the softcap off what a model made of the probe."""
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or logits.shape != probe.shape:
        raise ValueError(
            "The model's output has no logits of the shape its head gave them."
            f" {_OTHERWISE}"
        )
    tolerance = 64 * torch.finfo(probe.dtype).eps
    given, seen = (x.detach().flatten(1).double().cpu() for x in (probe, logits))
    scale, last = (seen[0, 0] / given[0, 0]).item(), seen[0, -1].abs().item()
    product = scale * given
    softcap = None
    if last < 0.5 * product[0, -1].abs():
        softcap = last
        product = softcap * torch.tanh(product / softcap)
    if not torch.allclose(product, seen, rtol=tolerance, atol=0):
        raise ValueError(
            "The model changes the logits after its head by something other than a"
            " scale and a softcap, such as a bias or a mask, which a product of hidden"
            f" states and weight leaves out. {_OTHERWISE}"
        )
    return scale, softcap


def _layer(head: Any) -> nn.Module:
    """Return the layer that acts in the head, without PEFT's wrappers."""
    if _is_linear(head):
        return head
    from peft.tuners import lora, trainable_tokens
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(head, ModulesToSaveWrapper):
        return _layer(_module_in_use(head))
    if isinstance(head, TrainableTokensWrapper):
        return _layer(head.token_adapter)
    tokens = trainable_tokens.TrainableTokensLayer
    if type(head).forward not in (lora.Linear.forward, tokens.forward):
        raise _unknown(head)
    variants = getattr(head, "lora_variant", {})
    acting = [variants[name] for name in _acting_adapters(head) if name in variants]
    for part in (head.base_layer, *acting):
        if not _is_linear(part):
            raise _unknown(part)
    return head


def _is_linear(layer: nn.Module) -> bool:
    """Know a layer by the forward it runs, for a subclass may run another one."""
    return type(layer).forward is nn.Linear.forward


def _unknown(layer: nn.Module) -> TypeError:
    return TypeError(
        f"{type(layer).__module__}.{type(layer).__qualname__} is not known to be an"
        " output head, a product of hidden states and a weight. If it is an adapter,"
        " merge it, use plain LoRA, or leave the head out of target_modules; if it is"
        " quantised, keep the head in floating point; if it is a wrapper such as"
        " DistributedDataParallel, let it wrap a module that calls output_head on the"
        f" model. {_OTHERWISE}"
    )


def _factors(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and W with ``layer(hidden) = x @ W.T``."""
    if _is_linear(layer):
        return hidden, _weight(layer)
    # PEFT takes merged adapters out of a disabled layer only when it runs.
    layer(hidden[:0])
    adapters, weight = _acting_adapters(layer), _weight(layer.base_layer)
    if not hasattr(layer, "lora_A"):
        return hidden, layer.get_merged_weights(adapters)
    adapters = [name for name in adapters if name in layer.lora_A]
    if not adapters:
        return hidden, weight
    return _lora_factors(layer, adapters, hidden, weight)


def _weight(linear: nn.Module) -> Tensor:
    """Return the weight of a linear layer, if it is all that the layer has."""
    weight = linear.weight
    if linear.bias is not None:
        raise ValueError(
            "The output head, or the LoRA adapter on it, adds a bias to the logits,"
            " which a product of hidden states and weight leaves out. Load the model"
            f" without it (lora_bias=False for LoRA). {_OTHERWISE}"
        )
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in _FLOATS:
        raise TypeError(
            f"The output head's weight is a {type(weight).__name__} of {weight.dtype},"
            " not a plain floating-point tensor. If it is sharded (a DTensor), leave"
            " the head out of the sharding, as by fully_shard(..., ignored_params=...);"
            f" if it is quantised, keep the head in floating point. {_OTHERWISE}"
        )
    shape = (linear.out_features, linear.in_features)
    # PEFT swaps the two numbers of a copy that it ties to the embeddings.
    if weight.is_meta or weight.shape not in (shape, shape[::-1]):
        raise ValueError(
            f"The output head's weight has shape {tuple(weight.shape)} on"
            f" {weight.device}, not {shape}: it is partitioned or offloaded. Gather it"
            " around output_head, the loss and its backward pass, as by"
            " deepspeed.zero.GatheredParameters, or leave the head out of that, as by"
            f" ignored_modules of FSDP. {_OTHERWISE}"
        )
    return weight


def _lora_factors(
    layer: Any, adapters: list[str], hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    features, columns = [hidden], [weight]
    for name in adapters:
        low_rank = layer.lora_A[name]
        dropped = layer.lora_dropout[name](hidden.to(_weight(low_rank).dtype))
        features.append((layer.scaling[name] * low_rank(dropped)).to(hidden.dtype))
        columns.append(_weight(layer.lora_B[name]).to(weight.dtype))
    return torch.cat(features, dim=-1), torch.cat(columns, dim=-1)


def _acting_adapters(layer: Any) -> list[str]:
    """Return the adapters that act beside the base weight."""
    if layer.disable_adapters or layer.merged:
        return []
    return list(layer.active_adapters)


def _module_in_use(wrapper: Any) -> nn.Module:
    """Return the copy that PEFT's ``modules_to_save`` trains, or the original."""
    copies, active = wrapper.modules_to_save, wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(n not in copies for n in active):
        return wrapper.original_module
    return copies[active[0]]
