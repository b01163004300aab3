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

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from ftlib import runtime
from ftlib.bases import base_path, kept_base
from ftlib.ctsft import languages, tasks
from ftlib.ctsft.ablation import ablation_effects, faithfulness
from ftlib.ctsft.decomposition import PUBLISHED, head_means, scores
from ftlib.ctsft.discovery import (
    Circuit,
    Evidence,
    correlation,
    faithfulness_curve,
    find_circuit,
    jaccard,
    near_zero,
    random_curves,
    random_heads,
    rank_correlation,
    ranking,
    top_k,
)
from ftlib.ctsft.evaluation import Questions, is_right, questions
from ftlib.ctsft.heads import Head
from ftlib.ctsft.languages import (
    LABELS,
    PROXY,
    THINGS,
    Language,
    Lesson,
    Story,
    Vocabulary,
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
from ftlib.ctsft.tuning import Recipe, distance, tune, weights_of
from ftlib.experiments import Arm
from ftlib.outcomes import Booleans, outcome_metrics
from ftlib.results import PACKED_PREFIX, Metric
from ftlib.runtime import Scale
from ftlib.sequences import IGNORED
from ftlib.splits import Split
from ftlib.streams import stream
from ftlib.training import train

Metrics = Mapping[str, Metric | float]

VOCABULARY = Vocabulary()
LONGEST = 64  # tokens; a lesson of three people takes at most 26
_LABEL_TOKENS = [VOCABULARY.encode(label)[0] for label in LABELS]
_POOL = 300  # stories; a fixed number, so that 128 examples contain the 16


def plan(scale: Scale) -> list[Arm]:
    """Return the arms of the method; there are none at gpu yet."""
    return transfer_arms() if scale == "cpu" else []


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


class Look(NamedTuple):
    """What was measured after some steps.

    Attributes:
        step: how many.
        right: whether each question was answered rightly, by test.
        distance: ‖Δθ‖.
    """

    step: int
    right: Mapping[str, Booleans]
    distance: float

    def accuracy(self, test: str) -> Metric:
        """The share of a test's questions that were answered rightly."""
        return Metric(float(self.right[test].mean()), len(self.right[test]))

    def metrics(self) -> dict[str, Metric | float]:
        """All accuracies, and the distance."""
        accuracies = {test: self.accuracy(test) for test in self.right}
        return {**accuracies, "distance": self.distance}


class Tuned(NamedTuple):
    """A tuned checkpoint.

    Attributes:
        model: the checkpoint, with adapters in it if there are any.
        trained: number of weights that were trained.
        heads: whose weights were among them; for LoRA those that set its budget.
        looks: what was measured on the way.
    """

    model: Any
    trained: int
    heads: list[Head]
    looks: list[Look]


def run(condition: Condition, seed: int) -> Metrics:
    """Tune a seed's checkpoint, and test it on the way.

    Returns:
        Accuracies ``target``, ``source``, ``related`` and ``validation`` of the last
        checkpoint, with the outcome of each question of a test, and ``distance``; the
        same with ``best`` of the one that was best on the target's validation, the
        first among equals; curves of all; and how many weights and heads were trained.
    """
    settings = condition.settings
    tests = {name: questions_of(settings, name, seed) for name in get_args(Test)}
    tuned = tune_checkpoint(condition, tests, seed)
    best = max(tuned.looks, key=lambda look: look.accuracy("validation").value)
    last = tuned.looks[-1]
    return {
        **last.metrics(),
        **{f"best {name}": value for name, value in best.metrics().items()},
        "best step": float(best.step),
        **{
            f"{PACKED_PREFIX}curve/{name}/{look.step}": value
            for look in tuned.looks
            for name, value in look.metrics().items()
        },
        **outcome_metrics("target", last.right["target"]),
        **outcome_metrics("source", last.right["source"]),
        **outcome_metrics("related", last.right["related"]),
        "trained": float(tuned.trained),
        "heads": float(len(tuned.heads)),
    }


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
    model = base_model(settings.base, seed)
    start, looks = weights_of(model), []

    def look(step: int) -> None:
        if step % (settings.steps // settings.looks) == 0:
            right = {name: is_right(model, test) for name, test in tests.items()}
            looks.append(Look(step, right, distance(model, start)))

    look(0)
    if recipe is None:
        return Tuned(model, 0, [], looks)
    heads = heads_of(recipe, settings, seed)
    torch.manual_seed(stream(seed, "adapters"))
    trained = tune(
        model,
        recipe,
        heads,
        few_shots(settings, seed),
        torch.tensor(_LABEL_TOKENS),
        settings.training(condition.learning_rate, stream(seed, "order")),
        watch=look,
        label=condition.name,
    )
    return Tuned(model, trained, heads, looks)


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


def heads_of(recipe: Recipe, settings: TransferSettings, seed: int) -> list[Head]:
    """Return the heads that a recipe trains, as many in every arm that trains heads.

    LoRA gets the circuit, which sets its budget.
    """
    if recipe.weights in ("all", "blocks", "norms"):
        return []
    circuit = circuit_of(settings.base, settings.discovery, seed)
    if recipe.weights == "near zero":
        return near_zero(circuit.scores, circuit.size)
    if recipe.weights == "random":
        return random_heads(circuit.scores, circuit.size, stream(seed, "random heads"))
    return circuit.heads


def discover(settings: TransferSettings, seed: int) -> Metrics:
    """Say how good the scores and the circuit of a seed's checkpoint are.

    Returns:
        Agreement of both rules' scores with real ablation, faithfulness, and overlap of
        the proxy's circuit with the target's own and with the other question's.
    """
    base, drawn = settings.base, settings.discovery
    model, circuit = base_model(base, seed), circuit_of(base, drawn, seed)
    by = evidence(base, drawn, PROXY, seed)
    batches, tokens = by.found
    effects = ablation_effects(model, batches, circuit.means, tokens)
    maps = {
        "ours": circuit.scores,
        "published": scores(model, batches, circuit.means, tokens, rules=PUBLISHED),
        "ablation": effects.view_as(circuit.scores),
    }
    return {
        "heads": float(circuit.size),
        **agreement_metrics(maps),
        **faithfulness_metrics(model, by.judged, circuit, maps, drawn, seed),
        **overlap_metrics(model, circuit, settings, seed),
    }


def agreement_metrics(maps: Mapping[str, Tensor]) -> Metrics:
    """Say how well scores tell what single heads do.

    Args:
        maps: scores ``ours`` and ``published``, and the effects of real ``ablation`` on
            the same examples, (layers, heads).

    Returns:
        For both rules ``correlation`` and ``rank correlation`` with the effects; and
        the maps.
    """
    effects = maps["ablation"]
    metrics = {}
    for name in ("ours", "published"):
        metrics[f"correlation {name}"] = correlation(maps[name], effects)
        metrics[f"rank correlation {name}"] = rank_correlation(maps[name], effects)
    return {**metrics, **_packed(maps)}


def faithfulness_metrics(
    model: Any,
    judged: Questions,
    circuit: Circuit,
    maps: Mapping[str, Tensor],
    settings: DiscoverySettings,
    seed: int,
) -> Metrics:
    """Say what circuits can do alone.

    Args:
        model: the checkpoint.
        judged: questions for validation.
        circuit: found in it.
        maps: scores, and the effects of ablation, by which heads can be ranked.
        settings: sizes of circuits, and how many random ones.
        seed: of these.

    Returns:
        For circuits of the chosen size: how ``faithful`` the best heads by each map
        are, and ``random`` ones on average, with the share of those that ours have
        ``beaten``; and curves over sizes.
    """
    sizes, means = settings.sizes, circuit.means
    curves = {
        name: faithfulness_curve(model, judged, means, ranking(values), sizes)
        for name, values in maps.items()
    }
    seeds = [stream(seed, f"circuit {n}") for n in range(settings.draws)]
    drawn = random_curves(model, judged, means, sizes, seeds)
    at = sizes.index(circuit.size)
    by_chance = np.array(drawn)[:, at]
    curves |= {f"random {n}": curve for n, curve in enumerate(drawn)}
    return {
        **{f"faithful {name}": curves[name][at] for name in maps},
        "faithful random": float(by_chance.mean()),
        "beaten": float((by_chance < curves["ours"][at]).mean()),
        **{
            f"{PACKED_PREFIX}faithful/{name}/{size}": value
            for name, curve in curves.items()
            for size, value in zip(sizes, curve, strict=True)
        },
    }


def overlap_metrics(
    model: Any, circuit: Circuit, settings: TransferSettings, seed: int
) -> Metrics:
    """Say whether other circuits are the proxy's.

    Args:
        model: the checkpoint.
        circuit: of the proxy.
        settings: of discovery and tuning.
        seed: of the checkpoint.

    Returns:
        ``jaccard`` and ``rank correlation`` of the proxy's circuit and scores with
        others, and how ``faithful`` the proxy's circuit is there; and the maps. The
        others are those of the target in the checkpoint (``target``), whose margin may
        be small, and in the checkpoint after full fine-tuning (``tuned``); and those of
        the other question in the proxy (``related``).
    """
    base, drawn = settings.base, settings.discovery
    full = next(c for c in conditions(settings) if c.name == "full")
    adapted = tune_checkpoint(full, {}, seed).model
    foreign = evidence(base, drawn, base.target, seed)
    others = {
        "target": (model, foreign),
        "tuned": (adapted, foreign),
        "related": (model, related_evidence(base, drawn, seed)),
    }
    metrics: dict[str, float] = {}
    maps: dict[str, Tensor] = {}
    for name, (one, by) in others.items():
        batches, tokens = by.found
        means = head_means(one, batches, classes=len(tokens))
        maps[name] = scores(one, batches, means, tokens)
        own = top_k(maps[name], circuit.size)
        metrics |= {
            f"jaccard {name}": jaccard(circuit.heads, own),
            f"rank correlation {name}": rank_correlation(circuit.scores, maps[name]),
            f"faithful {name}": faithfulness(
                one, circuit.heads, by.judged.batches, means, tokens
            ),
        }
    return {**metrics, **_packed(maps)}


def _packed(maps: Mapping[str, Tensor]) -> dict[str, float]:
    """Put maps into numbers of a record, by layer and head."""
    return {
        f"{PACKED_PREFIX}map/{name}/{layer}/{index}": value
        for name, values in maps.items()
        for layer, row in enumerate(values.tolist())
        for index, value in enumerate(row)
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
