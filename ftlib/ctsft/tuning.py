"""Phase 2: going on from a checkpoint, with some of its weights.

Every arm minimises the same loss, the cross-entropy of the label's token over the whole
vocabulary. They differ in which weights may move: all of them; those of some heads and
of all norms, or of the norms alone (:class:`ftlib.ops.HeadAdamW`); or adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from ftlib.ctsft.architectures import describe
from ftlib.ctsft.batches import LabelledBatch, last_logits
from ftlib.ctsft.heads import Head, HeadTensor, head_slices, norm_parameters
from ftlib.ctsft.tasks import Collator, Encoded
from ftlib.ops.head_adamw import HeadAdamW, Slices, WeightSlice, training_only
from ftlib.training import Learner, TrainingSettings, train

Heads = Literal["circuit", "near zero", "random"]
Weights = Heads | Literal["all", "blocks", "norms", "lora"]
"""What is trained: all weights; all but the embeddings; heads and norms; norms alone;
LoRA on q and o."""


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint is tuned with.

    Attributes:
        weights: what is trained.
        tensors: of a head. The paper does not say which; q and o are ours.
        l2: λ of ½ λ ‖θ − θ₁‖², added to the loss of full fine-tuning.
    """

    weights: Weights
    tensors: tuple[HeadTensor, ...] = ("q", "o")
    l2: float = 0.0

    def __post_init__(self) -> None:
        if self.l2 < 0 or (self.l2 and self.weights != "all"):
            raise ValueError(
                f"l2 is {self.l2} and trains {self.weights}: it must be at least 0, and"
                " draws only where all weights are trained"
            )


def slices_of(model: Any, recipe: Recipe, heads: Collection[Head]) -> Slices:
    """Return what a recipe of heads, or of norms, trains.

    Args:
        model: see :func:`ftlib.ctsft.architectures.describe`.
        recipe: of heads or norms.
        heads: the chosen ones; for norms there are none.

    Raises:
        ValueError: heads are to be trained and there are none.
    """
    norms = norm_parameters(model)
    if recipe.weights == "norms":
        return norms
    return [*head_slices(model, heads, recipe.tensors), *norms]


def size(slices: Slices) -> int:
    """Return how many weights slices have."""
    return sum(
        piece.numel() if isinstance(piece, nn.Parameter) else _selected(piece).numel()
        for piece in slices
    )


def _selected(piece: WeightSlice) -> Tensor:
    return piece.parameter.narrow(piece.dim, piece.start, piece.stop - piece.start)


# --- training --------------------------------------------------------------------


def label_loss(model: Any, batch: tuple[LabelledBatch, Tensor]) -> Tensor:
    """Return the cross-entropy of the label's token, at the prompt's last.

    Args:
        model: a language model.
        batch: inputs and labels, and the token of each label, int64 (C,).
    """
    (inputs, labels), tokens = batch
    logits = last_logits(model, inputs)
    return F.cross_entropy(logits.float(), tokens[labels])


def tune(
    model: Any,
    recipe: Recipe,
    heads: Collection[Head],
    examples: Sequence[Encoded],
    token_ids: Tensor,
    settings: TrainingSettings,
    *,
    watch: Callable[[int], None] = lambda step: None,
    label: str = "tuning",
) -> int:
    """Tune a model in place.

    Args:
        model: the checkpoint. With LoRA, its layers get adapters.
        recipe: which weights are trained, and how.
        heads: the chosen ones, for a recipe of heads. For LoRA they give the budget: as
            many weights as the recipe's tensors of these heads have, and all norms, as
            nearly as a rank can.
        examples: of the target language.
        token_ids: the token of each label, int64 (C,).
        settings: of the training.
        watch: called after each step, with the number of steps taken.
        label: of the progress bar.

    Returns:
        How many weights were trained.
    """
    collate, start = Collator(), weights_of(model) if recipe.l2 else {}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = label_loss(model, batch)
        if not recipe.l2:
            return value
        return value + recipe.l2 / 2 * squared_distance(model, start)

    with _prepared(model, recipe, heads, settings) as (optimizer, trained):
        step = count(1)
        optimizer.register_step_post_hook(lambda *_: watch(next(step)))
        train(
            # In mixed precision the passes of the model itself stay as they are, so
            # that what is watched is measured as before the first step.
            Learner(model, loss),
            examples,
            lambda learner, batch: learner(batch=batch),
            settings,
            collate=lambda batch: (collate(batch), token_ids),
            optimizer=optimizer,
            label=label,
        )
    return trained


@contextmanager
def _prepared(
    model: Any,
    recipe: Recipe,
    heads: Collection[Head],
    settings: TrainingSettings,
) -> Iterator[tuple[Optimizer, int]]:
    """Let the weights of a recipe get gradients, and yield their optimiser and number.

    None has weight decay, which would move weights that no example asks to move.
    """
    rate = settings.learning_rate
    if recipe.weights not in ("all", "blocks", "lora"):
        slices = slices_of(model, recipe, heads)
        with training_only(model, slices):
            yield HeadAdamW(slices, lr=rate, weight_decay=0.0), size(slices)
        return
    if recipe.weights == "lora":
        budget = size(slices_of(model, recipe, heads))
        get_peft_model(model, lora(model, budget))
    free = [p for p in model.parameters() if p.requires_grad]
    if recipe.weights == "blocks":
        words = model.get_input_embeddings().weight
        free = [p for p in free if p is not words]
    trained = sum(p.numel() for p in free)
    yield AdamW(free, lr=rate, weight_decay=0.0), trained


def lora(model: Any, budget: int) -> LoraConfig:
    """Return LoRA on the projections q and o, of the rank that comes nearest a budget.

    Args:
        model: of which q is a layer of its own.
        budget: number of weights.
    """
    parts = describe(model)
    layers = [p.module for b in parts.blocks for p in (b.attention.q, b.attention.o)]
    per_rank = sum(sum(layer.weight.shape) for layer in layers)
    rank = max(1, round(budget / per_rank))
    names = {id(module): name for name, module in model.named_modules()}
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=[names[id(layer)] for layer in layers],
    )


# --- how far it went -------------------------------------------------------------


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def squared_distance(model: nn.Module, start: Mapping[str, Tensor]) -> Tensor:
    """Return ‖θ − θ₁‖², differentiable, where no adapter was added."""
    terms = [(p - start[name]).square().sum() for name, p in model.named_parameters()]
    return torch.stack(terms).sum()


@torch.no_grad()
def distance(model: nn.Module, start: Mapping[str, Tensor]) -> float:
    """Return ‖Δθ‖: how far all weights together have moved.

    Args:
        model: tuned; of LoRA's adapters, what they add to the weights counts.
        start: its weights before, from :func:`weights_of`.
    """
    adapters = [m for m in model.modules() if isinstance(m, LoraLayer)]
    if not adapters:
        return squared_distance(model, start).sqrt().item()
    deltas = [adapter.get_delta_weight("default") for adapter in adapters]
    return torch.stack([delta.square().sum() for delta in deltas]).sum().sqrt().item()
