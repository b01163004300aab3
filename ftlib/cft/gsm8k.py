"""CFT on a real language model: GSM8K.

A small instruction-tuned model is fine-tuned on questions of GSM8K's training part and
asked, in its own chat format, those of GSM8K's test part, SVAMP and MATH-500.

The teacher's solution is GSM8K's. A question's response is that solution, or, as often
as the paper's responses were wrong, what :mod:`ftlib.cft.annotations` makes of it: one
calculation is wrong, and all that follows from it. Critiques are written by rule. Every
arm has the same questions, steps and batch; its learning rate, and which of its
checkpoints is tested, are chosen on questions of the training part that no arm is
trained on.

What was expected, before anything was run:

* CFT rederive answers more of GSM8K's test than SFT noisy. This is the claim that is
  tested. The gap should be small: these mistakes have no system, and the most frequent
  continuation stays the right one.
* CFT rederive is at most as good as SFT teacher, which is told the same solutions.
* Locate and fix transfer little, and answer with critiques: the format drifts.
* A shuffled response does as well as the question's own.

The experiments: ``gsm8k`` (all of this), and ``gsm8k-learning-rate`` (how each arm's
was chosen).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ftlib import data, models, runtime
from ftlib.cft.annotations import corrupt_all
from ftlib.cft.critiques import is_right, read_verdict, write_critique
from ftlib.cft.data import (
    Example,
    Features,
    PaddingCollator,
    criticise,
    encode_prompts,
    imitate,
    tokenize_examples,
)
from ftlib.cft.evaluation import complete
from ftlib.cft.finetuning import (
    Snapshots,
    Tuned,
    mean_target_tokens,
    strangers,
)
from ftlib.cft.objective import Learner
from ftlib.cft.settings import (
    ALL_WEIGHTS,
    GSM8K_LEARNING_RATES,
    LORA,
    REAL_WORLD,
    TRIED_GSM8K_LEARNING_RATES,
    TRIED_LORA_LEARNING_RATES,
    TUNING_SEED,
    Gsm8kSettings,
    Recipe,
)
from ftlib.cft.solutions import GSM8K, Solution
from ftlib.data.registry import checksums, data_sets
from ftlib.experiments import Arm
from ftlib.metrics import Grade, grade_all
from ftlib.models.registry import weights_checksums
from ftlib.outcomes import outcome_metrics
from ftlib.results import PACKED_PREFIX, Metric
from ftlib.runtime import progress
from ftlib.streams import generator, stream
from ftlib.training import train

Metrics = Mapping[str, Metric | float]

TRAINED_ON = "math/gsm8k/train.jsonl"
TESTED_ON = ("math/gsm8k/test.jsonl", "svamp/SVAMP.json", "math/math-500/test.jsonl")


def gsm8k_arms(world: Gsm8kSettings = REAL_WORLD) -> list[Arm]:
    """All arms on GSM8K; those of the tuning last."""
    compared = [
        *(Condition(n, recipe, world) for n, recipe in ALL_WEIGHTS.items()),
        *(Condition(n, recipe, world, is_lora=True) for n, recipe in LORA.items()),
    ]
    tuned = [c for c in compared if c.recipe]
    return [
        *(_arm(c) for c in compared),
        *(_tuning_arm(c, rate) for c in tuned for rate in c.tried),
    ]


@dataclass(frozen=True)
class Condition:
    """What the model is fine-tuned on, and how.

    Attributes:
        name: of the arm.
        recipe: of the examples; None leaves the model as it is.
        world: questions, steps, batch, model.
        is_lora: whether adapters are trained, and not all weights.
    """

    name: str
    recipe: Recipe | None
    world: Gsm8kSettings
    is_lora: bool = False

    @property
    def learning_rate(self) -> float:
        """The rate that is taken; 0 for a model left as it is."""
        return GSM8K_LEARNING_RATES[self.name] if self.recipe else 0.0

    @property
    def tried(self) -> tuple[float, ...]:
        """The rates that are tried."""
        return TRIED_LORA_LEARNING_RATES if self.is_lora else TRIED_GSM8K_LEARNING_RATES

    def settings(self, learning_rate: float) -> dict[str, Any]:
        """All that is set, for the record."""
        # What else a recipe has belongs to chain arithmetic.
        fields = ("target", "form", "shown", "kept")
        return {
            **dataclasses.asdict(self.world),
            "arm": self.name,
            "recipe": self.recipe and {f: getattr(self.recipe, f) for f in fields},
            "lora": self.is_lora,
            "learning_rate": learning_rate,
        }


def _arm(condition: Condition) -> Arm:
    rate = condition.learning_rate
    return Arm(
        "gsm8k",
        condition.name,
        condition.settings(rate),
        partial(run, condition, rate),
        data=_checksums(condition, [TRAINED_ON, *TESTED_ON]),
        requires=[condition.world.model],
    )


def _tuning_arm(condition: Condition, rate: float) -> Arm:
    return Arm(
        "gsm8k-learning-rate",
        f"{condition.name} {rate:g}",
        condition.settings(rate),
        partial(tune, condition, rate),
        data=_checksums(condition, [TRAINED_ON]),
        requires=[condition.world.model],
    )


def _checksums(condition: Condition, paths: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the data files, and of the weights where every source has the same."""
    found = checksums(*data_sets(), read=lambda path: path in paths)
    return found | weights_checksums(condition.world.model)


# -- one run ---------------------------------------------------------------------------


def run(condition: Condition, rate: float, seed: int) -> Metrics:
    """Fine-tune; test the checkpoint that is best on validation, and the last."""
    world = condition.world
    model, tokenizer = student(condition, seed)
    tuned = fine_tune(condition, model, tokenizer, rate, seed)
    exams = exams_of(world)
    best = last = examine(tuned.load(tuned.best), tokenizer, exams, world)
    if tuned.best < len(tuned.steps) - 1:
        last = examine(tuned.load(-1), tokenizer, exams, world)
    return {
        **best,
        **{f"last {n}": m for n, m in last.items() if not n.startswith(PACKED_PREFIX)},
        **tuned.effort(),
        "refused": homework(world, seed).refused,
    }


def tune(condition: Condition, rate: float, seed: int) -> Metrics:
    """Try a learning rate on a seed that is not reported, without a look at a test."""
    own = TUNING_SEED + seed
    tuned = fine_tune(condition, *student(condition, own), rate, own)
    return tuned.chosen()


def student(
    condition: Condition, seed: int
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load the model in float32, with new adapters for LoRA, and its tokenizer.

    Raises:
        ftlib.models.ModelUnavailable: it is not at hand and cannot be fetched.
    """
    world = condition.world
    model, tokenizer = models.load_causal_lm(world.model, dtype=torch.float32)
    if not condition.is_lora:
        return model, tokenizer
    torch.manual_seed(stream(seed, "adapters"))
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=world.rank,
        lora_alpha=world.alpha,
        target_modules="all-linear",
    )
    return get_peft_model(model, lora), tokenizer


def fine_tune(
    condition: Condition,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rate: float,
    seed: int,
) -> Tuned:
    """Fine-tune a model in place, and validate its checkpoints.

    Raises:
        ValueError: an example does not fit into ``max_length``, or holds a control
            token.
    """
    world = condition.world
    work = homework(world, seed)
    made: list[Features] = []
    tokens = 0.0
    snapshots = Snapshots(model, [world.steps], world.checkpoints)
    if condition.recipe:
        made = features(examples(condition.recipe, work, seed), tokenizer, world)
        tokens = world.steps * world.batch_size * mean_target_tokens(made)
        train(
            Learner(model),
            made,
            snapshots.loss,
            world.training(rate, stream(seed, "order")),
            collate=PaddingCollator(tokenizer.pad_token_id),
            label=condition.name,
        )
    tuned = Tuned.of(snapshots, len(made), tokens)
    exams = {"validation": work.validation}
    for index in range(len(tuned.steps)):
        found = examine(tuned.load(index), tokenizer, exams, world)
        tuned.validation.append(found["validation"])
    return tuned


# -- questions and examples ------------------------------------------------------------


class Exam(NamedTuple):
    """Questions that nothing is trained on.

    Attributes:
        questions: their texts.
        answers: the right ones.
        longest: tokens after which an answer is cut off.
    """

    questions: list[str]
    answers: list[str]
    longest: int


class Homework(NamedTuple):
    """The questions of GSM8K's training part, and who made what of them.

    Attributes:
        responses: some of them wrong.
        references: right solutions of the same questions, in the same order.
        validation: other questions.
        refused: share of the training part's questions in which no calculation can be
            made wrong; they are in neither.
    """

    responses: list[Solution]
    references: list[Solution]
    validation: Exam
    refused: Metric


@lru_cache(maxsize=2)
def homework(world: Gsm8kSettings, seed: int) -> Homework:
    """Give every question a response, and keep some questions for validation.

    The seed decides which responses are wrong and how, and not which questions there
    are. It is worked out once for all arms of a seed.
    """
    rows = data.gsm8k("train")
    corruptions, refused = corrupt_all(rows, stream(seed, "corruptions"))
    is_wrong = generator(seed, "wrong").random(len(corruptions)) < world.wrong
    solved = [
        (corruption.response if wrong else corruption.reference, corruption.reference)
        for corruption, wrong in zip(corruptions, is_wrong, strict=True)
    ]
    solved.sort(key=lambda pair: hashlib.sha256(pair[1].question.encode()).digest())
    kept, asked = solved[: world.validation], solved[world.validation :]
    return Homework(
        [response for response, _ in asked],
        [reference for _, reference in asked],
        Exam(
            [reference.question for _, reference in kept],
            [reference.answer for _, reference in kept],
            world.answer_tokens,
        ),
        Metric(sum(refused.values()) / len(rows), len(rows)),
    )


def exams_of(world: Gsm8kSettings) -> dict[str, Exam]:
    """Load the tests: ``gsm8k``, ``svamp`` and ``math-500``."""
    return {
        "gsm8k": _exam(data.gsm8k("test"), world.answer_tokens),
        "svamp": _exam(data.svamp(), world.answer_tokens),
        "math-500": _exam(data.math500(), world.math_tokens),
    }


def _exam(problems: Iterable[Mapping[str, Any]], longest: int) -> Exam:
    pairs = [(problem["question"], problem["reference"]) for problem in problems]
    return Exam([q for q, _ in pairs], [answer for _, answer in pairs], longest)


def examples(recipe: Recipe, work: Homework, seed: int) -> list[Example]:
    """Write a recipe's examples of the questions."""
    texts = [response.text(GSM8K) for response in work.responses]
    shown = texts
    if recipe.shown == "shuffled":
        shown = [texts[index] for index in strangers(len(texts), seed)]
    made = []
    for index, response in enumerate(work.responses):
        reference = work.references[index]
        if recipe.kept != "all" and is_right(response, reference) != (
            recipe.kept == "right"
        ):
            continue
        question = reference.question
        if recipe.target == "response":
            made.append(imitate(question, texts[index]))
        elif recipe.target == "solution":
            made.append(imitate(question, reference.text(GSM8K)))
        else:
            critique = write_critique(recipe.form, response, reference, GSM8K)
            made.append(criticise(question, shown[index], critique))
    return made


def features(
    made: Sequence[Example], tokenizer: PreTrainedTokenizerBase, world: Gsm8kSettings
) -> list[Features]:
    """Tokenize examples, all of them whole: the arms then have the same questions.

    Raises:
        ValueError: one does not fit into ``max_length``, or holds a control token.
    """
    tokenized = tokenize_examples(made, tokenizer, world.max_length)
    if tokenized.truncated or tokenized.dropped:
        raise ValueError(
            f"of {len(made)} examples {tokenized.truncated} are longer than max_length"
            f" {world.max_length}, and these were dropped: {tokenized.dropped}. Raise"
            " max_length, or take a tokenizer whose control tokens are in no question"
        )
    return tokenized.features


# -- answers ---------------------------------------------------------------------------


class Written(NamedTuple):
    """What a model wrote.

    Attributes:
        text: without special tokens.
        ended: whether it ended its turn, and was not cut off.
    """

    text: str
    ended: bool


def examine(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    exams: Mapping[str, Exam],
    world: Gsm8kSettings,
) -> dict[str, Metric]:
    """Let a model answer exams directly and greedily, and grade what it writes.

    Returns:
        For each exam :func:`scores`, and the outcome of every problem: see
        :func:`ftlib.outcomes.outcomes`.
    """
    written = answer(model, tokenizer, exams, world)
    references = [one for exam in exams.values() for one in exam.answers]
    grades = grade_all([one.text for one in written], references)
    metrics: dict[str, Metric] = {}
    start = 0
    for name, exam in exams.items():
        own = slice(start, start + len(exam.answers))
        start = own.stop
        metrics |= scores(name, written[own], grades[own])
        right = np.array([grade.correct for grade in grades[own]])
        metrics |= outcome_metrics(name, right)
    return metrics


def scores(
    name: str, written: Sequence[Written], grades: Sequence[Grade]
) -> dict[str, Metric]:
    """Shares of an exam's answers, with its name before those that are not accuracy.

    Returns:
        ``<name>``: right ones; ``ended``: those that ended their turn; ``parsed``:
        those whose answer could be found and read; ``announced``: those whose answer
        was not just the last number, see :func:`ftlib.metrics.find_answer`;
        ``critique``: those with a line that gives a verdict, although a question was
        asked; ``timed out``: those that the grader gave up, and counted as wrong.
    """

    def share(flags: Iterable[bool]) -> Metric:
        return Metric(float(np.mean(list(flags))), len(written))

    reasons = [grade.reason for grade in grades]
    given_up = ("timed out", "crashed")
    unread = (*given_up, "no answer", "unreadable answer")
    announced = ("boxed", "hashes", "phrase")
    return {
        name: share(grade.correct for grade in grades),
        f"{name} ended": share(one.ended for one in written),
        f"{name} parsed": share(reason not in unread for reason in reasons),
        f"{name} announced": share(grade.rule in announced for grade in grades),
        f"{name} critique": share(gives_verdict(one.text) for one in written),
        f"{name} timed out": share(reason in given_up for reason in reasons),
    }


def gives_verdict(text: str) -> bool:
    """Whether a line of a text is a verdict, as in a critique."""
    return any(read_verdict(line) for line in text.splitlines())


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    exams: Mapping[str, Exam],
    world: Gsm8kSettings,
) -> list[Written]:
    """Answer all questions of some exams, one exam after the other."""
    questions = [question for exam in exams.values() for question in exam.questions]
    longest = [exam.longest for exam in exams.values() for _ in exam.questions]
    end = end_of_turn(tokenizer)
    written = write(
        writer(model), encode_prompts(tokenizer, questions), longest, end, world
    )
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [
        Written(text, ended=tokens[-1] == end)
        for text, tokens in zip(texts, written, strict=True)
    ]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a model learns to end its answers with."""
    [one] = tokenize_examples([imitate("?", "!")], tokenizer, 1 << 20).features
    return one["labels"][-1]


def writer(model: nn.Module) -> nn.Module:
    """A copy to write with: adapters merged, in the precision of its device."""
    copied: Any = copy.deepcopy(model)
    if isinstance(copied, PeftModel):
        copied = copied.merge_and_unload()
    # The checkpoint's own file may ask for a penalty, and generate fills from there
    # what its argument leaves open.
    copied.generation_config = GenerationConfig()
    return copied.to(runtime.precision(copied.device).dtype)


def write(
    model: nn.Module,
    prompts: Sequence[list[int]],
    longest: Sequence[int],
    end: int,
    world: Gsm8kSettings,
) -> list[list[int]]:
    """Continue every prompt greedily, up to its longest answer, in large batches.

    They are continued ``round_tokens`` at a time, so that one answer which goes on does
    not keep the others in its batch.

    Args:
        model: a causal language model of transformers.
        prompts: token ids; they may differ in length.
        longest: tokens after which each answer is cut off, one or more.
        end: the token that ends an answer.
        world: the sizes of rounds and batches.

    Returns:
        The tokens written for each prompt, the end token included where it was reached.
    """
    written: list[list[int]] = [[] for _ in prompts]
    open_ = list(range(len(prompts)))
    with progress(total=len(prompts), desc="answering", unit="answer") as bar:
        while open_:
            texts = {i: prompts[i] + written[i] for i in open_}
            lengths = {i: len(text) + world.round_tokens for i, text in texts.items()}
            for batch in batches(lengths, world.cache_tokens):
                asked = [texts[i] for i in batch]
                found = complete(model, asked, world.round_tokens, end=end)
                for i, tokens in zip(batch, found, strict=True):
                    written[i] = (written[i] + tokens)[: longest[i]]
            before = len(open_)
            open_ = [
                i
                for i in open_
                if written[i][-1] != end and len(written[i]) < longest[i]
            ]
            bar.update(before - len(open_))
    return written


def batches(lengths: Mapping[int, int], tokens: int) -> list[list[int]]:
    """Put rows of about one length together.

    Args:
        lengths: of the rows, by index.
        tokens: that a batch may hold, all its rows as long as its longest. A row that
            is longer is alone.
    """
    found: list[list[int]] = []
    for index in sorted(lengths, key=lengths.__getitem__):
        if not found or (len(found[-1]) + 1) * lengths[index] > tokens:
            found.append([])
        found[-1].append(index)
    return found
