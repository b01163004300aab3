"""The CAREF experiments: arms × seeds → records.

A tiny T5 is pre-trained once per seed on notes of facts, to answer a question with a
label and the facts that decide it (:mod:`ftlib.caref.evidence`). Every arm fine-tunes
that base on the same examples of a harder world, with the same steps and batch: notes
have five facts rather than three; half of the questions are decided by a fact that is
hedged, so that no label is certain; and a mark tells the label more often than not,
though no explanation may cite it. The arms differ in the loss and in which weights are
trained:

* The grid: SCED or not, the divergence from uniform (KL) or not, all weights or the
  decoder's attention queries (AQ). KL alone is the confidence penalty.
* Other losses: label smoothing, focal, 1.5-entmax and sparsemax, the last two evaluated
  in the distributions that they train; and temperature scaling of CE's labels.
* Adapters, by cross-entropy: LoRA of two ranks, and AdaLoRA.

What was expected, before anything was run:

* SCED raises confidence on hedged questions far above the exact posterior, and with it
  ECE, Brier and distance; a pair of labels at 60 % is believed at 90 % or more. This is
  the claim that is tested; the theory of one position says so.
* KL lowers confidence, and ECE becomes worse than CE's through too little of it. With
  both terms SCED prevails, as in theory.
* At the wording, which has 1.03 nats in truth, SCED leaves less than half of that.
* Temperature scaling mends the calibration of CE; it cannot mend what is worded.
* AQ is as accurate as LoRA of rank 4, within two points.
* nBERT follows accuracy: among arms of equal accuracy it does not differ by a point.
* Faithfulness by intervention moves little: no loss term knows what decides. Reliance
  on the mark is the same with and without SCED.

Trial runs with seeds from 1000 up, whose questions are not those of the records, came
between these expectations and the records; sizes and learning rates were chosen in
them.

The experiments: ``evidence`` (the table), ``knob`` (λ_SCED, and other α and β, at the
learning rate of SCED) and ``learning-rate`` (how each arm's was chosen).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import T5Config, T5ForConditionalGeneration

from ftlib import runtime
from ftlib.bases import base_path, kept_base
from ftlib.caref.baselines import FenchelYoungLoss
from ftlib.caref.benchmarks import benchmark_arms
from ftlib.caref.evaluation import (
    JUDGE,
    VOCABULARY,
    Floats,
    Map,
    believe,
    collate,
    decision_metrics,
    distribution_metrics,
    explanation_metrics,
    faithfulness_metrics,
    gold,
    pairs,
    predictor,
)
from ftlib.caref.evidence import Example, Split, sample
from ftlib.caref.objective import Learner, training_loss
from ftlib.caref.selection import adalora, lora, select
from ftlib.caref.settings import (
    ADALORA,
    ADALORA_BEGINS,
    ADALORA_ENDS,
    BASELINES,
    EVIDENCE,
    GRID,
    KNOB,
    LEARNING_RATES,
    LORA,
    TRIED_LEARNING_RATES,
    TUNING_SEED,
    BaseSettings,
    EvidenceSettings,
    Recipe,
)
from ftlib.experiments import Arm
from ftlib.metrics.calibration import fit_temperature, temperature_scale
from ftlib.results import PACKED_PREFIX, Metric
from ftlib.runtime import Scale
from ftlib.streams import stream
from ftlib.training import LossFunction, train

Metrics = Mapping[str, Metric | float]


def plan(scale: Scale) -> list[Arm]:
    """Return the arms of the method: the world of evidence at cpu, text at gpu."""
    return evidence_arms() if scale == "cpu" else benchmark_arms()


def evidence_arms(world: EvidenceSettings = EVIDENCE) -> list[Arm]:
    """All arms in the world of evidence; those of the tuning first."""
    compared = conditions(world)
    tuned = [c for c in compared if c.name in LEARNING_RATES]
    return [
        *(_tuning_arm(c, rate) for c in tuned for rate in c.tried),
        *(_arm(c) for c in compared),
    ]


@dataclass(frozen=True)
class Condition:
    """How a base is fine-tuned.

    Attributes:
        experiment: in which it is compared with others.
        name: unique there.
        recipe: loss and weights; ``None`` leaves the base as it is.
        world: questions, steps, batch, base.
        tuned_as: the arm whose learning rate it takes; by default its own.
    """

    experiment: str
    name: str
    recipe: Recipe | None
    world: EvidenceSettings
    tuned_as: str = ""

    @property
    def learning_rate(self) -> float:
        """The rate that did best on validation; 0 for a base left as it is."""
        return LEARNING_RATES[self.tuned_as or self.name] if self.recipe else 0.0

    @property
    def tried(self) -> tuple[float, ...]:
        """The rates that are tried."""
        return TRIED_LEARNING_RATES[self.recipe.weights] if self.recipe else ()

    @property
    def probabilities(self) -> Map:
        """The map from logits to the distributions that the loss trains."""
        if self.recipe and isinstance(self.recipe.loss, FenchelYoungLoss):
            return self.recipe.loss.probabilities
        return partial(torch.softmax, dim=-1)

    def settings(self, learning_rate: float) -> dict[str, Any]:
        """All that is set, for the record."""
        return {
            **dataclasses.asdict(self.world),
            "arm": self.name,
            "recipe": self.recipe.settings() if self.recipe else None,
            "learning_rate": learning_rate,
        }


def conditions(world: EvidenceSettings) -> list[Condition]:
    """Every way to fine-tune a base that is compared with others."""
    main = {**BASELINES, **GRID}
    lent = {"temperature": "CE"}
    return [
        *(Condition("evidence", n, r, world, lent.get(n, "")) for n, r in main.items()),
        *(Condition("knob", n, r, world, "SCED") for n, r in KNOB.items()),
    ]


def _arm(condition: Condition) -> Arm:
    rate = condition.learning_rate
    return Arm(
        condition.experiment,
        condition.name,
        {**condition.settings(rate), "judge": JUDGE},
        partial(run, condition, rate),
        requires=(JUDGE,),
    )


def _tuning_arm(condition: Condition, rate: float) -> Arm:
    return Arm(
        "learning-rate",
        f"{condition.name} {rate:g}",
        {**condition.settings(rate), "method": condition.name},
        partial(tune, condition, rate),
    )


# -- one run ---------------------------------------------------------------------------


def run(condition: Condition, rate: float, seed: int) -> Metrics:
    """Fine-tune a seed's base, and test it."""
    world = condition.world
    model = fine_tune(condition, rate, seed)
    test = examples_of(world, "test", seed)
    beliefs = believe(model, test, condition.probabilities)
    labels, metrics = beliefs.labels, {}
    if condition.recipe and condition.recipe.temperature:
        temperature = validated_temperature(model, condition, seed)
        labels = temperature_scale(_logits(labels), temperature)
        metrics["temperature"] = temperature
    predict = predictor(model)
    return {
        **decision_metrics(labels, test, world.world.shortcut),
        **distribution_metrics(beliefs),
        **explanation_metrics(predict, test, world.compared),
        **faithfulness_metrics(predict, test, world.edited, stream(seed, "edits")),
        **metrics,
        "trained": float(sum(p.numel() for p in _trained(model))),
    }


def tune(condition: Condition, rate: float, seed: int) -> Metrics:
    """Try a learning rate on a seed that is not reported, without a look at a test.

    Returns:
        ``validation``, the share by which rates are compared, and what else there is to
        say of validation, which shows what depends on the rate.
    """
    seed += TUNING_SEED
    model = fine_tune(condition, rate, seed)
    validation = examples_of(condition.world, "validation", seed)
    beliefs = believe(model, validation, condition.probabilities)
    measured = {
        **decision_metrics(beliefs.labels, validation, condition.world.world.shortcut),
        **distribution_metrics(beliefs),
    }
    shown = {k: m for k, m in measured.items() if not k.startswith(PACKED_PREFIX)}
    return {"validation": measured["plain"], **shown}


def validated_temperature(model: nn.Module, condition: Condition, seed: int) -> float:
    """Fit the temperature of the labels on validation."""
    validation = examples_of(condition.world, "validation", seed)
    labels = believe(model, validation, condition.probabilities).labels
    return fit_temperature(_logits(labels), gold(validation))


def _logits(labels: Floats) -> Floats:
    """Return log p, finite also where float32 made p 0."""
    return np.log(labels.clip(min=np.finfo(np.float32).tiny))


def fine_tune(condition: Condition, rate: float, seed: int) -> nn.Module:
    """Fine-tune the base of a seed; every arm sees the same examples in the same order.

    Returns:
        The model, in which what was trained requires gradients.
    """
    world, recipe = condition.world, condition.recipe
    model = base_model(world.base, seed)
    if recipe is None:
        return model.requires_grad_(False)
    torch.manual_seed(stream(seed, "adapters"))
    if recipe.weights == "AdaLoRA":
        return _train_adalora(model, condition, rate, seed)
    if recipe.weights in LORA:
        model = get_peft_model(model, lora(**LORA[recipe.weights]))
    else:
        select(model, "BASE" if recipe.weights == "all" else "AQ")
    _train(model, condition, rate, seed, training_loss)
    return model


def _train(
    model: nn.Module,
    condition: Condition,
    rate: float,
    seed: int,
    loss: LossFunction,
    optimizer: AdamW | None = None,
) -> None:
    world = condition.world
    assert condition.recipe
    train(
        Learner(model, condition.recipe.loss),
        pairs(examples_of(world, "train", seed)),
        loss,
        world.training(rate, stream(seed, "order")),
        collate=collate,
        optimizer=optimizer,
        label=condition.name,
    )


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# -- AdaLoRA ---------------------------------------------------------------------------


def _train_adalora(
    model: nn.Module, condition: Condition, rate: float, seed: int
) -> nn.Module:
    """Train with AdaLoRA, whose ranks are taken away after each step of the optimiser.

    Its gradients are still there then, and they say which ranks matter.
    """
    steps = condition.world.steps
    config = adalora(steps, **ADALORA)
    config.tinit = round(steps * ADALORA_BEGINS)
    config.tfinal = steps - round(steps * ADALORA_ENDS)
    adapted: Any = get_peft_model(model, config)
    optimizer = AdamW(_trained(adapted), lr=rate, weight_decay=0.0)
    step = count(1)
    optimizer.register_step_post_hook(
        lambda *_: adapted.base_model.update_and_allocate(next(step))
    )

    def loss(learner: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Any]]:
        value, metrics = training_loss(learner, batch)
        return value + config.orth_reg_weight * non_orthogonality(adapted), metrics

    _train(adapted, condition, rate, seed, loss, optimizer)
    return adapted


def non_orthogonality(adapted: nn.Module) -> Tensor:
    """Mean Frobenius distance of AdaLoRA's factors from orthogonal ones.

    peft adds it to the model's own loss, which is not used here.
    """
    factors = [
        p.T if "lora_B" in name else p
        for name, p in adapted.named_parameters()
        if "lora_A" in name or "lora_B" in name
    ]
    gaps = [f @ f.T - torch.eye(len(f), device=f.device) for f in factors]
    return torch.stack([gap.norm() for gap in gaps]).mean()


# -- the base --------------------------------------------------------------------------


def base_model(base: BaseSettings, seed: int) -> nn.Module:
    """Return the base of a seed, pre-trained now or before.

    Its weights are kept in the user's cache, by settings, seed and the texts it is
    pre-trained on.
    """
    few = dataclasses.replace(base, examples=min(base.examples, 64))
    texts = [[one.text, one.target] for one in corpus(few, seed)]
    path = base_path("caref", seed, [dataclasses.asdict(base), seed, texts])
    return kept_base(new_model(base), path, partial(_pretrain, base, seed))


def new_model(base: BaseSettings) -> nn.Module:
    """Return a T5 with random weights and, like Flan-T5, an output head of its own."""
    config = T5Config(
        vocab_size=base.logits,
        d_model=base.width,
        d_kv=base.width // base.heads,
        d_ff=base.feed_forward,
        num_layers=base.layers,
        num_heads=base.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=VOCABULARY.pad,
        eos_token_id=VOCABULARY.end,
        decoder_start_token_id=VOCABULARY.pad,
        tie_word_embeddings=False,
    )
    model = T5ForConditionalGeneration(config)
    # transformers ties the head whatever the configuration says; only a checkpoint
    # that has one changes that. The scale is what a tied head would have.
    head = model.shared.weight.detach() * base.width**-0.5
    model.lm_head.weight = nn.Parameter(head)
    return model


def _pretrain(base: BaseSettings, seed: int, directory: Path) -> nn.Module:
    """Pre-train a base, going on where an interrupted process stopped."""
    torch.manual_seed(seed)
    model = new_model(base).to(runtime.device())
    train(
        Learner(model, Recipe().loss),
        pairs(corpus(base, seed)),
        training_loss,
        dataclasses.replace(base.training, seed=seed),
        collate=collate,
        directory=directory,
        label="pretraining",
    )
    return model


# -- examples --------------------------------------------------------------------------


def corpus(base: BaseSettings, seed: int) -> list[Example]:
    """Draw what the base of a seed is pre-trained on."""
    return sample(base.examples, "pretrain", stream(seed, "pretrain"), base.world)


def examples_of(world: EvidenceSettings, split: Split, seed: int) -> list[Example]:
    """Draw what every arm of a seed is trained on, validated with, or tested with."""
    sizes = {
        "train": world.examples,
        "validation": world.validation,
        "test": world.test,
    }
    return sample(sizes[split], split, stream(seed, split), world.world)
