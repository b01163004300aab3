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
* Adapters, by cross-entropy: LoRA of two ranks, and AdaLoRA, whose ranks and schedule
  are chosen with its learning rate.

All of this is done with 1,500 examples, and with 48, the number, batches and epochs of
the paper's protocol.

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

* With 48 examples, cross-entropy learns by heart how the coins fell: its confidence on
  hedged questions is far above the posterior's, and label smoothing, focal loss and KL
  mend some of it, SCED makes it worse. Fewer weights overfit less: AQ and LoRA of rank
  4 lose less accuracy than all weights do, against 1,500 examples.

* A base that is less sure starts on the other side of SCED's ridge, and is led to the
  diffuse optimum. (This one was stated by theory, and then seen in a trial run of one
  seed before it was added to the experiments.)

Trial runs with seeds from 1000 up, whose questions are not those of the records, came
between these expectations and the records; sizes and learning rates were chosen in
them. Of the 48 examples there were none before their expectation.

The experiments: ``evidence`` (the table), ``few-shot`` (the same with 48 examples),
``short base`` (the grid on bases that were pre-trained for a third as long), ``knob``
(λ_SCED, and other α and β, at the learning rate of SCED), and for the first two
``learning-rate`` and ``few-shot learning-rate`` (how each arm's was chosen; ``short
base`` and ``knob`` take those of ``evidence``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import MappingProxyType
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
from ftlib.caref.evidence import Example, sample
from ftlib.caref.objective import Learner, training_loss
from ftlib.caref.selection import adalora, lora, select
from ftlib.caref.settings import (
    BASELINES,
    EVIDENCE,
    FEW_SHOT,
    GRID,
    KNOB,
    LEARNING_RATES,
    SHORT_BASE,
    TRIED_ADALORA,
    TUNING_SEED,
    AdaLora,
    BaseSettings,
    EvidenceSettings,
    Lora,
    Recipe,
    tried_rates,
)
from ftlib.experiments import Arm
from ftlib.metrics.calibration import fit_temperature, temperature_scale
from ftlib.results import PACKED_PREFIX, Metric
from ftlib.runtime import Scale
from ftlib.splits import Split
from ftlib.streams import stream
from ftlib.training import LossFunction, train

Metrics = Mapping[str, Metric | float]


def plan(scale: Scale) -> list[Arm]:
    """Return the arms of the method: the world of evidence at cpu, text at gpu."""
    return evidence_arms() if scale == "cpu" else benchmark_arms()


WORLDS: Mapping[str, EvidenceSettings] = MappingProxyType(
    {
        "evidence": EVIDENCE,
        "few-shot": FEW_SHOT,
        "short base": SHORT_BASE,
        "knob": EVIDENCE,
    }
)
"""Of each experiment."""


def evidence_arms(worlds: Mapping[str, EvidenceSettings] = WORLDS) -> list[Arm]:
    """All arms in the world of evidence; those of the searches first."""
    compared = conditions(worlds)
    searched = [c for c in compared if c.name in LEARNING_RATES.get(c.experiment, ())]
    return [
        *(_tuning_arm(t) for c in searched for t in candidates(c)),
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
        learning_rate: 0 for a base left as it is.
    """

    experiment: str
    name: str
    recipe: Recipe | None
    world: EvidenceSettings
    learning_rate: float

    @property
    def probabilities(self) -> Map:
        """The map from logits to the distributions that the loss trains."""
        if self.recipe and isinstance(self.recipe.loss, FenchelYoungLoss):
            return self.recipe.loss.probabilities
        return partial(torch.softmax, dim=-1)

    def settings(self) -> dict[str, Any]:
        """All that is set, for the record."""
        return {
            **dataclasses.asdict(self.world),
            "arm": self.name,
            "recipe": self.recipe.settings() if self.recipe else None,
            "learning_rate": self.learning_rate,
        }


def conditions(worlds: Mapping[str, EvidenceSettings] = WORLDS) -> list[Condition]:
    """Every way to fine-tune a base that is compared with others."""
    many, few = (
        {"base": 0.0, **rates, "temperature": rates["CE"]}
        for rates in (LEARNING_RATES["evidence"], LEARNING_RATES["few-shot"])
    )
    lent = dict.fromkeys(KNOB, many["SCED"])
    table = {**BASELINES, **GRID}
    return [
        Condition(experiment, name, recipe, worlds[experiment], rates[name])
        for experiment, recipes, rates in (
            ("evidence", table, many),
            ("few-shot", table, few),
            ("short base", GRID, many),
            ("knob", KNOB, lent),
        )
        for name, recipe in recipes.items()
    ]


def candidates(condition: Condition) -> list[Condition]:
    """Return what to choose from: learning rates, and AdaLoRA's ranks and schedules.

    The latter are chosen only in the search with many examples.
    """
    recipe, few = condition.recipe, condition.experiment == "few-shot"
    assert recipe
    recipes = [recipe]
    if isinstance(recipe.weights, AdaLora) and not few:
        recipes = [dataclasses.replace(recipe, weights=w) for w in TRIED_ADALORA]
    return [
        dataclasses.replace(condition, recipe=tried, learning_rate=rate)
        for tried in recipes
        for rate in tried_rates(tried.weights, few)
    ]


def _arm(condition: Condition) -> Arm:
    return Arm(
        condition.experiment,
        condition.name,
        {**condition.settings(), "judge": JUDGE},
        partial(run, condition),
        requires=(JUDGE,),
    )


def _tuning_arm(candidate: Condition) -> Arm:
    assert candidate.recipe
    weights = candidate.recipe.weights
    choice = f"{weights.choice}, " if isinstance(weights, AdaLora) else ""
    searches = {"evidence": "learning-rate", "few-shot": "few-shot learning-rate"}
    return Arm(
        searches[candidate.experiment],
        f"{candidate.name} {choice}{candidate.learning_rate:g}",
        {**candidate.settings(), "method": candidate.name},
        partial(tune, candidate),
    )


# -- one run ---------------------------------------------------------------------------


def run(condition: Condition, seed: int) -> Metrics:
    """Fine-tune a seed's base, and test it."""
    world = condition.world
    model = fine_tune(condition, seed)
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


def tune(condition: Condition, seed: int) -> Metrics:
    """Try a candidate on a seed that is not reported, without a look at a test.

    Returns:
        ``validation``, the share by which candidates are compared, and what else there
        is to say of validation, which shows what depends on the rate.
    """
    seed += TUNING_SEED
    model = fine_tune(condition, seed)
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


def fine_tune(condition: Condition, seed: int) -> nn.Module:
    """Fine-tune the base of a seed; every arm sees the same examples in the same order.

    Returns:
        The model, in which what was trained requires gradients.
    """
    world, recipe = condition.world, condition.recipe
    model = base_model(world.base, seed)
    if recipe is None:
        return model.requires_grad_(False)
    torch.manual_seed(stream(seed, "adapters"))
    weights = recipe.weights
    if isinstance(weights, AdaLora):
        return _train_adalora(model, weights, condition, seed)
    if isinstance(weights, Lora):
        model = get_peft_model(model, lora(**dataclasses.asdict(weights)))
    else:
        select(model, "BASE" if weights == "all" else weights)
    _train(model, condition, seed, training_loss)
    return model


def _train(
    model: nn.Module,
    condition: Condition,
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
        world.training(condition.learning_rate, stream(seed, "order")),
        collate=collate,
        optimizer=optimizer,
        label=condition.name,
    )


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# -- AdaLoRA ---------------------------------------------------------------------------


def _train_adalora(
    model: nn.Module, weights: AdaLora, condition: Condition, seed: int
) -> nn.Module:
    """Train with AdaLoRA, whose ranks are taken away after each step of the optimiser.

    Its gradients are still there then, and they say which ranks matter.
    """
    steps = condition.world.steps
    config = adalora(
        steps,
        rank=weights.rank,
        target_rank=weights.target_rank,
        alpha=weights.alpha,
        dropout=weights.dropout,
    )
    config.tinit = round(steps * weights.begins)
    config.tfinal = steps - round(steps * weights.ends)
    adapted: Any = get_peft_model(model, config)
    rate = condition.learning_rate
    optimizer = AdamW(_trained(adapted), lr=rate, weight_decay=0.0)
    step = count(1)
    optimizer.register_step_post_hook(
        lambda *_: adapted.base_model.update_and_allocate(next(step))
    )

    def loss(learner: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, Any]]:
        value, metrics = training_loss(learner, batch)
        return value + config.orth_reg_weight * non_orthogonality(adapted), metrics

    _train(adapted, condition, seed, loss, optimizer)
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
