"""A reasoner that knows words, by their embeddings, and nothing of attributes.

Who has the rules as text, and options with names alone, can still tell that "small
steel mug" is nearer to "steel" than "small glass mug" is. Words here is a sentence
encoder: texts are embedded by the mean of their last hidden states, and compared by the
cosine. The paper has nothing like it; it is the cheapest reader of rules that has
never seen their dimensions.

.. code-block:: python

   words = Words()
   words.cosine("steel", ["small steel mug", "small glass mug"])
   EmbeddedReasoner(words).decide(task, rules)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import normalize

from ftlib.clipr.reasoners import SymbolicReasoner
from ftlib.clipr.rules import Rule, RuleSet
from ftlib.clipr.settings import Settings
from ftlib.clipr.tasks import Decision, Option, Task
from ftlib.clipr.tidybot import Condition, Placement, Scenario, Trial
from ftlib.metrics.bertscore import Encoder, load_encoder

Floats = npt.NDArray[np.float64]

ENCODER = ("minilm-l6", 6)
"""Short name, and the layer that is taken: the last."""

_BATCH = 64


class Words:
    """Embeds texts, each once.

    Args:
        encoder: what embeds; by default :data:`ENCODER`.
    """

    def __init__(self, encoder: Encoder | None = None) -> None:
        self.encoder = encoder or load_encoder(*ENCODER)
        self._known: dict[str, Floats] = {}

    def embed(self, texts: Sequence[str]) -> Floats:
        """Return unit vectors, (texts, features)."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        for first in range(0, len(new), _BATCH):
            batch = new[first : first + _BATCH]
            self._known.update(zip(batch, self._embedded(batch), strict=True))
        return np.stack([self._known[text] for text in texts])

    def cosine(self, text: str, others: Sequence[str]) -> Floats:
        """Return the cosine of a text with each of others, (others,)."""
        vector, *vectors = self.embed([text, *others])
        return np.stack(vectors) @ vector

    def likeness(self, a: Option, b: Option) -> float:
        """Return the cosine of two options' names.

        It takes the place of the attributes' in
        :class:`ftlib.clipr.baselines.NearestExamples`.
        """
        return float(self.cosine(a.name, [b.name])[0])

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str]) -> Floats:
        """Average hidden states over tokens, those that begin and end a text too."""
        model, layer = self.encoder.model, self.encoder.layer
        inputs = self.encoder.tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt"
        ).to(next(model.parameters()).device)
        states = model(**inputs, output_hidden_states=True).hidden_states[layer]
        mask = inputs["attention_mask"][..., None]
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return normalize(means.double(), dim=1).cpu().numpy()


class EmbeddedReasoner(SymbolicReasoner):
    """Decides by the words of rules and of options' names.

    It asks, writes and revises as a :class:`.SymbolicReasoner`, for which options need
    attributes; to decide they need none.

    Args:
        words: embeds them.
        settings: of what is inherited.
        seed: of the users that are imagined.
    """

    def __init__(
        self, words: Words, settings: Settings | None = None, seed: int = 0
    ) -> None:
        super().__init__(settings, seed)
        self.words = words

    def decide(self, task: Task, rules: RuleSet) -> Decision:
        """Take the option that is nearest to what rules prefer.

        An option's score is the sum, over the rules that hold in the family and do not
        except it, of weight · (cosine with what is preferred − cosine with what that is
        preferred over). Both are worded as value and dimension, as in "whole grain",
        which in trials was right more often than the value alone. "Anything else" has
        no words, and nothing is subtracted for it. A rule also speaks where its
        dimension has no place, for nothing tells that it has none.
        """
        self.usage.calls += 1
        with self.usage.timed():
            holding = [
                at for at, rule in enumerate(rules) if rule.holds_in(task.family)
            ]
            names = [option.name for option in task.options]
            scores = sum(
                (self._opinion(rules[at], names) for at in holding),
                start=np.zeros(len(names)),
            )
            return Decision.highest(scores.tolist(), tuple(holding))

    def _opinion(self, rule: Rule, names: Sequence[str]) -> Floats:
        """Return what a rule adds to the score of each name, (names,)."""
        liked = self.words.cosine(f"{rule.preferred} {rule.dimension}", names)
        if rule.over is not None:
            worse = self.words.cosine(f"{rule.over} {rule.dimension}", names)
            liked = liked - worse
        excepted = [value.casefold() for _, value in rule.except_values]
        speaks = [not any(v in name.casefold() for v in excepted) for name in names]
        return rule.weight * np.where(speaks, liked, 0.0)


# --- TidyBot without a language model -----------------------------------------


def like_seen(words: Words, scenario: Scenario) -> Trial:
    """Put each unseen thing where the seen thing goes whose name is most similar."""
    return _placed(words, scenario, scenario.seen, "examples")


def like_places(words: Words, scenario: Scenario) -> Trial:
    """Put each unseen thing in the receptacle whose name is most similar to its own."""
    return _placed(words, scenario, ((p, p) for p in scenario.receptacles), "zero-shot")


def _placed(
    words: Words,
    scenario: Scenario,
    known: Iterable[Placement],
    condition: Condition,
) -> Trial:
    names, places = zip(*known, strict=True)
    placements = {
        thing: places[words.cosine(thing, names).argmax()]
        for thing, _ in scenario.unseen
    }
    return Trial(scenario, "unseen", condition, "", placements, skipped=0)
