"""Every hyperparameter of the combination, all of them ours.

Questions, steps, batch and schedule are those of CFT's chapter
(``ftlib.cft.settings.CHAINS``), so that its records can be laid beside these. That
AdamW has no weight decay is common to both chapters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ftlib.cft.settings import CHAINS, ChainSettings
from ftlib.ctsft.heads import HeadTensor
from ftlib.ctsft.tuning import Recipe

# The base is a GPT-2, in which every head has a q, k, v and o of its own. CT-SFT's
# chapter leaves k and v out because heads share them there.
_TENSORS: tuple[HeadTensor, ...] = ("q", "k", "v", "o")

# Fewer questions than the chapter tests with, since all is measured on the way too.
_WORLD = dataclasses.replace(CHAINS, test=300)


@dataclass(frozen=True)
class Settings:
    """What all arms have in common.

    Attributes:
        world: base, questions, steps and batch.
        heads: how many an arm of heads trains, of the twelve.
        looks: how many times all is measured on the way, evenly; divides the steps.
        critiques: answers to be criticised in each of the tests of critiques.
        draws: random circuits of each size to compare the found one with.
    """

    world: ChainSettings = _WORLD
    heads: int = 4
    looks: int = 4
    critiques: int = 300
    draws: int = 10

    def __post_init__(self) -> None:
        if self.looks < 1 or self.world.steps % self.looks:
            raise ValueError(
                f"{self.looks} looks at {self.world.steps} steps: the last must be at"
                " the end, so that their number divides that of the steps"
            )


COMBINATION = Settings()
SIZES = (1, 2, 4, 6, 8, 10, 12)
"""Numbers of heads of which it is measured how faithful they are."""

ARMS: Mapping[str, Recipe] = MappingProxyType(
    {
        "full": Recipe("all"),
        "circuit": Recipe("circuit", _TENSORS),
        "random": Recipe("random", _TENSORS),
        "norms": Recipe("norms"),
        "LoRA": Recipe("lora", _TENSORS),
    }
)
"""The ways to train; norms are trained in all arms of heads."""

# The search tries these on seeds 1000 and 1001, which are not reported. For each arm
# the best mean of gap and no-gap questions of validation, after the last step, is
# taken.
TUNING_SEED = 1000
_TRIED: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "full": (1e-4, 3e-4, 1e-3),
        "norms": (1e-2, 3e-2, 1e-1),
    }
)
_TRIED_OTHERWISE = (3e-4, 1e-3, 3e-3, 1e-2)
LEARNING_RATES: Mapping[str, float] = MappingProxyType(
    {
        "full": 3e-4,
        "circuit": 1e-3,
        "random": 1e-3,
        "norms": 3e-2,
        "LoRA": 1e-3,
    }
)
"""As chosen by the search."""
LOWER = 1e-4
"""The lower rate of full fine-tuning."""
OTHER_SIZES = (2, 6, 12)
"""How many heads the circuit has in the experiment ``heads``."""


def tried(arm: str) -> tuple[float, ...]:
    """Return the learning rates that an arm's is chosen from."""
    return _TRIED.get(arm, _TRIED_OTHERWISE)
