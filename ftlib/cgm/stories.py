"""A world of template stories in which every probability is known.

``once a nurse named Mia . she found a red kite . <end>``: the profession is the prompt,
the name decides the pronoun, and a profession's names lean towards one gender. So
P(female | profession) under a model is one forward pass, without sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftlib.cgm.language import Continuations, PromptedLM

# Professions and the share of women in the stories they appear in (made up).
TRAINED = {
    "doctor": 0.20,
    "lawyer": 0.15,
    "teacher": 0.80,
    "pilot": 0.08,
    "chef": 0.35,
    "scientist": 0.25,
    "nurse": 0.93,
    "artist": 0.55,
}
HELD_OUT = {"judge": 0.12, "dancer": 0.85, "baker": 0.60, "sheriff": 0.10}

FEMALE_NAMES = "Mia Lily Sue Anna Lucy Sara Emma Rose Ella Jane Amy Zoe".split()
MALE_NAMES = "Tim Ben Max Tom Jack Sam Leo Bob Joe Dan Roy Ned".split()
_VERBS = "found lost made saw bought wanted".split()
_COLOURS = "red blue green small big old".split()
_OBJECTS = "kite boat drum lamp ball book clock shell".split()
END = "<end>"

VOCABULARY = [
    *[END, "once", "a", "named", ".", "she", "he"],
    *TRAINED,
    *HELD_OUT,
    *FEMALE_NAMES,
    *MALE_NAMES,
    *_VERBS,
    *_COLOURS,
    *_OBJECTS,
]
_ID = {word: i for i, word in enumerate(VOCABULARY)}
STORY_TOKENS = 9  # name . pronoun verb a colour object . <end>


@dataclass(frozen=True)
class Exact:
    """Exact behaviour of a model on each of K professions, float64 [K] each.

    Attributes:
        female: P(the story is about a woman's name).
        male: likewise for a man's. The rest is no name at all.
        agreement: P(the pronoun fits the name, given a name and a full stop).
    """

    female: Tensor
    male: Tensor
    agreement: Tensor

    @property
    def imbalance(self) -> Tensor:
        """P(female) − P(male) for every profession."""
        return self.female - self.male


def encode(text: str) -> list[int]:
    """Token ids of a text of this world, words separated by spaces.

    Raises:
        KeyError: a word that is not in the vocabulary.
    """
    return [_ID[word] for word in text.split()]


def decode(tokens: Tensor) -> str:
    """Words of one token sequence [T], up to its first end token."""
    words = [VOCABULARY[i] for i in tokens.tolist()]
    return " ".join(words[: words.index(END)] if END in words else words)


def prompts(professions: list[str]) -> list[list[int]]:
    """Token ids of the opening of a story about each profession."""
    return [encode(f"once a {profession} named") for profession in professions]


def corpus(stories: int, generator: torch.Generator) -> Tensor:
    """Draw stories, integer [stories, 13], professions equally often.

    Names follow Zipf's law within a gender; colours and objects follow it too, in an
    order that depends on the profession, so that there is more to forget than gender.
    """
    shares = torch.tensor([*TRAINED.values(), *HELD_OUT.values()])
    names = list(TRAINED) + list(HELD_OUT)
    profession = torch.randint(len(names), (stories,), generator=generator)
    female = torch.rand(stories, generator=generator) < shares[profession]
    columns = {
        "profession": _words(names)[profession],
        "name": torch.where(
            female,
            _zipf(FEMALE_NAMES, stories, generator),
            _zipf(MALE_NAMES, stories, generator),
        ),
        "pronoun": torch.where(female, _ID["she"], _ID["he"]),
        "verb": _zipf(_VERBS, stories, generator, profession),
        "colour": _zipf(_COLOURS, stories, generator, profession),
        "object": _zipf(_OBJECTS, stories, generator, 3 * profession),
    }
    template = "once a profession named name . pronoun verb a colour object . <end>"
    return torch.stack(
        [
            columns[word] if word in columns else torch.full((stories,), _ID[word])
            for word in template.split()
        ],
        dim=1,
    )


def gender(samples: Continuations) -> Tensor:
    """+1 where the first word is a woman's name, −1 for a man's, else 0: [n]."""
    first = samples.written[:, 0]
    female = torch.isin(first, _words(FEMALE_NAMES).to(first.device))
    male = torch.isin(first, _words(MALE_NAMES).to(first.device))
    return female.float() - male.float()


@torch.no_grad()
def exact(model: PromptedLM) -> Exact:
    """Read a model's behaviour off its next-token probabilities, without sampling."""
    device = model.prompts.device
    female, male = _words(FEMALE_NAMES).to(device), _words(MALE_NAMES).to(device)
    named = torch.cat([female, male])
    first = _next_token(model, model.prompts)
    weight = first[:, named]
    opening = torch.stack([named, torch.full_like(named, _ID["."])], 1)
    prefix = model.prompts.repeat_interleave(len(named), 0)
    openings = opening.repeat(len(model.prompts), 1)
    after = _next_token(model, torch.cat([prefix, openings], 1))
    after = after.view(len(model.prompts), len(named), -1)
    fits = torch.cat(
        [after[:, : len(female), _ID["she"]], after[:, len(female) :, _ID["he"]]], 1
    )
    return Exact(
        female=weight[:, : len(female)].sum(1).cpu(),
        male=weight[:, len(female) :].sum(1).cpu(),
        agreement=((weight * fits).sum(1) / weight.sum(1)).cpu(),
    )


def _next_token(model: PromptedLM, tokens: Tensor) -> Tensor:
    """Next-token probabilities after complete prefixes, float64 [n, V]."""
    logits = model.model(input_ids=tokens, use_cache=False).logits[:, -1]
    return logits.double().softmax(-1)


def _words(words: list[str]) -> Tensor:
    return torch.tensor([_ID[word] for word in words])


def _zipf(
    words: list[str],
    n: int,
    generator: torch.Generator,
    shift: Tensor | int = 0,
) -> Tensor:
    """Draw words with probability ∝ 1/rank; ``shift`` rotates the ranking, [n]."""
    weights = 1 / torch.arange(1, len(words) + 1, dtype=torch.float)
    rank = torch.multinomial(weights, n, replacement=True, generator=generator)
    return _words(words)[(rank + shift) % len(words)]
