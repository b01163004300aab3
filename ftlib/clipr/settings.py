"""Every number that CLIPR is run with.

All of them are ours: of the paper's it is only known that there are batches, a gate and
few interactions. Those of synthesis were chosen on toy tasks with simulated users of
seeds from 1000 up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class ConversationSettings:
    """What the conversation before any decision is held with.

    Attributes:
        questions: the most that are asked.
        candidates: imagined users by whose answers a question is judged.
        matters: prior probability that a dimension matters to a user.
        deviates: prior probability that a dimension is valued otherwise in a family.
        error: probability that an answer is not what the user would choose.
        enough: bits on an example task, on average, below which nothing is asked.
        few: share of the imagined users; fewer effective ones are renewed.
        kept: of a renewed user's distance from the mean: Liu and West's a.
    """

    questions: int = 6
    candidates: int = 4000
    matters: float = 0.5
    deviates: float = 0.15
    error: float = 0.05
    enough: float = 0.02
    few: float = 0.25
    kept: float = 0.99


@dataclass(frozen=True)
class SynthesisSettings:
    """How answers become rules.

    Attributes:
        inverse_penalty: scikit-learn's C of the L1 penalty: the larger, the more rules.
        family_scale: what a family's own preference costs more than one for all
            families: the columns of families are multiplied by this.
        threshold: utility below which a preference is none.
    """

    inverse_penalty: float = 5.0
    family_scale: float = 0.4
    threshold: float = 0.2


@dataclass(frozen=True)
class GateSettings:
    """When the user is asked to correct decisions.

    Attributes:
        target: p₀, the share of accepted decisions that is aimed at.
        certainty: the gate opens if P(share < p₀) is at least this.
        drop: it also opens if the share fell by more than this below its best.
        window: batches that are looked back on.
        patience: K, the batches in a row at or above p₀ after which rules are frozen;
            ``None`` for never, as for a user who may change.
        prior: of accepted and rejected decisions, the parameters of a Beta.
    """

    target: float = 0.9
    certainty: float = 0.7
    drop: float = 0.2
    window: int = 2
    patience: int | None = 4
    prior: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class RefinementSettings:
    """How corrections change rules.

    Attributes:
        minimum: support less what is against it; a rule at or below this is deleted.
        memory: the most answers that a rule's support counts, so that a change of mind
            outweighs it in time.
        spread: families with the same rule of their own from which it is for all.
        max_weight: of a rule.
    """

    minimum: int = 0
    memory: int = 8
    spread: int = 2
    max_weight: int = 9


@dataclass(frozen=True)
class Settings:
    """What CLIPR and Adaptive-CLIPR are run with.

    Attributes:
        adaptive: whether there is a gate; without one the rules stay as they are.
        batch: B, decisions between two looks at the gate.
        corrections: the most that are asked for when the gate opens.
        turns: the most turns of the user in all, answers and corrections together;
            ``None`` for no limit.
        conversation: before the first decision.
        synthesis: of rules from answers.
        gate: between batches.
        refinement: of rules by corrections.
    """

    adaptive: bool = True
    batch: int = 8
    corrections: int = 3
    turns: int | None = None
    conversation: ConversationSettings = ConversationSettings()
    synthesis: SynthesisSettings = SynthesisSettings()
    gate: GateSettings = GateSettings()
    refinement: RefinementSettings = RefinementSettings()


# --- experiments --------------------------------------------------------------

World = Literal["kitchens", "manipulation"]

BUDGETS = (6, 12, 24, 48)
"""Turns of the user that methods are compared at."""

MAIN_BUDGET = 24
"""Turns where only one number of them is tried."""


@dataclass(frozen=True)
class Temper:
    """How a simulated user is not ideal.

    Attributes:
        noise: probability that an answer, a reaction or a correction is wrong.
        patience: turns after which the user says nothing any more.
        changes_after: reactions after which the user becomes another; ``None`` for
            never.
        gives_reasons: whether a correction says why.
    """

    noise: float = 0.0
    patience: int | None = None
    changes_after: int | None = None
    gives_reasons: bool = True


@dataclass(frozen=True)
class Population:
    """Simulated users, and the tasks of each.

    Attributes:
        world: which tasks.
        people: users of a seed.
        examples: tasks to talk about before anything is decided.
        stream: tasks that are decided while something may still be learnt.
        test: of new tasks in families that were met, and of families that were not.
            Mobile Manipulation has all there are.
        temper: of all users.
    """

    world: World = "kitchens"
    people: int = 20
    examples: int = 24
    stream: int = 120
    test: int = 100
    temper: Temper = Temper()


# With fewer imagined users than the default an ask takes a quarter of the time, and in
# trials with seeds from 1000 up as much was learnt. Questions go on until next to
# nothing is left to learn, so that it is the budget that ends a conversation.
TALK = ConversationSettings(candidates=1000, enough=0.005)


def within(turns: int, adaptive: bool) -> Settings:
    """Return settings that keep to a number of turns.

    CLIPR asks questions with all of them, Adaptive-CLIPR with half.
    """
    questions = turns // 2 if adaptive else turns
    conversation = replace(TALK, questions=questions)
    return Settings(adaptive=adaptive, turns=turns, conversation=conversation)


# Of the baselines: examples or corrections that are looked up, and scikit-learn's C of
# the reward's L2 penalty.
NEAREST = 5
REWARD_INVERSE_PENALTY = 1.0

# --- distillation -------------------------------------------------------------


@dataclass(frozen=True)
class DistillationSettings:
    """How a small language model learns to choose as rules do.

    Attributes:
        steps: updates of the adapters.
        batch_size: tasks in a step.
        rank: of the adapters; their scale is twice that.
    """

    steps: int = 30
    batch_size: int = 8
    rank: int = 8


STUDENT_TURNS = 12
"""Questions to a user whose rules are handed on, and choices of one who is copied."""

# The search tries these on seeds from 1000 up, which are not reported.
TUNING_SEED = 1000
TRIED_RATES = (1e-3, 3e-3, 1e-2)
STUDENT_RATES: Mapping[str, float] = MappingProxyType(
    {
        "stories15m": 3e-3,
        # Guesses: at scale gpu no search was run yet.
        "smollm2-135m": 1e-3,
        "qwen2.5-0.5b": 1e-3,
    }
)
"""Learning rates by student."""
