"""Models that read a prompt and write text: what they share, recorded, and local.

Whatever thinks in words here is a :class:`TextModel`. There are three:

* :class:`RecordedReplies` replays what a model once wrote, prompt by prompt.
* :class:`LocalModel` runs a causal language model of transformers on this machine.
* :class:`ftlib.clipr.endpoint.Endpoint` asks a server.

Each counts what it used in a :class:`Usage`. What a model writes is text to be read,
and is never run.

.. code-block:: python

   from ftlib.clipr.models import LocalModel

   model = LocalModel.load("smollm2-135m")
   tea, coffee = model.score("Tea or coffee? One word.", ["Tea", "Coffee"])
"""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ftlib.data.reading import read_jsonl

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOT_CHOSEN = -20.0
"""The score of an option that a model did not choose, where it only chooses.

It stands for −∞, which JSON cannot hold."""

Choice = tuple[str, Sequence[str]]
"""A prompt, and the options that may follow it."""

_BATCH = 16


@dataclass
class Usage:
    """What a model or a reasoner used.

    Attributes:
        calls: how often it was asked.
        prompt_tokens: that it read.
        completion_tokens: that it wrote.
        seconds: that it took.
        problems: replies, or lines of them, that could not be understood.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    problems: int = 0

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(_all(self), _all(other), strict=True)))

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(*(a - b for a, b in zip(_all(self), _all(earlier), strict=True)))

    def add(self, other: Usage) -> None:
        """Count more, in place."""
        vars(self).update(vars(self + other))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the seconds of a block, even of one that fails."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began


def _all(usage: Usage) -> list[Any]:
    return [getattr(usage, field.name) for field in fields(usage)]


class TextModel(Protocol):
    """Reads a prompt, and writes text or says how likely given texts are.

    Attributes:
        usage: what it has used so far.
    """

    usage: Usage

    def complete(
        self, prompt: str, *, max_tokens: int, stop: Sequence[str] = ()
    ) -> str:
        """Write what follows a prompt.

        Args:
            prompt: what is asked.
            max_tokens: the most that are written.
            stop: texts before which the writing ends.
        """

    def score(self, prompt: str, options: Sequence[str]) -> list[float]:
        """Return the log-probability of each option's text after a prompt.

        A model that cannot tell gives :func:`votes`.

        Args:
            prompt: asks for one of the options.
            options: what may follow it: texts, none of them empty.
        """

    def score_all(self, questions: Sequence[Choice]) -> list[list[float]]:
        """:meth:`score` for many prompts; each counts as a call."""


# --- what is made of a reply ----------------------------------------------------------


def cut(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first of the stop strings."""
    return text[: min((text.find(s) for s in stop if s in text), default=None)]


def estimated_tokens(text: str) -> int:
    """Guess the tokens of a text whose tokenizer is not here: four characters each."""
    return math.ceil(len(text) / 4)


def read_choice(reply: str, options: Sequence[str]) -> int | None:
    """Find the one option that a reply names; ``None`` if it names none, or several.

    In this order: the reply is an option, but for case and punctuation; it begins with
    an option and a mark, as in ``B) the mug``; it has exactly one option in it, as a
    word and not as a part of a longer option. Only single letters must have their
    case. "A" and "I" before a small letter are mostly words of English: they count only
    before "or", "and" or "is".

    Args:
        reply: text of a model.
        options: letters or short texts.
    """
    text = _bare(reply)
    same = [i for i, o in enumerate(options) if _bare(o).lower() == text.lower()]
    begun = [i for i, o in enumerate(options) if _find(r"^\W*{}\s*[).:,*\n]", o, reply)]
    inside = [i for i, o in enumerate(options) if _has_word(reply, o)]
    whole = [
        i for i in inside if not any(options[i] in options[j] for j in inside if j != i)
    ]
    for found in (same, begun, whole):
        if len(found) == 1:
            return found[0]
    return None


def _bare(text: str) -> str:
    """Return a text without the marks around it."""
    return text.strip(" \n\t*_`\"'()[].!")


def _has_word(text: str, word: str) -> bool:
    sentence = r"(?!\s+(?!(?:or|and|is)\b)[a-z])" if word in ("A", "I") else ""
    return _find(r"(?<!\w){}(?!\w|')" + sentence, word, text)


def _find(pattern: str, option: str, text: str) -> bool:
    """Search for an option; only letters must have their case."""
    flags = re.IGNORECASE if len(option) > 1 else 0
    return bool(re.search(pattern.replace("{}", re.escape(option)), text, flags))


def votes(reply: str, options: Sequence[str], usage: Usage) -> list[float]:
    """Turn a reply into scores: log 1 for what it names, ``NOT_CHOSEN`` for the others.

    A reply that cannot be read is a problem, counted in ``usage``, and its options tie.
    """
    chosen = read_choice(reply, options)
    if chosen is None:
        usage.problems += 1
        return [-math.log(len(options))] * len(options)
    return [0.0 if i == chosen else NOT_CHOSEN for i in range(len(options))]


def raised(
    scores: Sequence[Sequence[float]], usual: Sequence[Sequence[float]]
) -> list[list[float]]:
    """Return by how much each option's score is above its usual one, by prompt."""
    return [
        [a - b for a, b in zip(*pair, strict=True)]
        for pair in zip(scores, usual, strict=True)
    ]


# --- recorded replies -----------------------------------------------------------------


class ReplyNotRecordedError(LookupError):
    """A prompt was never answered when the replies were recorded."""


class RecordedReplies:
    """Replays the replies that a model once gave, each to the very same prompt.

    Args:
        replies: completion of each prompt.

    Attributes:
        usage: its tokens are estimates, for a record does not have them; its seconds
            are 0.
    """

    def __init__(self, replies: Mapping[str, str]) -> None:
        self.usage = Usage()
        self._replies = dict(replies)

    @classmethod
    def read(cls, path: Path) -> RecordedReplies:
        """Read JSON lines with ``prompt`` and ``completion``, such as a reply cache's.

        Raises:
            ValueError: a line lacks one of them, or a prompt has two completions.
        """
        replies: dict[str, str] = {}
        for number, row in enumerate(read_jsonl(path), start=1):
            prompt, completion = row.get("prompt"), row.get("completion")
            if not isinstance(prompt, str) or not isinstance(completion, str):
                raise ValueError(
                    f"{path}, line {number}: give the texts prompt and completion"
                )
            if replies.setdefault(prompt, completion) != completion:
                raise ValueError(
                    f"{path}, line {number}: the prompt {_beginning(prompt)} has"
                    " another completion before. Keep one of the two lines"
                )
        return cls(replies)

    def __len__(self) -> int:
        return len(self._replies)

    def complete(
        self, prompt: str, *, max_tokens: int, stop: Sequence[str] = ()
    ) -> str:
        """Return what was recorded, up to the first stop string, however long.

        Raises:
            ReplyNotRecordedError: the prompt is not in the record.
        """
        if prompt not in self._replies:
            raise ReplyNotRecordedError(self._missing(prompt))
        reply = cut(self._replies[prompt], stop)
        tokens = estimated_tokens(prompt), estimated_tokens(reply)
        self.usage.add(Usage(1, *tokens))
        return reply

    def score(self, prompt: str, options: Sequence[str]) -> list[float]:
        """Return the :func:`votes` of the recorded reply.

        Raises:
            ReplyNotRecordedError: the prompt is not in the record.
        """
        return votes(self.complete(prompt, max_tokens=0), options, self.usage)

    def score_all(self, questions: Sequence[Choice]) -> list[list[float]]:
        """:meth:`score` for many prompts.

        Raises:
            ReplyNotRecordedError: a prompt is not in the record.
        """
        return [self.score(*question) for question in questions]

    def _missing(self, prompt: str) -> str:
        shared = (_shared(prompt, known) for known in self._replies)
        return (
            f"no reply is recorded to the prompt {_beginning(prompt)}"
            f" ({len(prompt)} characters, of which the nearest of {len(self)} recorded"
            f" prompts shares the first {max(shared, default=0)}). A prompt must be the"
            " same to the last character: make it as it was made for the record, or"
            " ask a model (LocalModel, Endpoint)"
        )


def _beginning(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


# --- a model on this machine ----------------------------------------------------------


class _Continuation(NamedTuple):
    """Tokens of a prompt with an option, and where what is scored begins."""

    ids: tuple[int, ...]
    start: int


class LocalModel:
    """A causal language model of transformers.

    With a chat template, the prompt is the user's message and what follows is the
    model's answer. Without one, what follows continues the prompt, after a space.

    Args:
        model: the model, wrapped by PEFT or not. Dropout is off while it is asked.
        tokenizer: its tokenizer.
        batch_size: texts that are read together.

    Attributes:
        usage: what it has used. Scoring writes nothing: the options' tokens are read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = _BATCH,
    ) -> None:
        self.usage = Usage()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        batch_size: int = _BATCH,
    ) -> LocalModel:
        """Load a model by short name; see :func:`ftlib.models.load_causal_lm`."""
        from ftlib.models import load_causal_lm

        model, tokenizer = load_causal_lm(name, dtype=dtype, device=device)
        return cls(model, tokenizer, batch_size=batch_size)

    def complete(
        self, prompt: str, *, max_tokens: int, stop: Sequence[str] = ()
    ) -> str:
        """Write the most probable next token, again and again.

        Raises:
            ValueError: prompt and reply may be longer than what the model can read.
        """
        ids = self._encode(self._context(prompt))
        self._check_length(len(ids) + max_tokens, prompt)
        with self._asking():
            written = self._generate(ids, max_tokens, stop)
        self.usage.add(Usage(1, len(ids), len(written)))
        return cut(self.tokenizer.decode(written, skip_special_tokens=True), stop)

    def score(self, prompt: str, options: Sequence[str]) -> list[float]:
        """Return log p(option | prompt) of each option, summed over its tokens.

        A longer option has more factors and so, as a rule, a lower score: let options
        be letters, or of one length. The end of the answer is not scored.

        Raises:
            ValueError: as :meth:`score_all`.
        """
        return self.score_all([(prompt, options)])[0]

    def score_all(self, questions: Sequence[Choice]) -> list[list[float]]:
        """:meth:`score` for many prompts, in batches; each counts as a call.

        Raises:
            ValueError: an option is empty or has no token of its own, or a text is
                longer than what the model can read.
        """
        asked = [self._continuations(*question) for question in questions]
        with self._asking():
            scores = iter(self._log_probs([row for rows in asked for row in rows]))
        for rows in asked:
            shared = min((row.start for row in rows), default=0)
            read = shared + sum(len(row.ids) - shared for row in rows)
            self.usage.add(Usage(1, read))
        return [[next(scores) for _ in rows] for rows in asked]

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Measure time, without gradients and dropout."""
        import torch

        was_training = self.model.training
        self.model.eval()
        try:
            with self.usage.timed(), torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def _context(self, prompt: str) -> str:
        """Return the text after which the model answers."""
        if self.tokenizer.chat_template is None:
            return prompt
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
        )

    def _encode(self, text: str) -> list[int]:
        # A chat template has written the special tokens already.
        plain = self.tokenizer.chat_template is None
        return self.tokenizer(text, add_special_tokens=plain)["input_ids"]

    def _continuations(
        self, prompt: str, options: Sequence[str]
    ) -> list[_Continuation]:
        """Encode each option after the prompt, for a tokenizer may join the two.

        What is scored begins at one place for all options of a prompt: after the tokens
        that they share with the prompt alone.
        """
        context = self._context(prompt)
        is_chat = self.tokenizer.chat_template is not None
        space = "" if is_chat or context[-1:].isspace() else " "
        before = self._encode(context)
        rows = [tuple(self._encode(context + space + option)) for option in options]
        start = min((_shared(before, row) for row in rows), default=0)
        for row, option in zip(rows, options, strict=True):
            if not option or not 0 < start < len(row):
                raise ValueError(
                    f"the option {option!r} has no token of its own after the prompt"
                    f" {_beginning(prompt)}: give texts, and a prompt before them"
                )
            self._check_length(len(row), prompt)
        return [_Continuation(row, start) for row in rows]

    def _check_length(self, tokens: int, prompt: str) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit and tokens > limit:
            raise ValueError(
                f"the prompt {_beginning(prompt)} and its reply take up to {tokens}"
                f" tokens, the model reads {limit}: shorten the prompt, give fewer"
                " rules, or let it write less"
            )

    def _log_probs(self, rows: Sequence[_Continuation]) -> list[float]:
        """Score rows; those that differ in their last token only are read once."""
        same: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            same[row.ids[:-1]].append(number)
        contexts = sorted(same, key=len)
        scores = [0.0] * len(rows)
        for first in range(0, len(contexts), self.batch_size):
            batch = contexts[first : first + self.batch_size]
            numbers = [(at, n) for at, ids in enumerate(batch) for n in same[ids]]
            found = self._batch_log_probs(batch, [(at, rows[n]) for at, n in numbers])
            for (_, number), score in zip(numbers, found, strict=True):
                scores[number] = score
        return scores

    def _batch_log_probs(
        self,
        contexts: Sequence[tuple[int, ...]],
        rows: Sequence[tuple[int, _Continuation]],
    ) -> list[float]:
        """Score rows, each with the place of its context in the batch."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from ftlib.ops import output_head, vocabulary_head

        texts = [torch.tensor(ids) for ids in contexts]
        pad = self.tokenizer.pad_token_id or 0
        masks = pad_sequence([torch.ones_like(ids) for ids in texts], True, 0)
        inputs = {"input_ids": pad_sequence(texts, True, pad), "attention_mask": masks}
        on = self.model.device
        head = output_head(
            self.model, use_cache=False, **{k: v.to(on) for k, v in inputs.items()}
        )
        hidden = head.hidden[:, -masks.shape[1] :]  # without soft prompts before it
        pieces = [hidden[at, r.start - 1 : len(r.ids) - 1] for at, r in rows]
        targets = [torch.tensor(r.ids[r.start :]) for _, r in rows]
        log_prob = vocabulary_head(
            torch.cat(pieces),
            head.weight,
            torch.cat(targets).to(on),
            logit_scale=head.logit_scale,
            softcap=head.softcap,
        ).log_prob
        assert log_prob is not None
        parts = log_prob.double().split([len(ids) for ids in targets])
        return [part.sum().item() for part in parts]

    def _generate(
        self, ids: list[int], max_tokens: int, stop: Sequence[str]
    ) -> list[int]:
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        def stopped(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            text = self.tokenizer.decode(tokens[0, len(ids) :])
            return torch.tensor([any(s in text for s in stop)], device=tokens.device)

        prompt = torch.tensor([ids], device=self.model.device)
        generator: Any = self.model
        tokens = generator.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=self._ends(),
                pad_token_id=self.tokenizer.pad_token_id or 0,
            ),
            stopping_criteria=StoppingCriteriaList([stopped]),
        )
        return tokens[0, len(ids) :].tolist()

    def _ends(self) -> list[int] | None:
        """Return the tokens that end an answer, the tokenizer's and the model's own."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id}
        return sorted(ends - {None}) or None


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many tokens, or characters, two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
