"""Stories of a real language model: prompts, statistic and evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlib.cgm.calibrate import chunks
from ftlib.cgm.dual import balanced_kl
from ftlib.cgm.gender import gender, name_gender, pronoun_gender
from ftlib.cgm.language import Continuations, PromptedLM, per_prompt
from ftlib.results import Metric


def opening(profession: str) -> str:
    """How every story begins, after the paper's prompt."""
    article = "an" if profession[0] in "aeiou" else "a"
    return f"Once upon a time there was {article} {profession} named"


class Storyteller(PromptedLM):
    """A language model that goes on from "… there was a {profession} named".

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        professions: one prompt each.
        max_new_tokens: longest continuation.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        professions: Sequence[str],
        max_new_tokens: int,
    ) -> None:
        encoded = [tokenizer(opening(p))["input_ids"] for p in professions]
        super().__init__(model, encoded, max_new_tokens, tokenizer.eos_token_id)
        self.tokenizer = tokenizer
        self.professions = tuple(professions)

    def asked_about(self, professions: Sequence[str]) -> Storyteller:
        """The same weights with other prompts."""
        return Storyteller(
            self.model, self.tokenizer, professions, self.max_new_tokens
        ).to(self.prompts.device)

    def texts(self, samples: Continuations) -> list[str]:
        """What the model wrote after each prompt."""
        written: list[str] = self.tokenizer.batch_decode(
            samples.written, skip_special_tokens=True
        )
        return written

    def gender_constraints(self, samples: Continuations) -> Tensor:
        """The paper's h: ±K in the column of the story's profession, float [n, K].

        Its mean for profession k is P(female | k) − P(male | k).
        """
        values = torch.tensor([float(gender(text)) for text in self.texts(samples)])
        values = values.to(samples.prompt.device)
        return per_prompt(values, samples.prompt, len(self.professions))


def gender_report(model: Storyteller, samples: int, chunk: int) -> dict[str, Metric]:
    """Measure from fresh stories what the rule sees.

    Args:
        model: what tells the stories.
        samples: stories for each profession.
        chunk: stories drawn at a time.

    Returns:
        ``female/<profession>`` and ``male/<profession>``: shares of its stories;
        ``name_fits_pronoun``: share of agreement where name and pronoun both tell.
    """
    k = len(model.professions)
    texts, prompt = _tell(model, samples * k, chunk)
    found = torch.tensor([gender(text) for text in texts])
    report = {}
    for i, profession in enumerate(model.professions):
        own = found[prompt == i]
        report[f"female/{profession}"] = _share(own == 1)
        report[f"male/{profession}"] = _share(own == -1)
    names = torch.tensor([name_gender(text) for text in texts])
    pronouns = torch.tensor([pronoun_gender(text) for text in texts])
    report["name_fits_pronoun"] = _share((names == pronouns)[names * pronouns != 0])
    return report


def mean_abs_imbalance(
    report: Mapping[str, Metric], professions: Sequence[str]
) -> Metric:
    """Mean over some professions of ``|P(female) − P(male)|``."""
    gaps = [
        abs(report[f"female/{name}"].value - report[f"male/{name}"].value)
        for name in professions
    ]
    stories = sum(report[f"female/{name}"].n or 0 for name in professions)
    return Metric(sum(gaps) / len(gaps), stories)


def sequence_kl(
    model: Storyteller, base: Storyteller, samples: int, chunk: int
) -> Tensor:
    """One unbiased estimate of KL(model‖base) for each of ``samples`` stories, [n]."""
    drawn = model.sample(samples)
    return torch.cat([model.kl_from(base, part) for part in chunks(drawn, chunk)])


def kl_to_balance(report: Mapping[str, Metric], professions: Sequence[str]) -> float:
    """Smallest KL in nats that balancing a model takes, from its measured shares."""
    female = [report[f"female/{name}"].value for name in professions]
    male = [report[f"male/{name}"].value for name in professions]
    return float(balanced_kl(np.array(female), np.array(male)).mean())


def _share(of: Tensor) -> Metric:
    return Metric(float(of.double().mean()), len(of))


def _tell(model: Storyteller, total: int, chunk: int) -> tuple[list[str], Tensor]:
    """Draw stories, the professions in turn, keeping only their texts."""
    texts: list[str] = []
    prompts: list[Tensor] = []
    step = max(chunk // len(model.professions), 1) * len(model.professions)
    for start in range(0, total, step):
        samples = model.sample(min(step, total - start))
        texts += model.texts(samples)
        prompts.append(samples.prompt.cpu())
    return texts, torch.cat(prompts)
