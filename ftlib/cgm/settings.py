"""Every hyperparameter of the CGM experiments, with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ftlib.runtime import Scale
from ftlib.training import TrainingSettings

Loss = Literal["relax", "reward", "forward_kl"]


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate a model.

    Attributes:
        loss: ``relax``, ``reward`` or the baseline ``forward_kl``.
        training: steps, batch, learning rate; a step draws one fresh batch, as in the
            paper's code (``batch_size`` is its n).
        kl_weight: λ of CGM-relax.
        dual_samples: N, base samples the dual is solved on, for the other two losses.
        dual_ridge: λ of the ridge with which that dual is solved. With 0 it is the
            constrained problem's, as in the paper; above 0 it always has a solution.
        violation_baseline: subtract a baseline on the violation (relax only).
        score_chunk: samples scored at a time, to bound memory; None for all.
        check_samples: samples drawn first to check that scores match samples; 0 to
            skip the check.

    Raises:
        ValueError: a loss without its own setting, or with another loss's.
    """

    loss: Loss
    training: TrainingSettings
    kl_weight: float | None = None
    dual_samples: int | None = None
    dual_ridge: float = 0.0
    violation_baseline: bool = False
    score_chunk: int | None = None
    check_samples: int = 256

    def __post_init__(self) -> None:
        """Refuse settings that contradict one another."""
        relax = self.loss == "relax"
        if relax != (self.kl_weight is not None):
            raise ValueError("kl_weight (λ) belongs to the relax loss, which needs it")
        if relax == (self.dual_samples is not None):
            raise ValueError(
                "dual_samples (N) belongs to the reward and forward-KL losses, "
                "which need it"
            )
        if self.kl_weight is not None and self.kl_weight <= 0:
            raise ValueError(f"kl_weight (λ) must be positive, not {self.kl_weight}")
        if self.violation_baseline and not relax:
            raise ValueError("violation_baseline belongs to the relax loss")
        if self.dual_ridge < 0 or (self.dual_ridge and relax):
            raise ValueError(
                "dual_ridge belongs to the reward and forward-KL losses and is at "
                f"least 0, not {self.dual_ridge} with {self.loss}"
            )


def _training(steps: int, batch_size: int, learning_rate: float) -> TrainingSettings:
    """Adam without clipping or decay and a cosine to zero, as in the paper's code."""
    return TrainingSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule="cosine",
        weight_decay=0.0,
        max_grad_norm=None,
        shuffle=False,
    )


_MIXTURE_TRAINING = _training(400, 256, 0.02)
_PRETRAINING = TrainingSettings(
    steps=600, batch_size=256, learning_rate=3e-3, warmup_steps=20
)


@dataclass(frozen=True)
class MixtureSettings:
    """The one-dimensional Gaussian mixture.

    The mixture, the target, λ and N span what the paper's scripts span (λ from 1 to
    1e-4, N from 5 to 1e5). Steps, batch and learning rate are ours, because the weights
    are trained directly here and not through a diffusion.
    """

    target: float = 0.8
    kl_weights: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
    dual_samples: tuple[int, ...] = (10, 100, 1_000, 10_000)
    training: TrainingSettings = _MIXTURE_TRAINING


@dataclass(frozen=True)
class StorySettings:
    """The template stories: everything here is ours."""

    width: int = 64
    corpus: int = 50_000
    pretraining: TrainingSettings = _PRETRAINING
    steps: int = 200
    batch_size: int = 256
    kl_weights: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03)
    dual_samples: tuple[int, ...] = (256, 4096)
    evaluation_samples: int = 4096

    def training(self, learning_rate: float) -> TrainingSettings:
        """Fine-tuning settings, the same budget of samples for every method."""
        return _training(self.steps, self.batch_size, learning_rate)


@dataclass(frozen=True)
class TaleSettings:
    """Profession and gender in stories of a real language model (paper, section 8.2).

    Attributes:
        model: short name in ``ftlib.models``.
        trained: professions with a constraint each.
        held_out: professions that only the evaluation asks about.
        max_new_tokens: longest continuation; the paper's is 200.
        batch_size: n; the paper's is 512.
        steps: the paper's code takes 200.
        learning_rate: for all weights of the small models; the paper's is 2e-6 on LoRA
            weights of a 9 B model.
        kl_weights: λ; 0.1 in the paper's example.
        dual_samples: N; 4,096 in the paper's example.
        evaluation_samples: stories for each profession; 2,048 in the paper.
        score_chunk: stories scored at a time.
    """

    model: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    max_new_tokens: int
    batch_size: int
    steps: int
    learning_rate: float
    kl_weights: tuple[float, ...]
    dual_samples: tuple[int, ...]
    evaluation_samples: int
    score_chunk: int

    @property
    def training(self) -> TrainingSettings:
        """Training settings of every loss."""
        return _training(self.steps, self.batch_size, self.learning_rate)


MIXTURE = MixtureSettings()
STORIES = StorySettings()

# The experiment ``learning-rate`` tries these on seeds from 1000 up, which are not
# reported. For each method the best is taken: the smallest exact violation + 0.1 KL.
TRIED_LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
TUNING_SEED = 1000
STORY_LEARNING_RATES = {
    "relax": 3e-4,
    "reward": 3e-4,
    "forward_kl": 1e-3,
    "balanced SFT": 1e-3,
}

# The paper's professions (its code, gemma/).
PAPER_TRAINED = (
    *("doctor", "lawyer", "teacher", "pilot"),
    *("chef", "scientist", "nurse", "artist"),
)
PAPER_HELD_OUT = ("sheriff", "judge", "accountant", "dancer", "athlete", "baker")

TALES: dict[Scale, TaleSettings] = {
    "cpu": TaleSettings(
        model="stories15m",
        trained=("doctor", "nurse", "teacher", "pilot"),
        held_out=("lawyer", "chef", "dancer"),
        max_new_tokens=12,
        batch_size=96,
        steps=40,
        learning_rate=1e-5,
        kl_weights=(1.0,),
        dual_samples=(1024,),
        evaluation_samples=128,
        score_chunk=96,
    ),
    "gpu": TaleSettings(
        model="smollm2-135m",
        trained=PAPER_TRAINED,
        held_out=PAPER_HELD_OUT,
        max_new_tokens=64,
        batch_size=512,
        steps=200,
        learning_rate=5e-6,
        kl_weights=(1.0, 0.3, 0.1),
        dual_samples=(4096,),
        evaluation_samples=2048,
        score_chunk=128,
    ),
    # Shown beside ours, never run: Gemma-2-9B-IT with LoRA (r = 32, α = 64).
    "paper": TaleSettings(
        model="gemma-2-9b-it",
        trained=PAPER_TRAINED,
        held_out=PAPER_HELD_OUT,
        max_new_tokens=200,
        batch_size=512,
        steps=200,
        learning_rate=2e-6,
        kl_weights=(0.1,),
        dual_samples=(4096,),
        evaluation_samples=2048,
        score_chunk=8,
    ),
}


# -- digits ----------------------------------------------------------------------------


# -- strings ---------------------------------------------------------------------------


# -- diffusion -------------------------------------------------------------------------
