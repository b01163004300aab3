"""Language models that sample and score: prompts dealt out in turn, then continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

from ftlib.sequences import left_padded


@dataclass(frozen=True)
class Continuations:
    """Sampled texts: a left-padded prompt and what the model wrote after it.

    Attributes:
        tokens: integer [n, P + T], prompt and continuation.
        attended: bool [n, P + T], false on padding.
        scored: bool [n, T], true up to and including the first end token.
        prompt: integer [n], which prompt each text continues.
    """

    tokens: Tensor
    attended: Tensor
    scored: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor | int) -> Continuations:
        return Continuations(
            self.tokens[rows],
            self.attended[rows],
            self.scored[rows],
            self.prompt[rows],
        )

    @property
    def written(self) -> Tensor:
        """The tokens after the prompt, integer [n, T]."""
        return self.tokens[..., -self.scored.shape[-1] :]


class PromptedLM(nn.Module):
    """A causal language model of transformers as a model that samples and scores.

    Texts are drawn at temperature 1 from the whole vocabulary, so that they follow
    exactly the distribution that ``log_prob`` scores.

    Args:
        model: a causal language model of transformers.
        prompts: token ids of each prompt.
        max_new_tokens: longest continuation T.
        end_token: a continuation ends with it, and its probability counts; with None
            every continuation has T tokens.
    """

    prompts: Tensor
    real: Tensor

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_token: int | None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.max_new_tokens, self.end_token = max_new_tokens, end_token
        # Padding is never attended to: any token will do.
        self.padding = 0 if end_token is None else end_token
        padded, real = left_padded(prompts, self.padding)
        self.register_buffer("prompts", padded, persistent=False)
        self.register_buffer("real", real.bool(), persistent=False)
        self.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=end_token,
            pad_token_id=self.padding,
        )
        # The checkpoint's own file may ask for top-k or a penalty, and generate fills
        # from there what its argument leaves open.
        unwrapped = model.get_base_model() if isinstance(model, PeftModel) else model
        unwrapped.generation_config = self.generation_config

    @torch.no_grad()
    def sample(self, n: int) -> Continuations:
        """Continue prompts 0, 1, …, K−1, 0, 1, … until there are n texts."""
        index = torch.arange(n, device=self.prompts.device) % len(self.prompts)
        prompt, real = self.prompts[index], self.real[index]
        tokens = self.model.generate(
            prompt,
            attention_mask=real.long(),
            generation_config=self.generation_config,
        )
        missing = prompt.shape[1] + self.max_new_tokens - tokens.shape[1]
        tokens = F.pad(tokens, (0, missing), value=self.padding)
        scored = self._up_to_end(tokens[:, prompt.shape[1] :])
        return Continuations(tokens, torch.cat([real, scored], 1), scored, index)

    def _up_to_end(self, written: Tensor) -> Tensor:
        """Mark the tokens [n, T] up to and including the first end token."""
        if self.end_token is None:
            return torch.ones_like(written, dtype=torch.bool)
        ended = written == self.end_token
        return (ended.cumsum(1) - ended.long()) == 0

    def log_prob(self, samples: Continuations) -> Tensor:
        """Log-probability of each continuation given its prompt, float32 [n]."""
        logits = self._logits(samples)
        losses = F.cross_entropy(
            logits.transpose(1, 2), samples.written, reduction="none"
        )
        return -(losses * samples.scored).sum(1)

    @torch.no_grad()
    def kl_from(self, base: PromptedLM, samples: Continuations) -> Tensor:
        """Estimate KL(self‖base) from samples of self, one unbiased value each, [n].

        The Rao–Blackwell estimate: at each position the KL of the next token is summed
        over the whole vocabulary, which varies far less than the log-ratio of the
        token drawn. Its expectation is the KL of whole continuations.
        """
        here = self._logits(samples).log_softmax(-1)
        there = base._logits(samples).log_softmax(-1)
        return ((here.exp() * (here - there)).sum(-1) * samples.scored).sum(1)

    def _logits(self, samples: Continuations) -> Tensor:
        """Next-token logits for the continuation, float32 [n, T, V]."""
        longest = samples.scored.shape[1]
        # Positions count real tokens, as generate does with left padding.
        positions = (samples.attended.long().cumsum(1) - 1).clamp(min=0)
        output = self.model(
            input_ids=samples.tokens,
            attention_mask=samples.attended.long(),
            position_ids=positions,
            logits_to_keep=longest + 1,
            use_cache=False,
        )
        return output.logits[:, :-1].float()


def per_prompt(values: Tensor, prompt: Tensor, prompts: int) -> Tensor:
    """Give each prompt a constraint of its own: float [n, K].

    Sample i puts K·values_i into the column of its prompt and 0 elsewhere, so that
    the mean of column k is the mean of ``values`` given prompt k.
    """
    columns = F.one_hot(prompt, prompts).to(values.dtype)
    return prompts * values[:, None] * columns
