r"""Examples whose loss falls on the target alone: imitation and critique.

An example is a prompt and a target. Imitation (SFT) asks the question and has the
response for its target. Critique (CFT) shows question and response, and has the
critique for its target, so what is wrong in the response is read and never imitated.

Labels are what the model has to write once it has been asked: the target and the token
that ends its turn. Everything before them is −100. The mask that transformers offers
(``return_assistant_tokens_mask``) needs a template with ``{% generation %}`` blocks,
which published templates seldom have, and is all zeros without them. Here the prompt is
written as it will be at inference, and what follows it in the written conversation is
the target; that is checked, token by token, for every example.

To fine-tune a model of yours with critiques, on one device or many:

>>> from ftlib.cft.data import PaddingCollator, criticise, tokenize_examples
>>> from ftlib.cft.objective import Learner, training_loss
>>> from ftlib.training import TrainingSettings, train
>>> examples = [criticise(q, response, critique) for q, response, critique in records]
>>> data = tokenize_examples(examples, tokenizer, max_length=256)
>>> print(f"{len(data.features)} kept, {data.truncated} cut, dropped: {data.dropped}")
8 kept, 0 cut, dropped: {}
>>> settings = TrainingSettings(steps=20, batch_size=4, learning_rate=3e-3)
>>> history = train(Learner(model), data.features, training_loss, settings,
...                 collate=PaddingCollator())

The features and the collator are those of transformers, so its ``Trainer`` takes them
too, with its own loss:

>>> from transformers import Trainer, TrainingArguments
>>> trainer = Trainer(
...     model,
...     TrainingArguments(folder, max_steps=20, learning_rate=3e-3, report_to="none"),
...     data_collator=PaddingCollator(),
...     train_dataset=data.features,
... )
>>> result = trainer.train()

Afterwards the model answers a question by itself, from ``encode_prompts(tokenizer,
[question])``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerBase

from ftlib.sequences import IGNORED

INSTRUCTION = (
    "Read the question and the solution below, and examine whether the solution is"
    " right."
)
_PLACEHOLDER = "\ue000"  # of Unicode's private use: in no template and in no text


class Example(NamedTuple):
    """What the model is asked, and what it should write.

    Attributes:
        prompt: text of the user's turn; no loss.
        target: text of the answer, whose tokens the loss is on.
    """

    prompt: str
    target: str


def imitate(question: str, response: str) -> Example:
    """Return the example of SFT: the question, and the response to be imitated."""
    return Example(question, response)


def criticise(question: str, response: str, critique: str) -> Example:
    """Return the example of CFT: question and response, and the critique to be written.

    An empty response leaves its place empty, for the control in which the target is
    written without one.
    """
    shown = f"Question:\n{question}\n\nSolution:\n{response}"
    return Example(f"{INSTRUCTION}\n\n{shown}", critique)


# --- from text to tokens -----------------------------------------------------


class Features(TypedDict):
    """One example as transformers takes it: two lists of the same length.

    ``labels`` repeats the token where it is to be learned, and is −100 elsewhere.
    """

    input_ids: list[int]
    labels: list[int]


class TokenizedExamples(NamedTuple):
    """Features, and what became of the examples that did not fit.

    Attributes:
        features: of the examples kept, in their order.
        truncated: how many of these lost the end of their target.
        dropped: how many others there were, by reason.
    """

    features: list[Features]
    truncated: int
    dropped: dict[str, int]


def tokenize_examples(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> TokenizedExamples:
    """Tokenize examples with any chat template, or with none.

    A target that is longer than what the prompt leaves of ``max_length`` is cut there.
    It then has no ending token among its labels: every term log P(c_t | x, y, c_<t) it
    keeps is a term of the objective, and none teaches to stop in the middle. A prompt
    is never cut, since the critique would then speak of what cannot be seen.

    These examples are dropped, and counted:

    * ``empty target``: there is nothing to learn but to say nothing. (An empty
      response is kept.)
    * ``control token``: the text holds one of the tokenizer's special tokens, such as
      ``</s>``, and could end a turn where there is no end.
    * ``prompt too long``: no token of the target fits behind it.

    Args:
        examples: the examples. White space around a target is taken off: templates
            disagree about it, and a leading line break would merge with the prompt's
            last token.
        tokenizer: a tokenizer of transformers. Without a chat template, the text is
            the prompt, a line break and the target, and the EOS token ends it.
        max_length: tokens of prompt and target together, at most the model's context.

    Raises:
        ValueError: the chat template does not write the prompt as the beginning of the
            conversation, or does not write the target as it is; or there is no token
            that could end a target.
    """
    writer = _Writer(tokenizer)
    dropped: Counter[str] = Counter()
    sound = []
    for prompt, target in examples:
        if not target.strip():
            dropped["empty target"] += 1
        elif any(token in prompt or token in target for token in writer.special):
            dropped["control token"] += 1
        else:
            sound.append(Example(prompt, target.strip()))
    features = []
    truncated = 0
    for prompt_ids, target_ids in writer.encode(sound):
        if len(prompt_ids) >= max_length:
            dropped["prompt too long"] += 1
        else:
            features.append(supervise(prompt_ids, target_ids, max_length))
            truncated += len(prompt_ids) + len(target_ids) > max_length
    return TokenizedExamples(features, truncated, dict(dropped))


def supervise(
    prompt_ids: Sequence[int], target_ids: Sequence[int], max_length: int
) -> Features:
    """Join prompt and target, mask the prompt's labels, and cut what is too long.

    Args:
        prompt_ids: tokens that are read.
        target_ids: tokens that are written, the last of which ends them.
        max_length: of the features.
    """
    ids = [*prompt_ids, *target_ids]
    labels = [*[IGNORED] * len(prompt_ids), *target_ids]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]
) -> list[list[int]]:
    """Return the tokens after which the model writes its answer, as in training.

    Args:
        tokenizer: with a chat template or without.
        prompts: texts of the user's turns, such as bare questions.
    """
    writer = _Writer(tokenizer)
    return writer.ids([writer.ask(prompt) for prompt in prompts])


class _Writer:
    """Writes prompts and targets as a tokenizer's chat template does, or plainly."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self.special = {token.content for token in added if token.special}

    def encode(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], ...]]:
        """Yield the tokens of every prompt, and those to be written after it."""
        asked = [self.ask(prompt) for prompt, _ in examples]
        written = [
            self._write(example, before)
            for example, before in zip(examples, asked, strict=True)
        ]
        whole = [before + after for before, after in zip(asked, written, strict=True)]
        rows = zip(self.ids(asked), self.ids(whole), asked, written, strict=True)
        for prompt_ids, ids, before, after in rows:
            if ids[: len(prompt_ids)] != prompt_ids:
                raise ValueError(
                    f"the prompt, which ends in {before[-20:]!r}, has other tokens"
                    f" when {after[:20]!r} follows it. Let prompts end in a special"
                    " token or in a single line break, not in a space or in two line"
                    f" breaks, in the {self._name()}"
                )
            yield prompt_ids, ids[len(prompt_ids) :]

    def ask(self, prompt: str) -> str:
        """Return the text after which the model writes its answer."""
        if self._tokenizer.chat_template is None:
            return f"{prompt.strip()}\n"
        return self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
        )

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Tokenize texts, each from its beginning."""
        if not texts:
            return []
        start = []
        if self._tokenizer.chat_template is None:  # a template writes BOS by itself
            start = self._tokenizer("").input_ids
            bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
            if start[-1:] == [eos] and (len(start) > 1 or bos != eos):
                start = start[:-1]
        rows = self._tokenizer(texts, add_special_tokens=False).input_ids
        return [[*start, *ids] for ids in rows]

    def _write(self, example: Example, asked: str) -> str:
        """Return what the model is to write once it has been asked.

        It is the target with what the template puts around it, up to the special token
        that ends the turn: what comes after that, such as a line break, is never
        generated. Where a template ends turns without such a token, EOS does.
        """
        target = example.target
        if self._tokenizer.chat_template is None:
            return target + self._eos()
        around = self._reply(example._replace(target=_PLACEHOLDER), asked)
        before, _, after = around.partition(_PLACEHOLDER)
        written = self._reply(example, asked)
        if written != before + target + after:
            raise ValueError(
                f"the target {target[:60]!r} was written as {written[:60]!r} by the"
                f" {self._name()}: give the tokenizer one that keeps answers as they"
                " are"
            )
        ends = [after.index(t) + len(t) for t in self.special if t in after]
        end = after[: min(ends)] if ends else self._eos()
        return before + target + end

    def _reply(self, example: Example, asked: str) -> str:
        """Return what the template writes after what was asked."""
        conversation = self._tokenizer.apply_chat_template(
            [
                {"role": "user", "content": example.prompt},
                {"role": "assistant", "content": example.target},
            ],
            tokenize=False,
        )
        if not conversation.startswith(asked):
            raise ValueError(
                f"the prompt is written as {asked!r} when it is asked, but with an"
                f" answer the conversation is {conversation!r}: the model would learn"
                " to continue what it is never asked. Give the tokenizer another"
                f" chat_template than the {self._name()}"
            )
        return conversation[len(asked) :]

    def _eos(self) -> str:
        eos = self._tokenizer.eos_token
        if eos is None:
            raise ValueError(
                "nothing can end a target: the tokenizer has no eos_token, and no"
                f" special token ends a turn in the {self._name()}"
            )
        return eos

    def _name(self) -> str:
        tokenizer = self._tokenizer
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if tokenizer.chat_template is None:
            return f"plain format of {name}, which has no chat template"
        return f"chat template of {name}, {str(tokenizer.chat_template)[:60]!r}…"


# --- from features to batches ------------------------------------------------


@dataclass(frozen=True)
class PaddingCollator:
    """Make a batch of rows, padded at their right ends.

    Padding has no attention and no label, so ``pad_token_id`` may be any token, the
    EOS token among them. It goes to the right whatever the tokenizer's
    ``padding_side``, which is for generation: there, new tokens follow the row's end,
    here, positions count from its start.

    Attributes:
        pad_token_id: token to fill with.
        pad_to_multiple_of: round the length of the rows up to a multiple of this.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int = 1

    def __call__(self, features: Sequence[Features]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, int64 [n, T]."""
        longest = max(len(feature["input_ids"]) for feature in features)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(rows: Iterable[Sequence[int]], value: int) -> Tensor:
            return torch.tensor([[*r, *[value] * (length - len(r))] for r in rows])

        ids = [feature["input_ids"] for feature in features]
        return {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded([feature["labels"] for feature in features], IGNORED),
        }


class PackingCollator:
    """Put the examples of a batch one behind the other in a row, without padding.

    transformers' ``DataCollatorWithFlattening`` makes the row. Positions start again
    with every example, and from that the models of transformers make a mask in which
    no example sees another, but only if there is neither an attention mask nor a
    cache. A cache is the default of most models, and with it the examples would leak
    into each other without a word, so the batch turns it off.

    Not every model reads the positions: ask :func:`check_packing`.
    """

    def __init__(self) -> None:
        self._flatten = DataCollatorWithFlattening()

    def __call__(self, features: Sequence[Features]) -> dict[str, Any]:
        """Return ``input_ids``, ``labels``, ``position_ids`` [1, T], and no cache."""
        return {**self._flatten(features), "use_cache": False}


@torch.no_grad()
def check_packing(model: nn.Module, features: Sequence[Features]) -> None:
    """Check that a model computes the same for packed examples as for each alone.

    The architecture decides, so a small model of the same kind tells as much.

    Args:
        model: a causal model of transformers in float32 or float64: the rounding of
            narrower weights would hide a small leak.
        features: two examples or more.

    Raises:
        ValueError: the logits differ by more than 1e-4 of the largest, so examples
            reach each other or do not start at position 0; take
            :class:`PaddingCollator` for this model. Or the arguments do not allow the
            comparison.
    """
    if len(features) < 2:
        raise ValueError("packing one example changes nothing: give two or more")
    weight = next(model.parameters())
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the weights are {weight.dtype}: load them in float32")
    row = send_to_device(PackingCollator()(features), weight.device)
    was_training = model.training
    model.eval()
    try:
        together = model(**row).logits[0]
        ids = [torch.tensor([f["input_ids"]], device=weight.device) for f in features]
        alone = torch.cat([model(input_ids=one).logits[0] for one in ids])
    finally:
        model.train(was_training)
    difference = ((together - alone).abs().max() / alone.abs().max()).item()
    if not difference <= 1e-4:
        raise ValueError(
            f"{type(model).__name__} cannot take packed examples: its logits differ by"
            f" {difference:.1e} of the largest from those of the examples alone. Use"
            " PaddingCollator"
        )
