"""The CT-SFT experiments: arms × seeds → records.

A small Llama is trained once per seed on texts of two languages and, in the proxy
language only, on how the narrator feels and what he speaks of
(:mod:`ftlib.ctsft.languages`): that is θ₁. Its circuit of the first question is found
on the proxy alone. Every arm then goes on from θ₁ with the same few examples of the
target language, with the same steps and batches, and differs in which weights it
trains. Measured on the way and at the end are the accuracy in the target, what is kept
of the proxy (``source``) and of the other question in the proxy (``related``), and
‖Δθ‖.

The paper claims that the circuit is what should be trained: that its heads and the
norms adapt a model about as well as all its weights, or better, and with the least
forgetting; and that there are such circuits, which the published rules find in natural
text. That is tested. What was expected, before any arm was run:

* Norms alone are close to circuit and norms, within three points in the target, and as
  good at keeping the source: most of what the arms of heads do is done by the norms.
* Random heads with norms, and those near zero, are within three points of the circuit
  in the target.
* Full fine-tuning is best in the target, and worst at keeping source and related task
  after as many steps. At a lower rate, stopped early or drawn back to its start it
  keeps more.
* At equal ‖Δθ‖ the arms differ less in what they keep than at equal steps.
* The scores of OURS correlate better with real single-head ablation than those of
  PUBLISHED, on the trained model as on the untrained of earlier work.
* The circuit is more faithful than random ones of its size, by far.
* The target's own circuit overlaps with the proxy's more than by chance: the languages
  differ in words, not in how the narrator is found.
* With 16 examples all arms lose accuracy, and full fine-tuning the most; with 128 it
  is the best.
* Without the embeddings, where the words of the target would be learnt, full
  fine-tuning is no better in the target than the circuit. Where the checkpoint knows
  the words better, the arms differ less (``easier``); v1 of the paper says that the
  heads near zero are then often better than the circuit.

* At lower rates all arms keep more. At equal accuracy in the target, the circuit keeps
  no more of source and related task than random heads, or than all weights at a lower
  rate.

Trial runs with seeds from 1000 up, whose checkpoints and texts are not those of the
records, came between these expectations and the records; the languages' sizes, the
steps and the learning rates were chosen in them.

The experiments: ``transfer`` (all arms, 128 examples), ``easier`` (a checkpoint that
has read more of the target), ``shots`` (the main arms with 16, 32 and 64), ``rates``
(lower learning rates), ``tensors`` (which tensors of the circuit's heads are trained),
``discovery`` (scores, real ablation, faithfulness, overlap), and ``learning-rate`` (how
each arm's was chosen). Early stopping is no arm: of every arm the checkpoint that was
best on validation is measured too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from ftlib import runtime
from ftlib.bases import base_path, kept_base
from ftlib.ctsft import languages, tasks
from ftlib.ctsft.benchmarks import benchmark_arms, small_arms
from ftlib.ctsft.discovery import (
    Circuit,
    Evidence,
    find_circuit,
)
from ftlib.ctsft.evaluation import Questions, questions
from ftlib.ctsft.languages import (
    LABELS,
    PROXY,
    THINGS,
    Language,
    Lesson,
    Story,
    Vocabulary,
)
from ftlib.ctsft.runs import (
    Metrics,
    Tuned,
    discovery_metrics,
    heads_to_train,
    overlap_metrics,
    tune_watched,
)
from ftlib.ctsft.settings import (
    ARMS,
    FRONTIER_ARMS,
    LOWER,
    MAIN_ARMS,
    RATE_SHARES,
    SHOTS,
    TENSORS,
    TRANSFER,
    TUNING_SEED,
    BaseSettings,
    DiscoverySettings,
    TransferSettings,
    candidates,
    learning_rate,
)
from ftlib.ctsft.tuning import Recipe
from ftlib.experiments import Arm
from ftlib.runtime import Scale
from ftlib.sequences import IGNORED
from ftlib.splits import Split
from ftlib.streams import stream
from ftlib.training import train

VOCABULARY = Vocabulary()
LONGEST = 64  # tokens; a lesson of three people takes at most 26
_LABEL_TOKENS = [VOCABULARY.encode(label)[0] for label in LABELS]
_POOL = 300  # stories; a fixed number, so that 128 examples contain the 16


def plan(scale: Scale) -> list[Arm]:
    """Return the arms of the method; at gpu those on real text alone."""
    if scale == "cpu":
        return [*transfer_arms(), *small_arms()]
    return benchmark_arms()


def transfer_arms(settings: TransferSettings = TRANSFER) -> list[Arm]:
    """All arms on the synthetic languages; those of the search first."""
    return [
        *(_tuning_arm(c) for c in searched(settings)),
        Arm(
            "discovery",
            "circuit",
            dataclasses.asdict(settings),
            partial(discover, settings),
        ),
        *(_arm(c) for c in conditions(settings)),
    ]


@dataclass(frozen=True)
class Condition:
    """How a checkpoint is tuned.

    Attributes:
        experiment: in which it is compared with others.
        name: unique there.
        method: the arm's name whatever the number of examples.
        recipe: which weights are trained; ``None`` leaves the checkpoint as it is.
        settings: examples, steps, batch, base.
        learning_rate: 0 for a checkpoint left as it is.
    """

    experiment: str
    name: str
    method: str
    recipe: Recipe | None
    settings: TransferSettings
    learning_rate: float

    def described(self) -> dict[str, Any]:
        """All that is set, for the record."""
        return {
            **dataclasses.asdict(self.settings),
            "arm": self.name,
            "method": self.method,
            "recipe": dataclasses.asdict(self.recipe) if self.recipe else None,
            "learning_rate": self.learning_rate,
        }


def conditions(settings: TransferSettings = TRANSFER) -> list[Condition]:
    """Every way to tune a checkpoint that is compared with others."""
    table: Mapping[str, Recipe | None] = {"base": None, **ARMS}
    return [
        *(
            Condition(
                experiment,
                name,
                name,
                recipe,
                its_settings,
                learning_rate(name) if recipe else 0.0,
            )
            for experiment, its_settings in (
                ("transfer", settings),
                ("easier", settings.easier()),
            )
            for name, recipe in table.items()
        ),
        *(
            Condition(
                "shots",
                f"{name} {shots}",
                name,
                ARMS[name],
                dataclasses.replace(settings, shots=shots),
                learning_rate(name),
            )
            for shots in SHOTS
            for name in MAIN_ARMS
        ),
        *(
            Condition(
                "rates",
                f"{name} × {share:g}",
                name,
                ARMS[name],
                settings,
                share * learning_rate(name),
            )
            for name in FRONTIER_ARMS
            for share in RATE_SHARES
            if (name, share) != ("full", LOWER)  # an arm already
        ),
        *(
            Condition("tensors", name, name, recipe, settings, learning_rate(name))
            for name, recipe in TENSORS.items()
        ),
    ]


def searched(settings: TransferSettings = TRANSFER) -> list[Condition]:
    """Every recipe and learning rate that an arm's is chosen from."""
    return [
        Condition(
            "learning-rate",
            f"{name} {recipe.l2:g}, {rate:g}" if recipe.l2 else f"{name} {rate:g}",
            name,
            recipe,
            settings,
            rate,
        )
        for name in ARMS
        if name != "full, lower rate"
        for recipe, rate in candidates(name)
    ]


def _arm(condition: Condition) -> Arm:
    return Arm(
        condition.experiment,
        condition.name,
        condition.described(),
        partial(run, condition),
    )


def _tuning_arm(candidate: Condition) -> Arm:
    return Arm(
        candidate.experiment,
        candidate.name,
        candidate.described(),
        partial(search, candidate),
    )


# -- one run ---------------------------------------------------------------------------


def run(condition: Condition, seed: int) -> Metrics:
    """Tune a seed's checkpoint, and test it on the way.

    Returns:
        As :meth:`ftlib.ctsft.runs.Tuned.metrics`: of ``target``, ``source`` and
        ``related``.
    """
    settings = condition.settings
    tests = {name: questions_of(settings, name, seed) for name in get_args(Test)}
    return tune_checkpoint(condition, tests, seed).metrics()


def search(candidate: Condition, seed: int) -> Metrics:
    """Try a recipe on a seed that is not reported, without a look at a test.

    Returns:
        ``validation``, the share by which candidates are compared, and ``distance``.
    """
    seed += TUNING_SEED
    settings = dataclasses.replace(candidate.settings, looks=1)
    tests = {"validation": questions_of(settings, "validation", seed)}
    once = dataclasses.replace(candidate, settings=settings)
    return tune_checkpoint(once, tests, seed).looks[-1].metrics()


def tune_checkpoint(
    condition: Condition, tests: Mapping[str, Questions], seed: int
) -> Tuned:
    """Tune a seed's checkpoint; every arm sees the same examples in the same order.

    Args:
        condition: which weights, and how.
        tests: what is asked on the way, by name.
        seed: of checkpoint, examples and order.
    """
    settings, recipe = condition.settings, condition.recipe
    circuit = partial(circuit_of, settings.base, settings.discovery, seed)
    heads = heads_to_train(recipe, circuit, seed)
    model = base_model(settings.base, seed)
    torch.manual_seed(stream(seed, "adapters"))
    return tune_watched(
        model,
        recipe,
        heads,
        few_shots(settings, seed),
        torch.tensor(_LABEL_TOKENS),
        settings.training(condition.learning_rate, stream(seed, "order")),
        tests,
        settings.looks,
        condition.name,
    )


# -- the circuit -----------------------------------------------------------------------


def evidence(
    base: BaseSettings, drawn: DiscoverySettings, language: Language, seed: int
) -> Evidence:
    """Draw what a seed's circuit is found and judged by, in a language."""
    ask = partial(languages.sentiment, language=language)
    return _balanced_evidence(ask, LABELS, 6, base, drawn, seed)


def related_evidence(
    base: BaseSettings, drawn: DiscoverySettings, seed: int
) -> Evidence:
    """Draw the same for the other question, in the proxy."""
    return _balanced_evidence(languages.topics, THINGS, 60, base, drawn, seed)


def _balanced_evidence(
    ask: Callable[[list[Story]], list[tasks.Item]],
    words: Sequence[str],
    stories_per_example: int,
    base: BaseSettings,
    drawn: DiscoverySettings,
    seed: int,
) -> Evidence:
    """Ask about so many stories that no label is short of examples."""

    def balanced(split: Split, per_label: int) -> Questions:
        n = stories_per_example * per_label
        items = ask(_stories(n, split, seed, base, "discovery"))
        return _questions(tasks.balanced(items, words, per_label, seed), words)

    return Evidence(
        balanced("train", drawn.per_label), balanced("validation", drawn.validation)
    )


@functools.lru_cache(maxsize=4)
def circuit_of(base: BaseSettings, settings: DiscoverySettings, seed: int) -> Circuit:
    """Find the circuit of a seed's checkpoint by the rules OURS, on the proxy alone."""
    model, by = base_model(base, seed), evidence(base, settings, PROXY, seed)
    return find_circuit(model, by, settings.sizes, settings.share)


def discover(settings: TransferSettings, seed: int) -> Metrics:
    """Say how good the scores and the circuit of a seed's checkpoint are.

    Returns:
        The metrics of :func:`ftlib.ctsft.runs.discovery_metrics`, and those of
        :func:`ftlib.ctsft.runs.overlap_metrics` with texts of the target: in the
        checkpoint (``target``), whose margin may be small there, and in the checkpoint
        after full fine-tuning (``tuned``); and with the other question in the proxy
        (``related``).
    """
    base, drawn = settings.base, settings.discovery
    model, circuit = base_model(base, seed), circuit_of(base, drawn, seed)
    by = evidence(base, drawn, PROXY, seed)
    foreign = evidence(base, drawn, base.target, seed)
    full = next(c for c in conditions(settings) if c.name == "full")
    adapted = tune_checkpoint(full, {}, seed).model
    others = {
        "target": (model, foreign),
        "tuned": (adapted, foreign),
        "related": (model, related_evidence(base, drawn, seed)),
    }
    return {
        **discovery_metrics(model, by, circuit, drawn.sizes, drawn.draws, seed),
        **overlap_metrics(circuit, others),
    }


# -- the base --------------------------------------------------------------------------


def base_model(base: BaseSettings, seed: int) -> LlamaForCausalLM:
    """Return the checkpoint θ₁ of a seed, trained now or before.

    Its weights are kept in the user's cache, by settings, seed and the texts it is
    trained on.
    """
    identity = [dataclasses.asdict(base), seed, corpus(_few(base), seed)]
    path = base_path("ctsft", seed, identity)
    return kept_base(new_model(base), path, partial(_pretrain, base, seed))


def _few(base: BaseSettings) -> BaseSettings:
    fewer = {
        name: min(getattr(base, name), 16) for name in ("asked", "plain", "foreign")
    }
    return dataclasses.replace(base, **fewer)


def new_model(base: BaseSettings) -> LlamaForCausalLM:
    """Return a Llama with random weights.

    They are drawn larger than transformers does, whose scale is for wide models: here
    it would take far longer until heads attend to anything.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=base.width,
            intermediate_size=base.feed_forward,
            num_hidden_layers=base.layers,
            num_attention_heads=base.heads,
            max_position_embeddings=LONGEST,
            initializer_range=base.width**-0.5,
            tie_word_embeddings=True,
            pad_token_id=VOCABULARY.pad,
            bos_token_id=None,
            eos_token_id=VOCABULARY.end,
        )
    )


def _pretrain(base: BaseSettings, seed: int, directory: Path) -> nn.Module:
    """Train a checkpoint, going on where an interrupted process stopped."""
    torch.manual_seed(seed)
    model = new_model(base).to(runtime.device())
    train(
        model,
        [encoded(lesson) for lesson in corpus(base, seed)],
        training_loss,
        dataclasses.replace(base.training, seed=seed),
        collate=collate,
        directory=directory,
        label="phase 0",
    )
    return model


def training_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the words to learn, in nats."""
    loss: Tensor = model(**batch).loss
    return loss


class EncodedLesson(NamedTuple):
    """A lesson as token ids, and what is to be learnt of it.

    Attributes:
        ids: of all.
        targets: the same, or ``IGNORED`` where nothing is to be learnt.
    """

    ids: list[int]
    targets: list[int]


def encoded(lesson: Lesson) -> EncodedLesson:
    """Turn a lesson into token ids; a full stop ends each turn."""
    ids = VOCABULARY.encode(lesson.text)
    targets = [IGNORED] * len(ids)
    for given, answer in lesson.turns:
        for words, is_learnt in ((given, False), (answer, True), (".", False)):
            new = VOCABULARY.encode(words)
            ids += new
            targets += new if is_learnt else [IGNORED] * len(new)
    return EncodedLesson(ids, targets)


def collate(batch: Sequence[EncodedLesson]) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask`` and ``labels``, int64 (n, T)."""
    rows = [torch.tensor(lesson.ids) for lesson in batch]
    targets = [torch.tensor(lesson.targets) for lesson in batch]
    return {
        "input_ids": pad_sequence(rows, True, VOCABULARY.pad),
        "attention_mask": pad_sequence([torch.ones_like(r) for r in rows], True, 0),
        "labels": pad_sequence(targets, True, IGNORED),
    }


# -- examples --------------------------------------------------------------------------


def corpus(base: BaseSettings, seed: int) -> list[Lesson]:
    """Draw what the checkpoint of a seed is trained on."""

    def stories(n: int, purpose: str) -> list[Story]:
        return _stories(n, "pretrain", seed, base, purpose)

    looks = stream(seed, "looks")
    return [
        *languages.lessons(stories(base.asked, "asked")),
        *languages.plain(stories(base.plain, "plain"), looks),
        *languages.plain(stories(base.foreign, "foreign"), looks, base.target),
    ]


Test = Literal["validation", "target", "source", "related"]
"""What is asked of a tuned model: the target's validation; and three tests, the target,
the proxy, and the other question in the proxy."""


def questions_of(settings: TransferSettings, test: Test, seed: int) -> Questions:
    """Draw what every arm of a seed is asked."""
    base = settings.base
    if test == "validation":
        stories = _stories(settings.validation, "validation", seed, base, test)
        return _questions(languages.sentiment(stories, base.target), LABELS)
    stories = _stories(settings.test, "test", seed, base, test)
    if test == "related":
        return _questions(languages.topics(stories), THINGS)
    language = base.target if test == "target" else PROXY
    return _questions(languages.sentiment(stories, language), LABELS)


def few_shots(settings: TransferSettings, seed: int) -> list[tasks.Encoded]:
    """Draw the examples of the target that every arm of a seed is tuned on."""
    base = settings.base
    pool = _stories(_POOL, "train", seed, base, "shots")
    items = tasks.few_shot(
        languages.sentiment(pool, base.target), LABELS, settings.shots, seed
    )
    return tasks.encode(items, VOCABULARY, LABELS, LONGEST).examples


def _stories(
    n: int, split: Split, seed: int, base: BaseSettings, purpose: str
) -> list[Story]:
    """Draw stories of a split, others for each purpose."""
    return languages.sample(n, split, stream(seed, purpose), base.world)


def _questions(items: Sequence[tasks.Item], words: Sequence[str]) -> Questions:
    return questions(items, VOCABULARY, words, max_length=LONGEST)
