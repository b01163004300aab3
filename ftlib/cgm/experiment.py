"""The CGM experiments: arms × seeds → records.

``mixture``: everything exact. ``stories``: template stories, everything but the KL
exact. ``learning-rate``: how the learning rates of ``stories`` were chosen.
``tales``: a real language model, measured from its own stories. Beyond stories there
are ``digits_experiment``, ``strings_experiment``, ``diffusion_experiment`` and, for
what a practitioner has to choose, ``practice_experiment``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ftlib import models, runtime
from ftlib.cgm import (
    diffusion_experiment,
    digits_experiment,
    mixture,
    practice_experiment,
    stories,
    strings_experiment,
    tales,
)
from ftlib.cgm.calibrate import calibrate, frozen_copy
from ftlib.cgm.dual import InfeasibleTargetError, balanced_kl
from ftlib.cgm.estimates import mean_and_error
from ftlib.cgm.imitation import balanced_rows, imitate
from ftlib.cgm.language import Continuations, PromptedLM, per_prompt
from ftlib.cgm.settings import (
    MIXTURE,
    STORIES,
    STORY_LEARNING_RATES,
    TALES,
    TRIED_LEARNING_RATES,
    TUNING_SEED,
    CalibrationSettings,
    Loss,
    MixtureSettings,
    StorySettings,
    TaleSettings,
)
from ftlib.experiments import Arm
from ftlib.models.registry import weights_checksums
from ftlib.models.tiny import tiny_gpt
from ftlib.results import Metric
from ftlib.runtime import Scale
from ftlib.training import TrainingSettings, train

Metrics = Mapping[str, Metric | float]
FineTuning = Callable[[PromptedLM], None]


def plan(scale: Scale) -> list[Arm]:
    """Return the arms of the method at a scale; the small exact worlds: cpu only."""
    exact = [*mixture_arms(), *story_arms(), *learning_rate_arms()]
    return [
        *(exact if scale == "cpu" else []),
        *tale_arms(TALES[scale]),
        *digits_experiment.arms(scale),
        *strings_experiment.arms(scale),
        *practice_experiment.arms(scale),
        *diffusion_experiment.arms(scale),
    ]


# -- mixture ---------------------------------------------------------------------------


def mixture_arms(world: MixtureSettings = MIXTURE) -> list[Arm]:
    """CGM-relax over λ and CGM-reward over N on the one-dimensional mixture."""
    relax = [
        CalibrationSettings("relax", world.training, kl_weight=weight)
        for weight in world.kl_weights
    ]
    reward = [
        CalibrationSettings("reward", world.training, dual_samples=n)
        for n in world.dual_samples
    ]
    return [
        Arm(
            "mixture",
            arm_name(settings),
            {**dataclasses.asdict(settings), "target": world.target},
            partial(calibrate_mixture, settings, world.target),
        )
        for settings in [*relax, *reward]
    ]


def calibrate_mixture(
    settings: CalibrationSettings, target: float, seed: int
) -> Metrics:
    """Calibrate the two bumps and evaluate them exactly.

    A dual without a solution is a result: the metrics are then not-a-number.
    """
    model = mixture.two_bumps().to(runtime.device())
    base = frozen_copy(model)
    try:
        calibrate(model, mixture.right_of_zero, torch.tensor([target]), settings)
    except InfeasibleTargetError:
        missing = dict.fromkeys(("mass", "violation", "kl"), float("nan"))
        return {"feasible": 0.0, **missing}
    mass = float(model.double_copy().mass_right_of_zero())
    return {
        "feasible": 1.0,
        "mass": mass,
        "violation": (mass - target) ** 2,
        "kl": model.kl_from(base),
    }


# -- template stories ------------------------------------------------------------------


def story_arms(world: StorySettings = STORIES) -> list[Arm]:
    """All losses, and balanced fine-tuning, on the same budget of samples."""
    relax = [
        story_settings("relax", kl_weight=weight, world=world)
        for weight in world.kl_weights
    ]
    baseline = story_settings(
        "relax", kl_weight=0.1, violation_baseline=True, world=world
    )
    reward = [
        story_settings("reward", dual_samples=n, world=world)
        for n in world.dual_samples
    ]
    forward = story_settings(
        "forward_kl", dual_samples=max(world.dual_samples), world=world
    )
    arms = [
        _story_arm(arm_name(s), s.training, partial(calibrate_stories, s), world)
        for s in [*relax, baseline, *reward, forward]
    ]
    imitation = world.training(STORY_LEARNING_RATES["balanced SFT"])
    imitate = partial(imitate_balanced, imitation)
    return [
        _story_arm("base", None, lambda model: None, world),
        *arms,
        _story_arm("balanced SFT", imitation, imitate, world),
    ]


def _story_arm(
    name: str,
    training: TrainingSettings | None,
    fine_tune: FineTuning,
    world: StorySettings,
) -> Arm:
    rate = {"learning_rate": training.learning_rate} if training else {}
    return Arm(
        "stories",
        name,
        {**dataclasses.asdict(world), **rate, "arm": name},
        partial(_run_stories, world, fine_tune),
    )


def story_settings(
    loss: Loss,
    *,
    kl_weight: float | None = None,
    dual_samples: int | None = None,
    violation_baseline: bool = False,
    learning_rate: float | None = None,
    world: StorySettings = STORIES,
) -> CalibrationSettings:
    """Settings of a loss on the stories, with its learning rate unless one is given."""
    return CalibrationSettings(
        loss,
        world.training(learning_rate or STORY_LEARNING_RATES[loss]),
        kl_weight=kl_weight,
        dual_samples=dual_samples,
        violation_baseline=violation_baseline,
    )


def learning_rate_arms(world: StorySettings = STORIES) -> list[Arm]:
    """Each method at each learning rate, on seeds that are not reported."""
    return [
        Arm(
            "learning-rate",
            f"{name} {rate:g}",
            {**dataclasses.asdict(world), "method": name, "learning_rate": rate},
            partial(_run_stories, world, fine_tune, offset=TUNING_SEED),
        )
        for rate in TRIED_LEARNING_RATES
        for name, fine_tune in _tuned_at(rate, world).items()
    ]


def _tuned_at(rate: float, world: StorySettings) -> dict[str, FineTuning]:
    at_rate = partial(story_settings, learning_rate=rate, world=world)
    most = max(world.dual_samples)
    settings = [
        at_rate("relax", kl_weight=0.1),
        at_rate("reward", dual_samples=most),
        at_rate("forward_kl", dual_samples=most),
    ]
    methods: dict[str, FineTuning] = {
        s.loss: partial(calibrate_stories, s) for s in settings
    }
    methods["balanced SFT"] = partial(imitate_balanced, world.training(rate))
    return methods


def story_base(world: StorySettings, seed: int) -> PromptedLM:
    """A small GPT pretrained on the template stories, asked about trained professions.

    A fresh copy on every call; a seed is pretrained once in a process.
    """
    model = tiny_gpt(len(stories.VOCABULARY), width=world.width)
    model.load_state_dict(_pretrained(world, seed))
    return asked_about(model.to(runtime.device()).eval(), list(stories.TRAINED))


@lru_cache(maxsize=2)
def _pretrained(world: StorySettings, seed: int) -> dict[str, Tensor]:
    # A generator state of its own: the caller's random numbers must not depend on
    # whether the model was in the cache.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tiny_gpt(len(stories.VOCABULARY), width=world.width)
        text = stories.corpus(world.corpus, torch.Generator().manual_seed(seed))
        settings = dataclasses.replace(world.pretraining, seed=seed)
        train(model, text, next_token_loss, settings, label="pretraining")
    return {name: value.cpu() for name, value in model.state_dict().items()}


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean next-token loss in nats on complete stories, integer [n, T]."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def asked_about(model: nn.Module, professions: list[str]) -> PromptedLM:
    """A story model with a prompt for each profession."""
    end = stories.VOCABULARY.index(stories.END)
    prompts = stories.prompts(professions)
    device = next(model.parameters()).device
    return PromptedLM(model, prompts, stories.STORY_TOKENS, end).to(device)


def story_constraints(samples: Continuations) -> Tensor:
    """±K for a woman's or a man's name in the column of the profession: [n, K]."""
    return per_prompt(stories.gender(samples), samples.prompt, len(stories.TRAINED))


def calibrate_stories(settings: CalibrationSettings, model: PromptedLM) -> None:
    """Calibrate every trained profession to as many women as men."""
    calibrate(
        model,
        story_constraints,
        torch.zeros(len(stories.TRAINED)),
        settings,
        strata=lambda samples: samples.prompt,
    )


def imitate_balanced(training: TrainingSettings, model: PromptedLM) -> None:
    """Fine-tune on a balanced set of the model's own stories.

    As many base stories are drawn as the other arms draw during their training, and
    each profession keeps as many of one gender as of the other.
    """
    drawn = model.sample(training.steps * training.batch_size)
    gender = stories.gender(drawn)
    label = torch.where(gender == 0, -1, 2 * drawn.prompt + (gender < 0))
    kept = balanced_rows(label, 2 * len(stories.TRAINED))
    imitate(model, drawn[kept], training)


def _run_stories(
    world: StorySettings,
    fine_tune: FineTuning,
    seed: int,
    *,
    offset: int = 0,
) -> Metrics:
    model = story_base(world, seed + offset)
    base = frozen_copy(model)
    fine_tune(model)
    return evaluate_stories(model, base, world.evaluation_samples)


def evaluate_stories(model: PromptedLM, base: PromptedLM, samples: int) -> Metrics:
    """Exact imbalance and agreement; KL from ``samples`` stories; the smallest KL."""
    trained = stories.exact(model)
    unseen = stories.exact(asked_about(model.model, list(stories.HELD_OUT)))
    kl = model.kl_from(base, model.sample(samples))
    before = stories.exact(base)
    smallest_kl = float(balanced_kl(before.female, before.male).mean())
    metrics: dict[str, Metric | float] = {
        "mean_abs_imbalance": float(trained.imbalance.abs().mean()),
        "violation": float(trained.imbalance.square().sum()),
        "held_out_imbalance": float(unseen.imbalance.abs().mean()),
        "agreement": float(trained.agreement.mean()),
        "kl": Metric(float(kl.mean()), samples),
        "smallest_kl": smallest_kl,
        "excess_kl": Metric(float(kl.mean()) / smallest_kl - 1, samples),
    }
    for profession, value in zip(stories.TRAINED, trained.female, strict=True):
        metrics[f"female/{profession}"] = float(value)
    for profession, value in zip(stories.HELD_OUT, unseen.female, strict=True):
        metrics[f"female/{profession}"] = float(value)
    return metrics


# -- a real language model -------------------------------------------------------------


def tale_arms(world: TaleSettings) -> list[Arm]:
    """The base model and every loss on stories of a real language model."""
    settings = partial(
        CalibrationSettings,
        training=world.training,
        score_chunk=world.score_chunk,
        check_samples=world.batch_size,
    )
    relax = [
        settings("relax", kl_weight=weight, violation_baseline=True)
        for weight in world.kl_weights
    ]
    reward = [settings("reward", dual_samples=n) for n in world.dual_samples]
    arms = {"base": None} | {arm_name(s): s for s in [*relax, *reward]}
    return [
        Arm(
            "tales",
            name,
            {**dataclasses.asdict(world), "arm": name},
            partial(_run_tales, world, chosen),
            data=weights_checksums(world.model),
            requires=[world.model],
        )
        for name, chosen in arms.items()
    ]


def storyteller(world: TaleSettings) -> tales.Storyteller:
    """Load the model of the experiment, asked about the trained professions.

    Raises:
        ModelUnavailable: it is not at hand and cannot be fetched.
    """
    model, tokenizer = models.load_causal_lm(world.model, dtype=torch.float32)
    teller = tales.Storyteller(model, tokenizer, world.trained, world.max_new_tokens)
    return teller.to(runtime.device())


def _run_tales(
    world: TaleSettings, settings: CalibrationSettings | None, seed: int
) -> Metrics:
    model = storyteller(world)
    base = frozen_copy(model)
    if settings:
        calibrate(
            model,
            model.gender_constraints,
            torch.zeros(len(world.trained)),
            settings,
            strata=lambda samples: samples.prompt,
        )
    return evaluate_tales(model, base, world)


def evaluate_tales(
    model: tales.Storyteller, base: tales.Storyteller, world: TaleSettings
) -> Metrics:
    """Imbalance on trained and held-out professions, KL, and name–pronoun fit."""
    everyone = model.asked_about([*world.trained, *world.held_out])
    report = tales.gender_report(everyone, world.evaluation_samples, world.score_chunk)
    total = world.evaluation_samples * len(world.trained)
    kl = tales.sequence_kl(model, base, total, world.score_chunk)
    return {
        **report,
        "mean_abs_imbalance": tales.mean_abs_imbalance(report, world.trained),
        "held_out_imbalance": tales.mean_abs_imbalance(report, world.held_out),
        "kl_to_balance": tales.kl_to_balance(report, world.trained),
        **mean_and_error("kl", kl),
    }


# -- shared ----------------------------------------------------------------------------


def arm_name(settings: CalibrationSettings) -> str:
    """How a loss and its knob are called in records and figures."""
    if settings.loss == "relax":
        extra = ", baseline" if settings.violation_baseline else ""
        return f"relax λ={settings.kl_weight:g}{extra}"
    name = settings.loss.replace("_kl", "-KL")
    return f"{name} N={settings.dual_samples}"
