"""CAREF on real tasks: e-SNLI, ComVE and CoS-E, in the format of the benchmark FEB.

A model is fine-tuned on 48 examples (``48-shot``) or 4,000 (``4000-shot``) that the
seed draws, and writes ``LABEL because EXPLANATION`` for about 350 items. The four
losses are CAREF with and without each of its terms, all with the released weights. The
weights trained are all, or the queries of the decoder's attentions (AQ). LoRA with
cross-entropy is what the paper compares with. Every arm has the same examples, steps,
batch and schedule, and a learning rate of its own, chosen on items of the training
part.

The models, those of them that are at hand:

* ``flan-t5-small`` and ``flan-t5-base``, of the paper's family. They are
  **contaminated**: the mixture that Flan-T5 was tuned on holds e-SNLI and ComVE with
  explanations (``cot_esnli``, ``cot_sensemaking``) and prompts of CoS-E with
  explanations. What they do after 48 examples is not what 48 examples teach, so the
  arm ``base`` belongs beside every number of theirs.
* ``opus-mt-en-fr``, an encoder-decoder that translates English into French. It has met
  neither the tasks nor the writing of English, which it has to learn here.
* ``smollm2-135m``, decoder-only, tuned to follow instructions, in its chat format.
  Whether it has met these data is not known.

What differs from FEB: the data (see :mod:`ftlib.caref.tasks`); the seeds, of which
there are fewer than 60; 16 examples a step, so that its 25 epochs take 75 steps and not
300; and the schedule, which is a linear decay, as in CAREF's released code, after a
warm-up over a tenth of the steps. The loss is a mean over the target tokens of a batch,
as in that code.

What is measured, per run:

* ``accuracy``, the share of labels that are the gold one, case aside; ``nBERT`` and
  ``nBERT ungated``, from 0 to 100, with the encoder that the settings name;
  ``valid``, the share of outputs with ``because`` after a label; ``ended``, the share
  that came to an end.
* Of the labels' probabilities: ``ECE`` of the most probable label, beside ``ECE if
  calibrated``; ``ECE classwise``, of the labels or, in CoS-E, of the places in its list
  of choices; ``Brier``, ``NLL``, ``confidence``, and ``label accuracy``, that of the
  most probable label.

The probability of a label is that of its text followed by ``because``: the product of
its tokens' probabilities, without normalising by length, because the product is the
probability that the model writes just that, and no label is the beginning of another
one then. It is divided by the sum over the item's labels; ``label mass`` is that sum.

What was expected, before anything was run:

* AQ CAREF and LoRA r=4 are within a point of accuracy. That CAREF-AQ outperforms LoRA
  is the claim that is tested.
* With the same weights trained, the losses differ by less than a point of accuracy.
* nBERT follows accuracy, and the ungated score differs by less than a point.
* SCED raises confidence, and with it ECE, Brier and NLL; KL lowers confidence. CAREF,
  which has both, is on SCED's side.
* After 48 examples, smollm2-135m and opus-mt-en-fr are near chance on e-SNLI and
  CoS-E, so that arms differ in format more than in accuracy. After 4,000 they are not.

The experiments: ``48-shot TASK MODEL`` and ``4000-shot TASK MODEL``, for every task and
model, and ``48-shot-learning-rate TASK MODEL`` and its like, how each arm's rate was
chosen.

For a look at real text without a GPU, :func:`taste` takes a few steps and shows what
the model reads, learns and writes::

    for name, text in taste()._asdict().items():
        print(f"{name}: {text}")
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, GenerationConfig

from ftlib import models
from ftlib.caref.objective import CAREF, trainer_loss
from ftlib.caref.selection import lora, select
from ftlib.caref.tasks import SEPARATOR, TASKS, Item, few_shot, read
from ftlib.data.registry import checksums
from ftlib.experiments import Arm
from ftlib.metrics import calibration
from ftlib.metrics.bertscore import STAND_IN, Encoder, load_encoder, nbert
from ftlib.models.registry import weights_checksums
from ftlib.ops import TokenLoss
from ftlib.results import Metric
from ftlib.sequences import IGNORED
from ftlib.training import Learner, TrainingSettings, train

Metrics = Mapping[str, Metric | float]
Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]
Weights = Literal["all", "AQ", "LoRA r=4", "LoRA r=128"]

# --- settings -------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """How much is learned and asked, equal for all arms.

    Attributes:
        name: of the protocol.
        shots: examples to train on, each seed's own.
        evaluation: items to evaluate with, each seed's own.
        validation: items of the training part to choose a learning rate by.
        steps: updates of the weights.
        batch_size: examples in a step.
        answer_tokens: after so many an answer is cut off; the released code's limit.
            About 1 in 1,000 of the data's explanations is longer, in SmolLM2's tokens.
        together: prompts or labels that go through the model together in evaluation.
        encoder: short name of what nBERT is measured with.
        encoder_layer: whose output nBERT takes.
    """

    name: str
    shots: int
    steps: int
    batch_size: int
    evaluation: int = 350
    validation: int = 350
    answer_tokens: int = 64
    together: int = 175
    encoder: str = STAND_IN[0]
    encoder_layer: int = STAND_IN[1]

    def training(self, learning_rate: float, seed: int) -> TrainingSettings:
        """Training settings: a linear decay after a warm-up over a tenth."""
        return TrainingSettings.fine_tuning(
            self.steps, self.batch_size, learning_rate, seed, "linear"
        )


class Recipe(NamedTuple):
    """Which weights are trained, with which loss."""

    weights: Weights
    loss: TokenLoss


FEW = Protocol("48-shot", shots=48, steps=75, batch_size=16)
"""25 epochs, as in FEB."""
MANY = Protocol("4000-shot", shots=4000, steps=375, batch_size=32)
"""Three epochs."""
PROTOCOLS = (FEW, MANY)

BENCHMARKS = ("esnli", "comve", "cose")
MODELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "flan-t5-small": models.load_seq2seq_lm,
        "flan-t5-base": models.load_seq2seq_lm,
        "opus-mt-en-fr": models.load_seq2seq_lm,
        "smollm2-135m": models.load_causal_lm,
    }
)
"""Short names, and what loads them."""

CROSS_ENTROPY = TokenLoss()
LOSSES: Mapping[str, TokenLoss] = MappingProxyType(
    {
        "CE": CROSS_ENTROPY,
        "KL": dataclasses.replace(CAREF, sced=0.0),
        "SCED": dataclasses.replace(CAREF, kl_to_uniform=0.0),
        "CAREF": CAREF,
    }
)
RANKS: Mapping[Weights, int] = MappingProxyType({"LoRA r=4": 4, "LoRA r=128": 128})
ARMS: Mapping[str, Recipe | None] = MappingProxyType(
    {
        "base": None,
        **{name: Recipe("all", loss) for name, loss in LOSSES.items()},
        **{f"AQ {name}": Recipe("AQ", loss) for name, loss in LOSSES.items()},
        **{weights: Recipe(weights, CROSS_ENTROPY) for weights in RANKS},
    }
)

# The tuning tries these on seeds from 1000 up, which are not reported. All tasks of a
# model share an arm's rate. Not yet tuned: no GPU was at hand. The paper's is 3e-5.
TUNING_SEED = 1000
TRIED_LEARNING_RATES: Mapping[Weights, tuple[float, ...]] = MappingProxyType(
    {
        "all": (3e-5, 1e-4, 3e-4),
        "AQ": (3e-5, 3e-4, 1e-3),
        "LoRA r=4": (3e-4, 1e-3, 3e-3),
        "LoRA r=128": (1e-4, 3e-4, 1e-3),
    }
)
LEARNING_RATES: Mapping[str, float] = MappingProxyType(
    {
        f"{protocol.name}/{model}/{arm}": TRIED_LEARNING_RATES[recipe.weights][1]
        for protocol in PROTOCOLS
        for model in MODELS
        for arm, recipe in ARMS.items()
        if recipe
    }
)

# --- the plan -------------------------------------------------------------------------


def benchmark_arms(protocols: Sequence[Protocol] = PROTOCOLS) -> list[Arm]:
    """All arms, on every task, with every model; those of the tuning last."""
    compared = [
        Condition(name, recipe, task, model, protocol)
        for protocol in protocols
        for model in MODELS
        for task in BENCHMARKS
        for name, recipe in ARMS.items()
    ]
    tuned = [condition for condition in compared if condition.recipe]
    return [
        *(_arm(condition) for condition in compared),
        *(_tuning_arm(one, rate) for one in tuned for rate in one.tried),
    ]


@dataclass(frozen=True)
class Condition:
    """What is fine-tuned on what, and how.

    Attributes:
        name: of the arm.
        recipe: weights and loss; None leaves the model as it is.
        task: one of ``BENCHMARKS``.
        model: one of :data:`MODELS`.
        protocol: examples, steps, batch.
    """

    name: str
    recipe: Recipe | None
    task: str
    model: str
    protocol: Protocol

    @property
    def learning_rate(self) -> float:
        """The rate that is taken; 0 for a model left as it is."""
        if not self.recipe:
            return 0.0
        return LEARNING_RATES[f"{self.protocol.name}/{self.model}/{self.name}"]

    @property
    def tried(self) -> tuple[float, ...]:
        """The rates that are tried; none for a model left as it is."""
        return TRIED_LEARNING_RATES[self.recipe.weights] if self.recipe else ()

    def settings(self, learning_rate: float) -> dict[str, Any]:
        """All that is set, for the record."""
        recipe = self.recipe
        return {
            **dataclasses.asdict(self.protocol),
            "arm": self.name,
            "weights": recipe and recipe.weights,
            "loss": recipe and dataclasses.asdict(recipe.loss),
            "task": self.task,
            "model": self.model,
            "learning_rate": learning_rate,
        }


def _arm(condition: Condition) -> Arm:
    rate = condition.learning_rate
    encoder = condition.protocol.encoder
    return Arm(
        f"{condition.protocol.name} {condition.task} {condition.model}",
        condition.name,
        condition.settings(rate),
        partial(run, condition, rate),
        data=_checksums(condition.task, condition.model, encoder),
        requires=[condition.model, encoder],
    )


def _tuning_arm(condition: Condition, rate: float) -> Arm:
    protocol, task, model = condition.protocol, condition.task, condition.model
    return Arm(
        f"{protocol.name}-learning-rate {task} {model}",
        f"{condition.name} {rate:g}",
        condition.settings(rate),
        partial(tune, condition, rate),
        data=_checksums(task, model),
        requires=[model],
    )


def _checksums(task: str, *names: str) -> dict[str, str]:
    """SHA-256 of the data files, and of the weights where every source has the same."""
    found = checksums(task, read=lambda path: path != "comve/test.csv")
    return found | weights_checksums(*names)


# --- one run --------------------------------------------------------------------------


def run(condition: Condition, rate: float, seed: int) -> Metrics:
    """Fine-tune on one seed's examples, and evaluate on its items."""
    protocol = condition.protocol
    drawn = few_shot(condition.task, seed, protocol.shots, protocol.evaluation)
    student = prepare(condition, seed)
    share = _trained_share(student.model) if condition.recipe else 0.0
    student = fine_tune(condition, student, drawn.train, rate, seed)
    return {
        **examine(student, condition.task, drawn.evaluation, protocol),
        "trained share": share,
    }


def tune(condition: Condition, rate: float, seed: int) -> Metrics:
    """Try a learning rate on a seed that is not reported, without a look at a test."""
    own = TUNING_SEED + seed
    examples, held_out = split(condition.task, own, condition.protocol)
    student = fine_tune(condition, prepare(condition, own), examples, rate, own)
    written = answer(student, held_out, condition.protocol)
    return {"validation": _share(_is_right(written, held_out))}


def split(task: str, seed: int, protocol: Protocol) -> tuple[list[Item], list[Item]]:
    """Draw examples to train on and items to validate with, of the training part.

    Both have equally many items of every class, where the task has classes.
    """
    labels = TASKS[task].labels
    share = protocol.shots // (len(labels) or 1)
    drawn = few_shot(task, seed, protocol.shots + protocol.validation, evaluation=0)
    examples: list[Item] = []
    held_out: list[Item] = []
    taken = Counter[str]()
    for item in drawn.train:
        kind = item.label if labels else ""
        (examples if taken[kind] < share else held_out).append(item)
        taken[kind] += 1
    return examples, held_out


class Student(NamedTuple):
    """A model of transformers and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether what is read and what is written have places of their own."""
        return bool(self.model.config.is_encoder_decoder)


@lru_cache(maxsize=1)
def _pretrained(name: str) -> Student:
    return Student(*MODELS[name](name, dtype=torch.float32))


def prepare(condition: Condition, seed: int) -> Student:
    """Copy the model, in float32, with the weights selected that are to be trained.

    Raises:
        ftlib.models.ModelUnavailable: it is not at hand and cannot be fetched.
    """
    pretrained = _pretrained(condition.model)
    model = copy.deepcopy(pretrained.model)
    # The checkpoint's may ask for beams or a penalty, and generate fills from there
    # what its argument leaves open.
    model.generation_config = GenerationConfig()
    torch.manual_seed(seed)
    if condition.recipe:
        model = _choose_weights(model, condition.recipe.weights)
    return Student(model, pretrained.tokenizer)


def _choose_weights(model: Any, weights: Weights) -> Any:
    if weights in RANKS:
        return get_peft_model(model, lora(RANKS[weights]))
    select(model, "BASE" if weights == "all" else "AQ")
    return model


def _trained_share(model: nn.Module) -> float:
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, is_trained in sizes if is_trained) / sum(n for n, _ in sizes)


def fine_tune(
    condition: Condition,
    student: Student,
    examples: Sequence[Item],
    rate: float,
    seed: int,
) -> Student:
    """Fine-tune a model in place; adapters are merged into the model returned."""
    model, tokenizer = student
    if not condition.recipe:
        return student
    train(
        Learner(model, partial(mean_loss, loss=condition.recipe.loss)),
        features(student, [(item.prompt, item.target) for item in examples]),
        lambda learner, batch: learner(**batch),
        condition.protocol.training(rate, seed),
        collate=DataCollatorForSeq2Seq(tokenizer),
        label=condition.name,
    )
    merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
    return Student(merged, tokenizer)


def mean_loss(model: Any, labels: Tensor, loss: TokenLoss, **inputs: Tensor) -> Tensor:
    """Return the mean loss of a collator's batch over its target tokens.

    It is taken from the logits, which Marian's bias is part of, and which
    :func:`ftlib.caref.objective.caref_loss` therefore refuses.
    """
    return trainer_loss(model, loss)(_forward(model, labels, inputs), labels)


def _forward(model: Any, labels: Tensor, inputs: Mapping[str, Tensor]) -> Any:
    if model.config.is_encoder_decoder:
        shifted = model.prepare_decoder_input_ids_from_labels(labels)
        inputs = {**inputs, "decoder_input_ids": shifted}
    return model(**inputs, use_cache=False)


# --- from text to tokens --------------------------------------------------------------


def features(
    student: Student, pairs: Sequence[tuple[str, str]], *, ended: bool = True
) -> list[dict[str, list[int]]]:
    """Tokenize prompts with what is to be written after them.

    Args:
        student: an encoder-decoder reads the prompt; a decoder-only model reads it in
            its chat format, and the text goes on from there.
        pairs: prompts and texts.
        ended: whether the token that ends an answer is part of what is written.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` of each, as transformers'
        collators take them; labels are −100 on a prompt that the text goes on from.
    """
    prompts = encode_prompts(student, [prompt for prompt, _ in pairs])
    texts = student.tokenizer(
        text_target=[text for _, text in pairs], add_special_tokens=False
    ).input_ids
    end = [student.tokenizer.eos_token_id] if ended else []
    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids, labels = prompt, [*text, *end]
        if not student.is_encoder_decoder:
            ids, labels = [*prompt, *labels], [*[IGNORED] * len(prompt), *labels]
        mask = [1] * len(ids)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def encode_prompts(student: Student, prompts: Iterable[str]) -> list[list[int]]:
    """Return the tokens after which the model writes its answer."""
    tokenizer = student.tokenizer
    if student.is_encoder_decoder:
        encoded: list[list[int]] = tokenizer(list(prompts)).input_ids
        return encoded
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for prompt in prompts
    ]
    encoded = tokenizer(asked, add_special_tokens=False).input_ids
    return encoded


# --- what a model writes --------------------------------------------------------------


class Written(NamedTuple):
    """What a model wrote.

    Attributes:
        text: without special tokens.
        ended: whether it came to an end, and was not cut off.
    """

    text: str
    ended: bool


def examine(
    student: Student, task: str, items: Sequence[Item], protocol: Protocol
) -> dict[str, Metric]:
    """Score what a model writes, and the probabilities that it gives to labels."""
    written = answer(student, items, protocol)
    log_probs = label_log_probs(student, task, items, protocol)
    right = [labels_of(task, item).index(item.label) for item in items]
    encoder = _encoder(protocol.encoder, protocol.encoder_layer)
    return {
        **written_metrics(written, items, encoder),
        **label_metrics(log_probs, np.array(right)),
    }


def written_metrics(
    written: Sequence[Written], items: Sequence[Item], encoder: Encoder
) -> dict[str, Metric]:
    """Score answers: see the head of this module."""
    outputs = [read(one.text) for one in written]
    scores = nbert(
        [output.label for output in outputs],
        [item.label for item in items],
        [output.explanation for output in outputs],
        [item.explanations for item in items],
        encoder,
    )
    formatted = [
        bool(output.label) and SEPARATOR in one.text
        for output, one in zip(outputs, written, strict=True)
    ]
    return {
        "accuracy": _share(_is_right(written, items)),
        "nBERT": Metric(scores.gated.mean, len(items)),
        "nBERT ungated": Metric(scores.ungated.mean, len(items)),
        "valid": _share(formatted),
        "ended": _share([one.ended for one in written]),
    }


def label_metrics(log_probs: Floats, right: npt.NDArray[np.int64]) -> dict[str, Metric]:
    """Score the probabilities of labels: see the head of this module.

    Args:
        log_probs: logarithm of the probability of each label, [n, K].
        right: which of them is the gold one, [n].
    """
    n = len(right)
    p = calibration.temperature_scale(log_probs, 1.0)
    values = {
        "label accuracy": (p.argmax(1) == right).mean(),
        "label mass": np.exp(log_probs).sum(1).mean(),
        "confidence": p.max(1).mean(),
        "ECE": calibration.ece(p, right),
        "ECE if calibrated": calibration.ece_if_calibrated(p).mean,
        "ECE classwise": calibration.ece(p, right, events="classwise"),
        "Brier": calibration.brier(p, right).mean,
        "NLL": calibration.nll(p, right).mean,
    }
    return {name: Metric(float(value), n) for name, value in values.items()}


@lru_cache(maxsize=1)
def _encoder(name: str, layer: int) -> Encoder:
    return load_encoder(name, layer)


def _is_right(written: Sequence[Written], items: Sequence[Item]) -> Booleans:
    """Which answers have the gold label, case aside, [n]."""
    labels = [read(one.text).label.lower() for one in written]
    pairs = zip(labels, items, strict=True)
    return np.array([label == item.label.lower() for label, item in pairs])


def _share(flags: Sequence[bool] | Booleans) -> Metric:
    return Metric(float(np.mean(flags)), len(flags))


def answer(
    student: Student, items: Sequence[Item], protocol: Protocol
) -> list[Written]:
    """Let a model answer all items greedily, in the precision that its weights have."""
    prompts = encode_prompts(student, [item.prompt for item in items])
    written: dict[int, Written] = {}
    for batch in _by_length([len(prompt) for prompt in prompts], protocol.together):
        asked = [prompts[i] for i in batch]
        tokens = _continue(student, asked, protocol.answer_tokens)
        written |= dict(zip(batch, _texts(student.tokenizer, tokens), strict=True))
    return [written[i] for i in range(len(items))]


def _by_length(lengths: Sequence[int], together: int) -> Iterator[list[int]]:
    """Yield the indices of rows of about one length, so many at a time."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), together):
        yield order[start : start + together]


@torch.no_grad()
def _continue(
    student: Student, prompts: Sequence[list[int]], longest: int
) -> list[list[int]]:
    """Write greedily after prompts that may differ in length."""
    model, tokenizer = student
    # New tokens follow a decoder's prompt at once; an encoder counts from its start.
    side = "right" if student.is_encoder_decoder else "left"
    inputs = tokenizer.pad(
        {"input_ids": prompts}, padding_side=side, return_tensors="pt"
    ).to(model.device)
    tokens = model.generate(**inputs, generation_config=_greedy(student, longest))
    start = 1 if student.is_encoder_decoder else inputs["input_ids"].shape[1]
    return tokens[:, start:].tolist()


def _greedy(student: Student, longest: int) -> GenerationConfig:
    tokenizer, begins = student.tokenizer, {}
    if student.is_encoder_decoder:
        # Their first token pads, too. Marian gives it a logit of 0, which may be the
        # largest one, and was never to write it.
        begins = {
            "decoder_start_token_id": student.model.config.decoder_start_token_id,
            "suppress_tokens": [tokenizer.pad_token_id],
        }
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=longest,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **begins,
    )


def _texts(tokenizer: Any, tokens: Sequence[list[int]]) -> list[Written]:
    texts = tokenizer.batch_decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [
        Written(text, tokenizer.eos_token_id in row)
        for text, row in zip(texts, tokens, strict=True)
    ]


# --- probabilities of labels ----------------------------------------------------------


def labels_of(task: str, item: Item) -> tuple[str, ...]:
    """The labels that an item has to be given one of, in a fixed order."""
    if labels := TASKS[task].labels:
        return labels
    listed = item.prompt.rpartition(r" \n ")[2]
    return tuple(re.split(r" ?\([A-E]\) ", listed)[1:])


@torch.no_grad()
def label_log_probs(
    student: Student, task: str, items: Sequence[Item], protocol: Protocol
) -> Floats:
    """Return the log-probability that a model writes ``LABEL because``, for each label.

    Returns:
        Sums over tokens, in nats, not normalised, [n, K].
    """
    pairs = [
        (item.prompt, f"{label} {SEPARATOR}")
        for item in items
        for label in labels_of(task, item)
    ]
    rows = features(student, pairs, ended=False)
    collate = DataCollatorForSeq2Seq(student.tokenizer)
    sums = np.empty(len(rows))
    for batch in _by_length([len(row["input_ids"]) for row in rows], protocol.together):
        inputs = collate([rows[i] for i in batch]).to(student.model.device)
        sums[batch] = _log_probs(student, **inputs).double().cpu().numpy()
    return sums.reshape(len(items), -1)


def _log_probs(student: Student, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Return the log-probability of each row's labels that are not −100, [rows]."""
    logits = _forward(student.model, labels, inputs).logits
    if not student.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    is_target = labels != IGNORED
    log_p = logits[is_target].float().log_softmax(-1)
    each = log_p.gather(1, labels[is_target][:, None])[:, 0]
    return each.new_zeros(labels.shape).masked_scatter(is_target, each).sum(1)


# --- a taste --------------------------------------------------------------------------


class Taste(NamedTuple):
    """A prompt, what is right, and what a model writes before and after some steps."""

    prompt: str
    target: str
    before: str
    after: str


def taste(
    task: str = "comve", model: str = "smollm2-135m", steps: int = 8, seed: int = 0
) -> Taste:
    """Fine-tune a real model for a handful of steps on the CPU, and let it answer once.

    It shows what goes in and comes out, and measures nothing.

    Args:
        task: one of ``BENCHMARKS``.
        model: one of :data:`MODELS`.
        steps: updates of the weights, two examples each.
        seed: of examples, item and training. All are of the training part.

    Raises:
        ftlib.models.ModelUnavailable: the model is not at hand.
        DataUnavailable: the data is not at hand.
    """
    protocol = dataclasses.replace(FEW, steps=steps, batch_size=2, answer_tokens=24)
    condition = Condition("CAREF", ARMS["CAREF"], task, model, protocol)
    examples, (item, *_) = split(task, seed, protocol)
    student = prepare(condition, seed)
    (before,) = answer(student, [item], protocol)
    student = fine_tune(condition, student, examples, 1e-4, seed)
    (after,) = answer(student, [item], protocol)
    return Taste(item.prompt, item.target, before.text, after.text)
