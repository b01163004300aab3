r"""CT-SFT on real text: NusaX from Indonesian to a regional language, and XNLI.

A pretrained decoder is fine-tuned, all weights, on a task in the source language: that
is phase 0, and gives θ₁. Its circuit is found in the source language alone. Then every
arm goes on from θ₁ with the same few examples of the target language, and the same
steps and batches; the arms are those of :mod:`ftlib.ctsft.experiment`.

=========  ==============  ==================================  =====================
task       source          targets                             related task
=========  ==============  ==================================  =====================
``nusax``  Indonesian      ten regional languages              IndoNLI in Indonesian
``xnli``   English         Swahili, Urdu, Thai                 none
=========  ==============  ==================================  =====================

**NusaX is parallel**: all its languages have the same texts with the same labels. If
phase 0 had all 500 training texts, the target's few shots would be translations of
texts whose labels the model has learnt by heart. Each seed therefore deals the training
texts into two halves of equal labels. Phase 0 and the discovery have the Indonesian of
the one; the shots come from the translations of the other. In validation and test the
target's texts are translations of the source's as well, which nothing is trained on:
phase 0 chooses its checkpoint, and the discovery its number of heads, on the Indonesian
of validation, and rates are chosen on its Javanese. XNLI has no training part in its
languages, so its dev is dealt into four quarters: two for phase 0, one for the shots,
one for validation.

The related task is learnt in phase 0 too, from pairs of IndoNLI's train, and measured
on its ``test_expert``, of whose premises train has none. Of the pairs of its val and
``test_lay``, 94 and 89 % have a premise that train has.

At scale ``cpu`` the model is ``stories15m``, whose 15 million weights know English
stories for children and nothing of Indonesian, and texts end after 64 tokens. IndoNLI
would take more than the minutes there are, so there is no related task.

What is measured, per run, on the way and at the end: accuracy in the target's test, in
the ``source``'s (what is kept) and on the ``related`` task; and ‖Δθ‖. What the majority
label gets is 38.25 % in NusaX's test, 34.9 % in IndoNLI's test_expert. A circuit that
has the asked share of the margin may not exist among the sizes tried; then the largest
is taken, and ``share reached`` is 0 in the record.

What was expected, before any arm was run. Of phase 0 there had been one trial, with
``stories15m`` and all 500 texts: after six epochs it was right in 66 % of the
Indonesian test.

* With 250 texts ``stories15m`` is right in about 60 % of the Indonesian test, and in
  50 % of the Javanese, with which it has names, loans and much of the vocabulary in
  common: more than the majority label's, and less than larger models'.
* 64 shots add 2 to 6 points in Javanese, and the arms differ by less than 3 points from
  one another: five seeds with 200 questions do not tell them apart. Norms alone do
  nearly as well as circuit and norms; random heads do as well.
* Full fine-tuning loses most of the Indonesian, about 3 points; norms and circuit lose
  less than 2. The languages are so close that the shots of the one teach the other, so
  that some arms lose nothing.
* Scores of the rules OURS correlate with real ablation better than those PUBLISHED, as
  on the synthetic languages. The circuit is more faithful than random ones.
* The source's circuit is the target's too: the overlap is about that of two circuits
  found in different halves of the Indonesian texts (``again``), which is the most that
  can be asked for, and much more than by chance. It falls from Javanese and Minangkabau
  to Buginese and Toba Batak.
* Larger models gain less from the shots in Javanese and Minangkabau, and more in
  Buginese and Toba Batak. IndoNLI's experts are hard: after phase 0 they are at 40 to
  50 %, so that there is little to forget.

The experiments, with TASK, MODEL and LANGUAGE in their names: ``TASK MODEL LANGUAGE``
(all arms, 64 shots), ``TASK-16 MODEL LANGUAGE`` and ``TASK-128 …`` (the main arms, with
other shots), ``TASK-discovery MODEL``, and ``TASK-learning-rate MODEL`` (how each
arm's was chosen, on validation in one language).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftlib import models, runtime
from ftlib.bases import base_path, kept_base
from ftlib.ctsft import tasks
from ftlib.ctsft.decomposition import head_means, scores
from ftlib.ctsft.discovery import Circuit, Evidence, faithfulness_curve, ranking
from ftlib.ctsft.evaluation import Questions, is_right, questions
from ftlib.ctsft.runs import (
    Metrics,
    Tuned,
    discovery_metrics,
    heads_to_train,
    overlap_metrics,
    tune_watched,
)
from ftlib.ctsft.settings import ARMS, LOWER, MAIN_ARMS, TUNING_SEED
from ftlib.ctsft.tasks import INFERENCE_WORDS, SENTIMENT_WORDS, Item
from ftlib.ctsft.tuning import Recipe, Weights, tune
from ftlib.data.registry import checksums
from ftlib.data.sets import NUSAX_LANGUAGES
from ftlib.experiments import Arm
from ftlib.models.registry import weights_checksums
from ftlib.streams import generator, stream
from ftlib.training import TrainingSettings

# --- the tasks ------------------------------------------------------------------------


class Parts(NamedTuple):
    """A language's items, by what a seed uses them for.

    Those of two languages are translations of one another, item by item. In each
    language the four parts have no text in common.

    Attributes:
        taught: in the source language, for phase 0 and discovery.
        shots: in the target language, to draw the few examples from.
        validation: to choose by.
        test: to report.
    """

    taught: list[Item]
    shots: list[Item]
    validation: list[Item]
    test: list[Item]


class Task(NamedTuple):
    """A task in parallel languages.

    Attributes:
        words: label words.
        source: the language of phase 0.
        targets: those to go on with.
        tried: the one that learning rates are chosen in.
        compared: those whose own circuits are looked for, and that other numbers of
            shots are tried in.
        parts: takes a language and a seed.
    """

    words: tuple[str, ...]
    source: str
    targets: tuple[str, ...]
    tried: str
    compared: tuple[str, ...]
    parts: Callable[[str, int], Parts]


def nusax_parts(language: str, seed: int) -> Parts:
    """Deal a seed's halves of NusaX's train.

    Raises:
        ValueError, DataUnavailable, DataCorrupt: as :func:`ftlib.data.nusax`.
    """
    train = tasks.nusax(language, "train")
    taught, shots = _dealt(train, 2, seed)
    validation, test = tasks.nusax(language, "valid"), tasks.nusax(language, "test")
    return Parts(taught, shots, validation, test)


def xnli_parts(language: str, seed: int) -> Parts:
    """Deal a seed's quarters of XNLI's dev.

    Raises:
        ValueError, DataUnavailable, DataCorrupt: as :func:`ftlib.data.xnli`.
    """
    one, two, shots, validation = _dealt(tasks.xnli(language, "dev"), 4, seed)
    return Parts([*one, *two], shots, validation, tasks.xnli(language, "test"))


def _dealt(items: Sequence[Item], parts: int, seed: int) -> list[list[Item]]:
    places = tasks.divide([item.label for item in items], parts, seed)
    return [[items[at] for at in part] for part in places]


FOUR = ("javanese", "minangkabau", "buginese", "toba_batak")
"""Two languages near Indonesian, and two that are farther away."""

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "nusax": Task(
            SENTIMENT_WORDS,
            "indonesian",
            tuple(x for x in NUSAX_LANGUAGES if x not in ("indonesian", "english")),
            "javanese",
            FOUR,
            nusax_parts,
        ),
        "xnli": Task(
            INFERENCE_WORDS,
            "en",
            ("sw", "ur", "th"),
            "sw",
            ("sw", "ur", "th"),
            xnli_parts,
        ),
    }
)

# --- settings -------------------------------------------------------------------------


@dataclass(frozen=True)
class Teaching:
    """Phase 0: a pretrained model learns the task in the source language.

    Attributes:
        task: one of ``TASKS``.
        model: short name.
        steps: updates of all weights.
        batch_size: examples in a step.
        learning_rate: highest.
        looks: how many times validation is asked, evenly; the checkpoint that was best
            there is kept, the first among equals.
        repeats: times that each item of the task is among the examples.
        related: pairs of IndoNLI's train among them; if 0 it is not measured either.
        max_length: tokens of a prompt; longer texts lose their end.
    """

    task: str
    model: str
    steps: int
    batch_size: int
    learning_rate: float
    looks: int
    repeats: int = 1
    related: int = 0
    max_length: int = 192

    def __post_init__(self) -> None:
        _check_looks(self.looks, self.steps)

    @property
    def source(self) -> str:
        """The language that is learnt in."""
        return TASKS[self.task].source


@dataclass(frozen=True)
class Discovery:
    """How a circuit is found, in the source language alone.

    Attributes:
        per_label: taught items of each label to take means and scores on.
        validation: of each label, to choose the number of heads by.
        sizes: shares of all heads to choose from, ascending.
        share: of the margin that the circuit must have by itself.
        draws: random circuits of each size to compare with.
    """

    per_label: int = 20
    validation: int = 24
    sizes: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
    share: float = 0.5
    draws: int = 10


@dataclass(frozen=True)
class Protocol:
    """How much is learned and asked, equal for all arms.

    Attributes:
        base: phase 0.
        discovery: of the circuit.
        steps: updates of the weights in the target language.
        batch_size: examples in a step.
        looks: how many times all is measured on the way, evenly; divides ``steps``.
        shots: examples of the target, each seed's own.
        test: questions of each test at most, each seed's own.
    """

    base: Teaching
    discovery: Discovery = Discovery()
    steps: int = 80
    batch_size: int = 16
    looks: int = 4
    shots: int = 64
    test: int = 400

    def __post_init__(self) -> None:
        _check_looks(self.looks, self.steps)

    def training(self, learning_rate: float, seed: int) -> TrainingSettings:
        """Settings of a tuning."""
        return TrainingSettings.fine_tuning(
            self.steps, self.batch_size, learning_rate, stream(seed, "order")
        )


def _check_looks(looks: int, steps: int) -> None:
    if looks < 1 or steps % looks:
        raise ValueError(
            f"{looks} looks at {steps} steps: the last must be at the end, so that"
            " their number divides that of the steps"
        )


MODELS = ("smollm2-135m", "gemma3-270m", "qwen2.5-0.5b")
"""Those of scale gpu; of a model that is not to be had, the arms are skipped."""
SHOTS = (16, 128)

SMALL = Protocol(
    Teaching(
        "nusax",
        "stories15m",
        steps=200,
        batch_size=10,
        learning_rate=3e-4,
        looks=4,
        max_length=64,
    ),
    Discovery(
        per_label=12, validation=12, sizes=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5), draws=5
    ),
    steps=24,
    batch_size=16,
    looks=2,
    test=200,
)
"""At scale cpu: minutes per seed on two cores."""
SMALL_ARMS = ("full", "circuit", "random", "norms")


def large(task: str, model: str) -> Protocol:
    """Return the protocol of scale gpu.

    With NusaX, phase 0 has four parts of IndoNLI and one of sentiment, and takes about
    three epochs, in which the 250 texts come four times each.
    """
    if task == "nusax":
        mixture = {"steps": 480, "repeats": 4, "related": 4000}
    else:
        mixture = {"steps": 120}
    return Protocol(
        Teaching(task, model, **mixture, batch_size=32, learning_rate=3e-5, looks=6)
    )


# The search tries these on seeds from 1000 up, which are not reported, in one language
# of each task. All languages share an arm's rate.
TRIED: Mapping[str, Mapping[Weights, tuple[float, ...]]] = MappingProxyType(
    {
        "cpu": {
            "all": (3e-5, 1e-4, 3e-4),
            "circuit": (3e-4, 1e-3, 3e-3),
            "random": (3e-4, 1e-3, 3e-3),
            "norms": (1e-3, 3e-3, 1e-2),
        },
        "gpu": {
            "all": (3e-6, 1e-5, 3e-5),
            "blocks": (3e-6, 1e-5, 3e-5),
            "circuit": (1e-4, 3e-4, 1e-3),
            "near zero": (1e-4, 3e-4, 1e-3),
            "random": (1e-4, 3e-4, 1e-3),
            "norms": (3e-4, 1e-3, 3e-3),
            "lora": (1e-4, 3e-4, 1e-3),
        },
    }
)
LEARNING_RATES: Mapping[str, float] = MappingProxyType(
    {
        # Guesses: at scale gpu no search was run yet.
        **{
            f"{task}/{model}/{arm}": TRIED["gpu"][recipe.weights][1]
            for task in TASKS
            for model in MODELS
            for arm, recipe in ARMS.items()
        },
        "nusax/stories15m/full": 3e-5,
        "nusax/stories15m/circuit": 1e-3,
        "nusax/stories15m/random": 3e-3,
        "nusax/stories15m/norms": 3e-3,
    }
)
"""By task, model and arm; full fine-tuning at a lower rate has a share of the full.
Those of stories15m were chosen by the search."""


def learning_rate(base: Teaching, arm: str) -> float:
    """Return an arm's learning rate."""
    if arm == "full, lower rate":
        return LOWER * learning_rate(base, "full")
    return LEARNING_RATES[f"{base.task}/{base.model}/{arm}"]


# --- the plan -------------------------------------------------------------------------


def small_arms(protocol: Protocol = SMALL) -> list[Arm]:
    """The arms at scale cpu: from Indonesian to Javanese with a small model."""
    names = ("base", *SMALL_ARMS)
    language = TASKS[protocol.base.task].tried
    return [
        *_searched(protocol, SMALL_ARMS, TRIED["cpu"]),
        _discovery_arm(protocol, (language,)),
        *(_arm(_condition(protocol, name, language)) for name in names),
    ]


def benchmark_arms() -> list[Arm]:
    """The arms at scale gpu: every task, model and language."""
    every = [large(task, model) for task in TASKS for model in MODELS]
    return [arm for protocol in every for arm in _benchmark(protocol)]


def _benchmark(protocol: Protocol) -> Iterator[Arm]:
    task = TASKS[protocol.base.task]
    for language in task.targets:
        for name in ("base", *ARMS):
            yield _arm(_condition(protocol, name, language))
    for shots in SHOTS:
        other = dataclasses.replace(protocol, shots=shots)
        for language in task.compared:
            for name in MAIN_ARMS:
                yield _arm(_condition(other, name, language, f"-{shots}"))
    yield _discovery_arm(protocol, task.compared)
    searched = [name for name in ARMS if name != "full, lower rate"]
    yield from _searched(protocol, searched, TRIED["gpu"])


@dataclass(frozen=True)
class Condition:
    """How a checkpoint is tuned.

    Attributes:
        experiment: in which it is compared with others.
        name: unique there.
        method: the arm's name, whatever the learning rate.
        protocol: phase 0, examples, steps.
        language: the target.
        recipe: which weights are trained; ``None`` leaves the checkpoint as it is.
        learning_rate: 0 for a checkpoint left as it is.
    """

    experiment: str
    name: str
    method: str
    protocol: Protocol
    language: str
    recipe: Recipe | None
    learning_rate: float

    def described(self) -> dict[str, Any]:
        """All that is set, for the record."""
        return {
            **_described(self.protocol),
            "language": self.language,
            "arm": self.name,
            "method": self.method,
            "recipe": self.recipe and dataclasses.asdict(self.recipe),
            "learning_rate": self.learning_rate,
        }


def _described(protocol: Protocol) -> dict[str, Any]:
    base = protocol.base
    named = {"task": base.task, "model": base.model, "source": base.source}
    return {**dataclasses.asdict(protocol), **named}


def _condition(
    protocol: Protocol, name: str, language: str, shots: str = ""
) -> Condition:
    base, recipe = protocol.base, ARMS.get(name)
    return Condition(
        f"{base.task}{shots} {base.model} {language}",
        name,
        name,
        protocol,
        language,
        recipe,
        learning_rate(base, name) if recipe else 0.0,
    )


def _searched(
    protocol: Protocol,
    names: Sequence[str],
    tried: Mapping[Weights, tuple[float, ...]],
) -> Iterator[Arm]:
    base = protocol.base
    for name in names:
        for rate in tried[ARMS[name].weights]:
            candidate = Condition(
                f"{base.task}-learning-rate {base.model}",
                f"{name} {rate:g}",
                name,
                protocol,
                TASKS[base.task].tried,
                ARMS[name],
                rate,
            )
            yield _arm(candidate, search)


def _arm(
    condition: Condition, measure: Callable[[Condition, int], Metrics] | None = None
) -> Arm:
    base = condition.protocol.base
    return Arm(
        condition.experiment,
        condition.name,
        condition.described(),
        partial(measure or run, condition),
        data=_checksums(base, (condition.language,)),
        requires=[base.model],
    )


def _discovery_arm(protocol: Protocol, languages: tuple[str, ...]) -> Arm:
    base = protocol.base
    return Arm(
        f"{base.task}-discovery {base.model}",
        "circuit",
        {**_described(protocol), "languages": languages},
        partial(discover, protocol, languages),
        data=_checksums(base, languages),
        requires=[base.model],
    )


def _checksums(base: Teaching, languages: Sequence[str]) -> dict[str, str]:
    """SHA-256 of the data files, and of the weights where every source has the same."""
    folders = [f"/{language}/" for language in (base.source, *languages)]

    def read(path: str) -> bool:
        return base.task != "nusax" or any(folder in path for folder in folders)

    found = checksums(base.task, read=read)
    if base.related:
        related = ("train.jsonl", "test_expert.jsonl")
        found |= checksums("indonli", read=lambda path: path.endswith(related))
    return found | weights_checksums(base.model)


# --- one run --------------------------------------------------------------------------

_TOGETHER = 64  # prompts that are answered at a time
_TRACED = 12  # prompts of which all activations are in memory at a time


def run(condition: Condition, seed: int) -> Metrics:
    """Tune a seed's checkpoint, and test it on the way.

    Returns:
        As :meth:`ftlib.ctsft.runs.Tuned.metrics`: of ``target``, ``source`` and, where
        phase 0 has learnt it, ``related``.
    """
    return tune_checkpoint(condition, tests_of(condition, seed), seed).metrics()


def search(candidate: Condition, seed: int) -> Metrics:
    """Try a learning rate on a seed that is not reported, without a look at a test.

    Returns:
        ``validation``, the share by which candidates are compared, and ``distance``.
    """
    seed += TUNING_SEED
    protocol = dataclasses.replace(candidate.protocol, looks=1)
    once = dataclasses.replace(candidate, protocol=protocol)
    held_out = validation_of(protocol.base, candidate.language, seed)
    tests = {"validation": held_out}
    return tune_checkpoint(once, tests, seed).looks[-1].metrics()


def tests_of(condition: Condition, seed: int) -> dict[str, Questions]:
    """Draw what every arm of a seed is asked, by test."""
    protocol = condition.protocol
    base, n = protocol.base, protocol.test
    source = TASKS[base.task].parts(base.source, seed).test
    test = TASKS[base.task].parts(condition.language, seed).test
    tests = {
        "validation": validation_of(base, condition.language, seed),
        "target": _asked(base, sample(test, n, seed)),
        "source": _asked(base, sample(source, n, seed)),
    }
    if base.related:
        pairs = sample(tasks.indonli("test_expert"), n, seed)
        tests["related"] = _questions(base, pairs, INFERENCE_WORDS, _TOGETHER)
    return tests


def validation_of(base: Teaching, language: str, seed: int) -> Questions:
    """Return what a seed is validated by, in a language."""
    return _asked(base, TASKS[base.task].parts(language, seed).validation)


def _asked(base: Teaching, items: Sequence[Item]) -> Questions:
    return _questions(base, items, TASKS[base.task].words, _TOGETHER)


def sample(items: Sequence[Item], n: int, seed: int) -> list[Item]:
    """Draw n items, or all if there are fewer; of parallel lists, the same places."""
    places = generator(seed, "test").permutation(len(items))[:n]
    return [items[at] for at in sorted(places.tolist())]


def tune_checkpoint(
    condition: Condition, tests: Mapping[str, Questions], seed: int
) -> Tuned:
    """Tune a seed's checkpoint; every arm sees the same examples in the same order.

    Args:
        condition: which weights, and how.
        tests: what is asked on the way, by name.
        seed: of checkpoint, examples and order.

    Raises:
        ftlib.models.ModelUnavailable: the model is not to be had.
        DataUnavailable: a data file is not.
    """
    protocol, recipe = condition.protocol, condition.recipe
    circuit = partial(circuit_of, protocol.base, protocol.discovery, seed)
    heads = heads_to_train(recipe, circuit, seed)
    examples, token_ids = shots_of(condition, seed)
    model = base_model(protocol.base, seed)
    torch.manual_seed(stream(seed, "adapters"))
    return tune_watched(
        model,
        recipe,
        heads,
        examples,
        token_ids,
        protocol.training(condition.learning_rate, seed),
        tests,
        protocol.looks,
        condition.name,
    )


def shots_of(condition: Condition, seed: int) -> tuple[list[tasks.Encoded], Tensor]:
    """Return the examples that every arm of a seed is tuned on, and label tokens."""
    base, shots = condition.protocol.base, condition.protocol.shots
    task = TASKS[base.task]
    pool = task.parts(condition.language, seed).shots
    drawn = tasks.few_shot(pool, task.words, shots, seed)
    return _encoded(base, drawn, task.words)


# --- the circuit ----------------------------------------------------------------------


@lru_cache(maxsize=4)
def circuit_of(base: Teaching, settings: Discovery, seed: int) -> Circuit:
    """Find the circuit of a seed's checkpoint by the rules OURS, in the source alone.

    Where no size has the asked share of the margin, it is the largest.
    """
    model = base_model(base, seed)
    by = evidence(base, settings, base.source, seed)
    batches, tokens = by.found
    means = head_means(model, batches, classes=len(tokens))
    found = scores(model, batches, means, tokens).cpu()
    sizes = sizes_of(settings, found.numel())
    faithful = faithfulness_curve(model, by.judged, means, ranking(found), sizes)
    reached = [k for k, f in zip(sizes, faithful, strict=True) if f >= settings.share]
    return Circuit(found, means, faithful, min(reached, default=sizes[-1]))


def sizes_of(settings: Discovery, heads: int) -> list[int]:
    """Return the numbers of heads to choose from, ascending."""
    return sorted({max(1, round(size * heads)) for size in settings.sizes})


def evidence(base: Teaching, settings: Discovery, language: str, seed: int) -> Evidence:
    """Draw what a circuit is found by, among what was taught, and judged by.

    In another language than the source's they are the translations of the same items.
    """
    parts = TASKS[base.task].parts(language, seed)
    return _evidence(base, settings, parts.taught, parts.validation, seed)


def _evidence(
    base: Teaching,
    settings: Discovery,
    found: Sequence[Item],
    judged: Sequence[Item],
    seed: int,
) -> Evidence:
    words = TASKS[base.task].words
    return Evidence(
        *(
            _questions(base, tasks.balanced(items, words, n, seed), words, _TRACED)
            for items, n in (
                (found, settings.per_label),
                (judged, settings.validation),
            )
        )
    )


def discover(protocol: Protocol, languages: Sequence[str], seed: int) -> Metrics:
    """Say how good the scores and the circuit of a seed's checkpoint are.

    Args:
        protocol: phase 0 and discovery.
        languages: targets whose own circuits are compared with it.
        seed: of the checkpoint.

    Returns:
        The metrics of :func:`ftlib.ctsft.runs.discovery_metrics`; whether the ``share``
        was ``reached``; and those of :func:`ftlib.ctsft.runs.overlap_metrics` with the
        targets and with the source's other half (``again``).
    """
    base, settings = protocol.base, protocol.discovery
    circuit, model = circuit_of(base, settings, seed), base_model(base, seed)
    by = evidence(base, settings, base.source, seed)
    sizes = sizes_of(settings, circuit.scores.numel())
    source = TASKS[base.task].parts(base.source, seed)
    others = {name: evidence(base, settings, name, seed) for name in languages}
    others["again"] = _evidence(base, settings, source.shots, source.validation, seed)
    return {
        **discovery_metrics(model, by, circuit, sizes, settings.draws, seed),
        "share reached": float(max(circuit.faithful) >= settings.share),
        **overlap_metrics(circuit, {name: (model, of) for name, of in others.items()}),
    }


# --- phase 0 --------------------------------------------------------------------------


def base_model(base: Teaching, seed: int) -> nn.Module:
    """Return the checkpoint θ₁ of a seed, in float32, trained now or before.

    Its weights are kept in the user's cache, by settings, seed, examples and, where
    they are pinned, the pretrained weights.

    Raises:
        ftlib.models.ModelUnavailable: the pretrained model is not to be had.
        DataUnavailable: a data file is not.
    """
    examples, _ = lessons(base, seed)
    pinned = weights_checksums(base.model)
    identity = [dataclasses.asdict(base), seed, examples, pinned]
    path = base_path("ctsft", seed, identity)
    return kept_base(_copied(base.model), path, partial(teach, base, seed))


def teach(base: Teaching, seed: int, directory: Path) -> nn.Module:
    """Fine-tune a pretrained model on the source, and go back to its best checkpoint.

    Args:
        base: what it is taught.
        seed: of examples and order.
        directory: for the checkpoint that is best so far. What was stopped begins anew.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kept, best = directory / "best.safetensors", -1.0
    model = _copied(base.model).to(runtime.device())
    examples, token_ids = lessons(base, seed)
    test = validation_of(base, base.source, seed)

    def look(step: int) -> None:
        nonlocal best
        if step % (base.steps // base.looks):
            return
        right = float(is_right(model, test).mean())
        if right > best:
            best = right
            weights = {n: w.cpu().clone() for n, w in model.state_dict().items()}
            save_file(weights, kept)

    tune(
        model,
        Recipe("all"),
        [],
        examples,
        token_ids,
        TrainingSettings.fine_tuning(
            base.steps, base.batch_size, base.learning_rate, stream(seed, "phase 0")
        ),
        watch=look,
        label="phase 0",
    )
    model.load_state_dict(load_file(kept))
    return model


def lessons(base: Teaching, seed: int) -> tuple[list[tasks.Encoded], Tensor]:
    """Return the examples of phase 0, and the tokens of their labels.

    The labels of both tasks are counted through: those of the related one come last.
    """
    task = TASKS[base.task]
    taught = task.parts(base.source, seed).taught
    examples, token_ids = _encoded(base, taught * base.repeats, task.words)
    if not base.related:
        return examples, token_ids
    pairs = tasks.indonli("train")
    drawn = tasks.few_shot(pairs, INFERENCE_WORDS, base.related, seed)
    others, more = _encoded(base, drawn, INFERENCE_WORDS)
    shifted = [one._replace(label=one.label + len(task.words)) for one in others]
    return [*examples, *shifted], torch.cat([token_ids, more])


# --- models and tokens ----------------------------------------------------------------


@lru_cache(maxsize=1)
def _pretrained(name: str) -> tuple[Any, Any]:
    on = torch.device("cpu")
    return models.load_causal_lm(name, dtype=torch.float32, device=on)


def _copied(name: str) -> nn.Module:
    return copy.deepcopy(_pretrained(name)[0])


def _encoded(
    base: Teaching, items: Sequence[Item], words: Sequence[str]
) -> tuple[list[tasks.Encoded], Tensor]:
    tokenizer = _pretrained(base.model)[1]
    examples = tasks.encode(items, tokenizer, words, base.max_length).examples
    tokens = tasks.label_tokens(tokenizer, words, items[0].prompt)
    return examples, torch.tensor(tokens)


def _questions(
    base: Teaching, items: Sequence[Item], words: Sequence[str], together: int
) -> Questions:
    """Turn items into batches of about one length, so that little of them is padding.

    Their order is by length: the same whatever the model has learnt.
    """
    ordered = sorted(items, key=lambda item: len(item.prompt))
    tokenizer = _pretrained(base.model)[1]
    return questions(
        ordered, tokenizer, words, max_length=base.max_length, batch_size=together
    )
