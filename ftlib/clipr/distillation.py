r"""Rules as a teacher: a small language model learns to choose as they do.

The paper fine-tunes nothing. This is ours, and says what else a rule is good for:
learnt from a few answers, it labels any number of tasks about which nobody was asked,
and a model that learns from these labels needs no rules in its prompt.

The model is asked of each option whether the person would take it
(:func:`ftlib.clipr.prompts.offers`). The option's score is the log-probability of
"yes", and the likeliest is taken. What is decided by is what is trained,

.. math:: s_j = \log p(\text{yes} \mid \text{option } j), \qquad
   \mathcal L = -\frac{1}{|B|} \sum_{b \in B} \log \frac{e^{s_b}}{\sum_j e^{s_j}},

with B the best options. With one of them this is the first choice of a Plackett–Luce
model, and with two options a Bradley–Terry model, whose utilities are the scores: a
reward model whose reward is read off at a word. Only adapters are trained: LoRA, on
every linear layer but the head.

The log-probability of the option's own text would be a score as well. In a trial with
``stories15m`` and one user, of seed 1000, 60 steps then took 96 s in place of 42, and
95 per cent of validation came out right in place of 99.

.. code-block:: python

   student = Student(*load_causal_lm("stories15m"), DistillationSettings())
   student.learn(lessons(tasks, rules), learning_rate=3e-3)
   student.decide(task)
   student.model.save_pretrained("student")  # the adapters alone
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftlib.clipr import prompts
from ftlib.clipr.models import LocalModel
from ftlib.clipr.rules import RuleSet
from ftlib.clipr.settings import DistillationSettings
from ftlib.clipr.tasks import Decision, Task
from ftlib.ops import vocabulary_head
from ftlib.sequences import IGNORED, head_and_targets
from ftlib.streams import stream
from ftlib.training import History, Learner, TrainingSettings, train


class Lesson(NamedTuple):
    """A task, and the options that are best."""

    task: Task
    best: tuple[int, ...]


def lessons(tasks: Iterable[Task], rules: RuleSet) -> list[Lesson]:
    """Let rules label tasks.

    Where several options are best, each is as good an answer as the others. Where all
    are, the rules have nothing to say, and the task is left out: to be silent is not to
    say that it does not matter.
    """
    labelled = (Lesson(task, rules.best(task)) for task in tasks)
    return [one for one in labelled if len(one.best) < len(one.task.options)]


# --- the objective ------------------------------------------------------------


def choice_loss(scores: Sequence[Tensor], shares: Sequence[Tensor]) -> Tensor:
    """Return the mean cross-entropy of choices, in nats.

    Args:
        scores: of the options of each task, float (options,).
        shares: of the options in the target, which sum to 1, float (options,).
    """
    losses = [
        -(share * score.log_softmax(0)).sum()
        for score, share in zip(scores, shares, strict=True)
    ]
    return torch.stack(losses).mean()


def log_probs(model: Any, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return the log-probability of each row's labels, with its gradient, (rows,).

    Args:
        model: a decoder-only model of transformers.
        labels: int64 (rows, T), as ``input_ids``, or −100 where nothing is scored.
        inputs: ``input_ids`` and ``attention_mask``, int64 (rows, T).
    """
    head, targets = head_and_targets(model, labels, inputs)
    scored = targets != IGNORED
    log_prob = vocabulary_head(
        head.hidden[scored],
        head.weight,
        targets[scored],
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    ).log_prob
    assert log_prob is not None
    rows, _ = scored.nonzero(as_tuple=True)
    return log_prob.new_zeros(len(targets)).index_add(0, rows, log_prob)


def offer_scores(
    model: LocalModel, tasks: Sequence[Task], known: Sequence[str]
) -> list[list[float]]:
    """Return each option's log p(yes), by task; a call for each option.

    Args:
        model: that is asked.
        tasks: to decide.
        known: of the person, in words, for each task.

    Raises:
        ValueError: a prompt is longer than what the model can read.
    """
    asked = [prompts.offers(*each) for each in zip(tasks, known, strict=True)]
    answers = [(prompt, [prompts.YES]) for each in asked for prompt in each]
    found = iter(model.score_all(answers))
    return [[next(found)[0] for _ in each] for each in asked]


# --- the student --------------------------------------------------------------


class Student(LocalModel):
    """A causal language model that learns to choose, and needs no rules for it.

    Args:
        model: gets adapters, in place; its own weights stay as they are.
        tokenizer: its tokenizer.
        settings: of the training.
        seed: of the adapters and of the order of lessons.

    Attributes:
        usage: what its decisions used: a call for each option.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: DistillationSettings,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(stream(seed, "adapters"))
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
        )
        adapted: Any = get_peft_model(model, config)
        super().__init__(adapted, tokenizer)
        self.settings = settings
        self.seed = seed

    @property
    def adapters(self) -> dict[str, nn.Parameter]:
        """The weights that are trained, by name."""
        named = self.model.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad}

    def learn(
        self,
        lessons: Sequence[Lesson],
        learning_rate: float,
        directory: Path | None = None,
    ) -> History:
        """Learn to choose.

        Args:
            lessons: as many as a batch has tasks, or more.
            learning_rate: highest.
            directory: for checkpoints, from which it goes on if it was stopped.

        Raises:
            ValueError: there are fewer lessons than a batch has tasks, or a prompt is
                longer than what the model can read.
        """
        s = self.settings
        return train(
            Learner(self.model, _loss),
            [self._encoded(lesson) for lesson in lessons],
            lambda learner, batch: learner(**batch),
            TrainingSettings.fine_tuning(
                s.steps, s.batch_size, learning_rate, stream(self.seed, "order")
            ),
            collate=self._collated,
            directory=directory,
            label="distillation",
        )

    def decide(self, task: Task) -> Decision:
        """Take the likeliest option, the first of equal ones."""
        return self.decide_all([task])[0]

    def decide_all(self, tasks: Sequence[Task]) -> list[Decision]:
        """:meth:`decide` for many tasks, read in batches."""
        scores = offer_scores(self, tasks, [""] * len(tasks))
        return [Decision.highest(found) for found in scores]

    def _encoded(self, lesson: Lesson) -> _Encoded:
        """Encode a lesson as its task is asked in :func:`offer_scores`."""
        ids, labels = [], []
        for prompt in prompts.offers(lesson.task):
            [row] = self._continuations(prompt, [prompts.YES])
            ids.append(torch.tensor(row.ids))
            labels.append(ids[-1].clone())
            labels[-1][: row.start] = IGNORED
        share = torch.zeros(len(ids))
        share[list(lesson.best)] = 1 / len(lesson.best)
        return _Encoded(ids, labels, share)

    def _collated(self, batch: Sequence[_Encoded]) -> dict[str, Any]:
        """Return the rows of all tasks, padded, and the shares of each task."""
        ids = [row for one in batch for row in one.ids]
        labels = [row for one in batch for row in one.labels]
        masks = [torch.ones_like(row) for row in ids]
        return {
            "input_ids": pad_sequence(ids, True, self.tokenizer.pad_token_id or 0),
            "attention_mask": pad_sequence(masks, True, 0),
            "labels": pad_sequence(labels, True, IGNORED),
            "shares": [one.share for one in batch],
        }


class _Encoded(NamedTuple):
    """A lesson as the model reads it, a row for each option."""

    ids: list[Tensor]
    labels: list[Tensor]
    share: Tensor


def _loss(model: Any, labels: Tensor, shares: list[Tensor], **inputs: Any) -> Tensor:
    scores = log_probs(model, labels, inputs)
    return choice_loss(scores.split([len(share) for share in shares]), shares)
