"""What a fine-tuned model decides, how sure it is, and whether it says why.

Its distributions are looked at where something is uncertain, and where how uncertain is
known: at the label, and at the first word of an explanation. Explanations are what it
writes greedily.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from ftlib.caref import evidence, tasks
from ftlib.caref.evidence import HEDGES, LABELS, MARKS, WORDINGS, Example, Vocabulary
from ftlib.caref.faithfulness import (
    Predict,
    Share,
    flip_rates,
    insertion_effect,
    simulatability,
)
from ftlib.metrics.bertscore import STAND_IN, Encoder, load_encoder, nbert
from ftlib.metrics.calibration import brier, ece, ece_if_calibrated, nll
from ftlib.outcomes import Booleans, outcome_metrics
from ftlib.results import PACKED_PREFIX, Metric
from ftlib.sequences import IGNORED

Floats = npt.NDArray[np.float64]
Map = Callable[[Tensor], Tensor]

VOCABULARY = Vocabulary()
LABEL_TOKENS = [VOCABULARY.encode(label)[0] for label in LABELS]
WORDING_TOKENS = [VOCABULARY.encode(wording)[0] for wording in WORDINGS]
LONGEST = 24  # tokens; a right output takes at most 14
JUDGE = STAND_IN[0]

ENTROPY_STEP = 0.25
"""Width in nats of the bins of :func:`histogram`."""

_BATCH = 256
_NAME, _PLACE = "|".join(evidence.NAMES), "|".join(evidence.PLACES)
_FACT = (
    rf"(?:(?:{_NAME}) (?:is (?:(?:not|{'|'.join(HEDGES)}) )?in (?:{_PLACE})"
    rf"|follows (?:{_NAME}))|nothing of (?:{_NAME}))"
)
_OUTPUT = re.compile(
    rf"(?:{'|'.join(LABELS)}) {tasks.SEPARATOR} (?:{'|'.join(WORDINGS)}) "
    rf"{_FACT}(?: and {_FACT})?"
)


# -- batches ---------------------------------------------------------------------------


class Pair(NamedTuple):
    """An example as token ids."""

    source: list[int]
    target: list[int]


def pairs(examples: Sequence[Example]) -> list[Pair]:
    """Turn examples into token ids."""
    return [
        Pair(VOCABULARY.encode(one.text), VOCABULARY.encode(one.target))
        for one in examples
    ]


def collate(batch: Sequence[Pair]) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask`` and ``labels``, int64 (n, T)."""
    return {
        **_inputs([pair.source for pair in batch]),
        "labels": _padded([pair.target for pair in batch], IGNORED),
    }


def _inputs(sources: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    ids = _padded(sources, VOCABULARY.pad)
    return {"input_ids": ids, "attention_mask": (ids != VOCABULARY.pad).long()}


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )


# -- distributions ---------------------------------------------------------------------


class Beliefs(NamedTuple):
    """A model's distributions for n examples.

    Attributes:
        label: over the V tokens where the label stands, [n, V].
        wording: where an explanation begins, after the example's own label, [n, V].
    """

    label: Floats
    wording: Floats

    @property
    def labels(self) -> Floats:
        """Probabilities of ``LABELS`` among themselves, [n, 3]; equal where all are 0.

        A sparse map may leave out all three.
        """
        among = self.label[:, LABEL_TOKENS]
        total = among.sum(1, keepdims=True)
        return np.divide(among, total, out=np.full_like(among, 1 / 3), where=total > 0)


@torch.no_grad()
def believe(
    model: nn.Module, examples: Sequence[Example], probabilities: Map
) -> Beliefs:
    """Return what a model holds likely, and to what degree.

    Args:
        model: the model.
        examples: n.
        probabilities: the map from logits to the distributions that it was trained in.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(examples), _BATCH):
        batch = collate(pairs(examples[start : start + _BATCH]))
        logits = model(**{k: v.to(device) for k, v in batch.items()}).logits
        # "LABEL because WORDING": the third token is the explanation's first.
        found.append(probabilities(logits[:, [0, 2]].float()).double().cpu())
    model.train(was_training)
    label, wording = torch.cat(found).numpy().transpose(1, 0, 2)
    return Beliefs(label, wording)


def is_hedged(examples: Sequence[Example]) -> Booleans:
    """Whether a hedged fact decides, [n]; otherwise the question is *plain*."""
    facts = [example.deciding for example in examples]
    return np.array([fact is not None and 0 < fact.probability < 1 for fact in facts])


def gold(examples: Sequence[Example]) -> npt.NDArray[np.int64]:
    """Indices of the labels that were drawn, [n]."""
    return np.array([LABELS.index(example.label) for example in examples])


def decision_metrics(
    labels: Floats, examples: Sequence[Example], shortcut: float
) -> dict[str, Metric]:
    """Say how good probabilities of the labels are.

    Args:
        labels: [n, 3].
        examples: n, of which some are hedged and some are plain.
        shortcut: of their world.

    Returns:
        ``plain`` and ``hedged``, shares of the labels drawn that were given the highest
        probability; ``plain misled``, of plain questions whose mark is another label's;
        the calibration of all, with no NLL where a label drawn had probability 0; of
        hedged ones, the ECE, the mean ``confidence``, and the mean total variation
        ``distance`` to the exact posterior; the scores of that posterior; and for each
        hedge, the mean ``belief`` in what it says, which should be its probability.
    """
    n, hedged, y = len(examples), is_hedged(examples), gold(examples)
    right = labels.argmax(1) == y
    misled = np.array([MARKS.index(one.mark) for one in examples]) != y
    exact = np.array([evidence.posterior(one, shortcut) for one in examples])
    distance = np.abs(labels - exact).sum(1) / 2
    top = labels.max(1)
    return {
        "plain": _share(right[~hedged]),
        "plain misled": _share(right[~hedged & misled]),
        "hedged": _share(right[hedged]),
        "ECE": Metric(ece(labels, y), n),
        "ECE if calibrated": Metric(ece_if_calibrated(labels).mean, n),
        "ECE classwise": Metric(ece(labels, y, events="classwise"), n),
        "Brier": Metric(brier(labels, y).mean, n),
        "NLL": Metric(nll(labels, y).mean, n),
        "hedged ECE": Metric(ece(labels[hedged], y[hedged]), int(hedged.sum())),
        "hedged ECE if calibrated": Metric(
            ece_if_calibrated(labels[hedged]).mean, int(hedged.sum())
        ),
        "hedged confidence": _mean(top[hedged]),
        "hedged distance": _mean(distance[hedged]),
        "posterior Brier": Metric(brier(exact, y).mean, n),
        "posterior NLL": Metric(nll(exact, y).mean, n),
        "posterior confidence": _mean(exact.max(1)[hedged]),
        **_beliefs_in_hedges(labels, examples),
        **_reliability(top, right),
        **outcome_metrics("label", right),
    }


def distribution_metrics(beliefs: Beliefs) -> dict[str, Metric]:
    """Say how spread distributions over all tokens are.

    Returns:
        ``label mass``, the mean probability of all labels together; the mean
        entropies in nats at the label and at the wording, with their histograms; and
        the mean total variation ``wording distance`` to how often wordings are used.
    """
    usual = np.array(list(WORDINGS.values()))
    wordings = beliefs.wording[:, WORDING_TOKENS]
    other = 1 - wordings.sum(1)
    entropies = {
        name: _entropy(p)
        for name, p in (("label", beliefs.label), ("wording", beliefs.wording))
    }
    return {
        "label mass": _mean(beliefs.label[:, LABEL_TOKENS].sum(1)),
        "wording distance": _mean((np.abs(wordings - usual).sum(1) + other) / 2),
        **{f"{name} entropy": _mean(h) for name, h in entropies.items()},
        **{
            k: v for name, h in entropies.items() for k, v in histogram(name, h).items()
        },
    }


def histogram(name: str, entropies: Floats) -> dict[str, Metric]:
    """Count entropies in bins of ``ENTROPY_STEP`` nats; empty ones are left out."""
    bins, counts = np.unique((entropies / ENTROPY_STEP).astype(int), return_counts=True)
    return {
        f"{PACKED_PREFIX}{name} entropy/{index}": Metric(float(count), len(entropies))
        for index, count in zip(bins.tolist(), counts.tolist(), strict=True)
    }


def _entropy(p: Floats) -> Floats:
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    entropies: Floats = -(p * logs).sum(1)
    return entropies.clip(min=0)


def _beliefs_in_hedges(
    labels: Floats, examples: Sequence[Example]
) -> dict[str, Metric]:
    """Mean probability of what each hedge says, whose own is known."""
    held: dict[str, list[float]] = {hedge: [] for hedge in HEDGES}
    for p, example in zip(labels, examples, strict=True):
        fact = example.deciding
        hedge = fact.relation.split()[1] if fact else ""
        if fact and hedge in held:
            said = "entailment" if fact.object == example.place else "contradiction"
            held[hedge].append(p[LABELS.index(said)])
    return {f"belief {hedge}": _mean(np.array(p)) for hedge, p in held.items()}


def _reliability(confidence: Floats, right: Booleans) -> dict[str, Metric]:
    """Mean confidence and accuracy in each of ten bins that is not empty."""
    bins = np.ceil(confidence * 10).clip(1, 10).astype(np.int64) - 1
    metrics = {}
    for index in np.unique(bins).tolist():
        kept = bins == index
        metrics[f"{PACKED_PREFIX}confidence/{index}"] = _mean(confidence[kept])
        metrics[f"{PACKED_PREFIX}accuracy/{index}"] = _share(right[kept])
    return metrics


# -- explanations ----------------------------------------------------------------------


@torch.no_grad()
def write(model: nn.Module, texts: Sequence[str]) -> list[str]:
    """Let a model write label and explanation for each input, greedily."""
    generator: Any = model
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=LONGEST,
        decoder_start_token_id=VOCABULARY.pad,
        eos_token_id=VOCABULARY.end,
        pad_token_id=VOCABULARY.pad,
        # The rows that pad the head have no words.
        suppress_tokens=list(range(len(VOCABULARY), generator.config.vocab_size)),
    )
    written: list[str] = []
    for start in range(0, len(texts), _BATCH):
        sources = [VOCABULARY.encode(text) for text in texts[start : start + _BATCH]]
        inputs = {k: v.to(device) for k, v in _inputs(sources).items()}
        rows = generator.generate(**inputs, generation_config=config)
        written += [VOCABULARY.decode(row) for row in rows.tolist()]
    model.train(was_training)
    return written


def predictor(model: nn.Module) -> Predict:
    """Return labels and explanations for inputs, asking about each only once."""
    known: dict[str, str] = {}

    def predict(texts: list[str]) -> tuple[list[str], list[str]]:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            known.update(zip(new, write(model, new), strict=True))
        outputs = [tasks.read(known[text]) for text in texts]
        return [o.label for o in outputs], [o.explanation for o in outputs]

    return predict


def is_well_formed(label: str, explanation: str) -> bool:
    """Whether a label and nothing but one or two facts, in a wording, was written."""
    return bool(_OUTPUT.fullmatch(f"{label} {tasks.SEPARATOR} {explanation}"))


def explanation_metrics(
    predict: Predict, examples: Sequence[Example], compared: int
) -> dict[str, Metric]:
    """Say how good explanations are.

    Args:
        predict: what writes them.
        examples: n.
        compared: how many plain ones, at most, to compare with right explanations.

    Returns:
        ``valid``, shares of well-formed outputs; ``evidence``, of explanations that
        cite exactly the facts that decide, in any wording; ``justified``, of plain
        questions with right label and evidence; ``nBERT``, and ``nBERT ungated``, the
        score without regard to the label.
    """
    labels, explanations = predict([example.text for example in examples])
    valid = list(map(is_well_formed, labels, explanations))
    trios = list(zip(labels, explanations, examples, strict=True))
    cited = np.array([why in example.explanations for _, why, example in trios])
    right = np.array([label == example.label for label, _, example in trios])
    plain = ~is_hedged(examples)
    trios = [trio for trio, kept in zip(trios, plain, strict=True) if kept][:compared]
    score = nbert(
        labels=[label for label, _, _ in trios],
        gold_labels=[example.label for _, _, example in trios],
        explanations=[why for _, why, _ in trios],
        gold_explanations=[example.explanations for _, _, example in trios],
        encoder=judge(),
    )
    return {
        "valid": _share(np.array(valid)),
        "evidence": _share(cited),
        "justified": _share((cited & right)[plain]),
        "nBERT": _mean(np.where(score.correct, score.scores, 0.0)),
        "nBERT ungated": _mean(score.scores),
        **outcome_metrics("evidence", cited),
    }


@functools.cache
def judge() -> Encoder:
    """The encoder that compares explanations."""
    return load_encoder(JUDGE)


# -- faithfulness ----------------------------------------------------------------------


def faithfulness_metrics(
    predict: Predict, examples: Sequence[Example], edited: int, seed: int
) -> dict[str, Metric]:
    """Say whether what explanations cite is what labels depend on.

    Args:
        predict: what writes them.
        examples: n ≥ 10, some of them plain, and some hedged.
        edited: how many of each kind, at most, to edit.
        seed: of the edits.

    Returns:
        Shares of edits of plain questions' facts that change the label, if the
        explanation cites what is edited (``flips cited``) or not (``flips other``);
        of edits of the mark, which is never cited (``flips mark plain`` and ``flips
        mark hedged``; in a hedged question it does tell something); of insertions of
        "not", those that change the label (``insertion changes``) and, of these, those
        that the new explanation mentions (``insertion mentioned``); and how much
        explanations help to predict the model's labels (``simulatability``, beside
        ``simulated``, predicted without them).
    """
    hedged = is_hedged(examples)
    kinds = {
        kind: [e for e, h in zip(examples, hedged, strict=True) if h == wanted][:edited]
        for kind, wanted in (("plain", False), ("hedged", True))
    }
    edits = {kind: evidence.edits(some, seed) for kind, some in kinds.items()}
    facts = [edit for at, edit in enumerate(edits["plain"]) if at % 3 < 2]
    rates = flip_rates(predict, facts)
    marks = {kind: flip_rates(predict, some[2::3]) for kind, some in edits.items()}
    inserted = insertion_effect(predict, evidence.insertions(kinds["plain"]))
    texts = [example.text for example in examples]
    simulated = simulatability(texts, *predict(texts))
    return {
        "flips cited": _metric(rates.cited),
        "flips other": _metric(rates.other),
        **{f"flips mark {kind}": _metric(rate.other) for kind, rate in marks.items()},
        "insertion changes": _metric(inserted.changed),
        "insertion mentioned": _metric(inserted.mentioned),
        "simulated": _metric(simulated.from_input),
        "simulatability": Metric(simulated.gain, len(texts)),
    }


def _metric(share: Share) -> Metric:
    return Metric(share.value, share.n)


def _share(outcomes: Booleans) -> Metric:
    return _mean(outcomes.astype(np.float64))


def _mean(values: Floats) -> Metric:
    """Return the mean; NaN where there is nothing to average."""
    return Metric(float(values.mean()) if len(values) else float("nan"), len(values))
