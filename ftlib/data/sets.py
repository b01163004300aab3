"""One loader for each data set.

The loaders of mathematical problems agree on two fields: ``question``, and
``reference``, the right answer alone, which is what :func:`ftlib.metrics.grade` takes.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, get_args

import numpy as np
import yaml

from ftlib.data.arrays import read_pickled_arrays
from ftlib.data.reading import read_csv, read_jsonl
from ftlib.data.registry import DataCorrupt, DataUnavailable, fetch
from ftlib.metrics.answers import last_boxed

Gsm8kSplit = Literal["train", "test"]
EsnliSplit = Literal["dev", "test"]
ComveSplit = Literal["train", "dev", "test"]
CoseSplit = Literal["train", "dev"]
NusaxSplit = Literal["train", "valid", "test"]
IndonliSplit = Literal["train", "val", "test_lay", "test_expert"]
XnliSplit = Literal["dev", "test"]
MobilePart = Literal["tasks", "knowledge"]

NUSAX_LANGUAGES = tuple(
    "acehnese balinese banjarese buginese english indonesian javanese madurese "
    "minangkabau ngaju sundanese toba_batak".split()
)
XNLI_LANGUAGES = tuple("ar bg de el en es fr hi ru sw th tr ur vi zh".split())

# Neither has a licence that we could find. So they are not in the registry: who wants
# one fetches it, and hands over its path. Sizes are upstream's, in bytes; the SHA-256
# is not known to us.
AMBIK_SOURCE = (
    "https://raw.githubusercontent.com/cog-model/AmbiK-dataset/"
    "9d4f60d4224b4183cd35d11233d8114aeaefc2f6/"
)
AMBIK_FILES = {
    "AmbiK_data.csv": 1_848_398,
    "ambik_dataset/ambik_test_900.csv": 1_732_929,
    "ambik_dataset/ambik_test_400.csv": 746_738,
    "ambik_dataset/ambik_calib_100.csv": 200_328,
}
HOUSEKEEP_SOURCE = (
    "https://raw.githubusercontent.com/yashkant/housekeep/ff57c791412e/"
    "cos_eor/scripts/orm/amt_data/"
)
HOUSEKEEP_FILES = {"data.npy": 2_788_628}

_SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: ten times as fast


class Problem(TypedDict):
    """A mathematical problem.

    Attributes:
        question: the problem's text.
        solution: a worked solution; empty where the set has none.
        reference: the right answer alone.
        topic: the field, course or kind of problem; empty where the set has none.
    """

    question: str
    solution: str
    reference: str
    topic: str


class MathProblem(Problem):
    """A problem of MATH-500, with its ``level`` from 1 (easiest) to 5."""

    level: int


class InferencePair(TypedDict):
    """A premise and a hypothesis.

    Attributes:
        premise: what is taken for true.
        hypothesis: what is asked about.
        label: ``entailment``, ``neutral`` or ``contradiction``.
    """

    premise: str
    hypothesis: str
    label: str


class Inference(InferencePair):
    """A premise and a hypothesis, with why the label holds: three ``explanations``."""

    explanations: list[str]


class LabelledText(TypedDict):
    """A text and its sentiment.

    Attributes:
        id: of the text; its translations have the same.
        text: the text.
        label: ``positive``, ``neutral`` or ``negative``.
    """

    id: str
    text: str
    label: str


class SensePair(TypedDict):
    """A sentence that makes sense and a similar one that does not.

    Attributes:
        sense: the sentence that makes sense.
        nonsense: the one that does not.
        reasons: why it does not, one to three.
    """

    sense: str
    nonsense: str
    reasons: list[str]


class ExplainedQuestion(TypedDict):
    """A question with choices, and why the answer is right.

    Attributes:
        question: the question's text.
        choices: what can be chosen from.
        answer: the right one of them.
        explanation: why, in an annotator's words.
    """

    question: str
    choices: list[str]
    answer: str
    explanation: str


class TidyScenario(TypedDict):
    """A room to tidy, and where a person would put each thing.

    Attributes:
        room: ``living room``, ``bedroom``, ``kitchen`` or ``pantry room``.
        receptacles: where things can be put, two to five places.
        seen: things with their places, to learn from.
        unseen: other things with theirs, as many, to be tested with.
        note: the person's rule in words.
        tags: what the rule goes by, such as ``category`` or ``attribute``.
    """

    room: str
    receptacles: list[str]
    seen: list[tuple[str, str]]
    unseen: list[tuple[str, str]]
    note: str
    tags: list[str]


class PickAndPlace(TypedDict):
    """A request to a robot that can mean several things.

    Attributes:
        scene: what lies there, in words.
        request: what is asked.
        intended_objects: what the person meant, one or more.
        intended_locations: where to, one or more.
        objects: all that the request can mean, the intended ones mostly first.
        locations: all places that it can mean.
        present: the objects of the scene, in its order.
        category: the kind of ambiguity.
    """

    scene: str
    request: str
    intended_objects: list[str]
    intended_locations: list[str]
    objects: list[str]
    locations: list[str]
    present: list[str]
    category: str


class KitchenRequest(TypedDict):
    """A request in a kitchen, that leaves something open.

    Attributes:
        kitchen: the things in it.
        request: what is asked, ambiguous.
        clear: the same, said clearly.
        kind: ``preferences``, ``common_sense_knowledge`` or ``safety``.
        question: what a robot could ask back.
        answer: what the person would say.
        choices: what the request can mean; empty where upstream lists none.
        intent: the right one, in upstream's notation.
    """

    kitchen: list[str]
    request: str
    clear: str
    kind: str
    question: str
    answer: str
    choices: list[str]
    intent: str


class Placings(NamedTuple):
    """Where people would put household objects.

    Attributes:
        ranks: int64 (R, O, A). A positive k says that the place was the annotation's
            k-th best for the object, a negative one that the object would be found
            there in an untidy house, 0 that neither holds.
        places: the R places, each a room and a receptacle.
        objects: the O objects.
    """

    ranks: np.ndarray
    places: list[tuple[str, str]]
    objects: list[str]


def gsm8k(split: Gsm8kSplit) -> list[dict[str, str]]:
    """Load GSM8K: 7,473 questions to train on, 1,319 to test with.

    Returns:
        Rows of ``question``, ``answer`` and ``reference``; an answer's last line is
        ``#### NUMBER``, its calculations are annotated as ``<<3*4=12>>``, and the
        reference is that number.

    Raises:
        ValueError: there is no such split.
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    _check_split("GSM8K", split, get_args(Gsm8kSplit))
    rows = read_jsonl(fetch(f"math/gsm8k/{split}.jsonl"))
    return [
        {**row, "reference": row["answer"].rpartition("#### ")[2].strip()}
        for row in rows
    ]


def math500() -> list[MathProblem]:
    """Load MATH-500: 500 test problems of MATH, the competition mathematics set.

    References are LaTeX: numbers, expressions, intervals, matrices, words.

    Raises:
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    return [
        {
            "question": row["problem"],
            "solution": row["solution"],
            "reference": row["answer"],
            "topic": row["subject"],
            "level": row["level"],
        }
        for row in read_jsonl(fetch("math/math-500/test.jsonl"))
    ]


def minerva() -> list[Problem]:
    r"""Load Minerva's 272 university problems, from MIT OpenCourseWare courses.

    The reference is the content of the solution's one ``\boxed{...}``. Many are
    measurements rounded to two or three figures: grade this set with a stated
    ``relative_tolerance``. For evaluation only.

    Raises:
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    return [
        {
            "question": row["problem"],
            "solution": row["solution"],
            "reference": last_boxed(row["solution"]) or "",
            "topic": row["type"],
        }
        for row in read_jsonl(fetch("math/minerva_math/test.jsonl"))
    ]


def amc23() -> list[Problem]:
    """Load AMC 2023: 40 competition problems, all with whole answers.

    For evaluation only. With 40 problems, one is 2.5 points.

    Raises:
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    return [
        {
            "question": row["problem"],
            "solution": "",
            "reference": _number(row["answer"]),
            "topic": "",
        }
        for row in read_jsonl(fetch("math/amc23/test.jsonl"))
    ]


def svamp() -> list[Problem]:
    """Load SVAMP: 1,000 word problems of one or two steps.

    The solution is an expression such as ``( 76.0 - 25.0 )``. One reference is not what
    its expression gives (Rachel's apples: 1 for 5); it is left as published. The file
    has no split of its own.

    Raises:
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    return [
        {
            "question": f"{row['Body'].rstrip(' .')}. {row['Question']}",
            "solution": row["Equation"],
            "reference": _number(row["Answer"]),
            "topic": row["Type"],
        }
        for row in _read_array(fetch("svamp/SVAMP.json"))
    ]


def esnli(split: EsnliSplit) -> list[Inference]:
    """Load e-SNLI: 9,842 pairs of sentences in dev, 9,824 in test.

    The train part is not in the registry. The texts are upstream's tokenised ones, with
    spaces around punctuation; explanations are in lower case.

    Raises:
        ValueError: there is no such split.
        DataUnavailable: a file is nowhere to be found.
        DataCorrupt: a file is damaged or altered.
    """
    _check_split("e-SNLI", split, get_args(EsnliSplit))
    names = ["s1", "s2", "labels", *(f"preproc1_expl_{k}" for k in (1, 2, 3))]
    columns = [_read_lines(fetch(f"esnli/{name}.{split}")) for name in names]
    return [
        {
            "premise": premise,
            "hypothesis": hypothesis,
            "label": label,
            "explanations": explanations,
        }
        for premise, hypothesis, label, *explanations in zip(*columns, strict=True)
    ]


def comve(split: ComveSplit) -> list[SensePair]:
    """Load ComVE: 10,000 pairs of sentences to train on, 1,000 in dev, 1,000 in test.

    The dev and test files repeat the second confusing reason as ``Right Reason2``, in
    every row. A reason that is also listed as confusing is left out here, so these two
    splits have two reasons a row, not three.

    Raises:
        ValueError: there is no such split.
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    _check_split("ComVE", split, get_args(ComveSplit))
    return [
        {
            "sense": row["Correct Statement"].strip(),
            "nonsense": row["Incorrect Statement"].strip(),
            "reasons": _right_reasons(row),
        }
        for row in read_csv(fetch(f"comve/{split}.csv"))
    ]


def cose(split: CoseSplit) -> list[ExplainedQuestion]:
    """Load CoS-E 1.0: 7,610 questions to train on, 950 in dev, three choices each.

    The explanation is the annotator's open-ended one. Many explain little: the
    authors of FEB advise against the set.

    Raises:
        ValueError: there is no such split.
        DataUnavailable: a file is nowhere to be found.
        DataCorrupt: a file is damaged or altered.
    """
    _check_split("CoS-E", split, get_args(CoseSplit))
    explanations = {
        row["id"]: row["explanation"]["open-ended"].strip()
        for row in read_jsonl(fetch(f"cose/cose_{split}_v1.0.jsonl"))
    }
    rows = []
    for row in read_jsonl(fetch(f"cose/{split}_rand_split.jsonl")):
        choices = {c["label"]: c["text"] for c in row["question"]["choices"]}
        question: ExplainedQuestion = {
            "question": row["question"]["stem"].strip(),
            "choices": list(choices.values()),
            "answer": choices[row["answerKey"]],
            "explanation": explanations[row["id"]],
        }
        rows.append(question)
    return rows


def ecqa() -> list[ExplainedQuestion]:
    """Name the source of ECQA, whose text is not in the registry.

    Raises:
        DataUnavailable: always.
    """
    raise DataUnavailable(
        "ECQA is not among ftlib's data: its explanations are in ecqa.jsonl of "
        "github.com/dair-iitd/ECQA-Dataset and are joined by id with the questions of "
        "CommonsenseQA 1.11. Take comve, cose or esnli, which are"
    )


def nusax(language: str, split: NusaxSplit) -> list[LabelledText]:
    """Load NusaX: 500 opinions to train on, 100 in valid, 400 in test, per language.

    The languages are parallel: in each split the same texts come in the same order with
    the same labels. A training text of one language is the translation of one of every
    other, though never of a text in test.

    Args:
        language: one of ``NUSAX_LANGUAGES``.
        split: which part.

    Raises:
        ValueError: there is no such language or split.
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    _check_language("NusaX", language, NUSAX_LANGUAGES)
    _check_split("NusaX", split, get_args(NusaxSplit))
    return [
        {"id": row["id"], "text": row["text"].strip(), "label": row["label"]}
        for row in read_csv(fetch(f"nusax/sentiment/{language}/{split}.csv"))
    ]


def indonli(split: IndonliSplit) -> list[InferencePair]:
    """Load IndoNLI: 10,330 Indonesian pairs in train, 2,197 in val.

    Of the tests, ``test_lay`` has 2,201 pairs by annotators such as those of train and
    val, and ``test_expert`` 2,984 by linguists. Nine in ten pairs of val and test_lay
    have a premise that train has too, those of test_expert none.

    Raises:
        ValueError: there is no such split.
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    _check_split("IndoNLI", split, get_args(IndonliSplit))
    labels = {"e": "entailment", "n": "neutral", "c": "contradiction"}
    return [
        {
            "premise": row["premise"].strip(),
            "hypothesis": row["hypothesis"].strip(),
            "label": labels[row["label"]],
        }
        for row in read_jsonl(fetch(f"indonli/{split}.jsonl"))
    ]


def xnli(language: str, split: XnliSplit) -> list[InferencePair]:
    """Load XNLI 1.0: 2,490 pairs in dev and 5,010 in test, in each of 15 languages.

    The languages are parallel. There is no train part: XNLI's authors train on
    MultiNLI, which is English and not in the registry.

    Args:
        language: one of ``XNLI_LANGUAGES``, by its code.
        split: which part.

    Raises:
        ValueError: there is no such language or split.
        DataUnavailable: the archive is nowhere to be found.
        DataCorrupt: the archive is damaged or altered.
    """
    _check_language("XNLI", language, XNLI_LANGUAGES)
    _check_split("XNLI", split, get_args(XnliSplit))
    archive = fetch("xnli/XNLI-1.0.zip")
    return [
        {
            "premise": row["sentence1"].strip(),
            "hypothesis": row["sentence2"].strip(),
            "label": row["gold_label"],
        }
        for row in read_jsonl(zipfile.Path(archive, f"XNLI-1.0/xnli.{split}.jsonl"))
        if row["language"] == language
    ]


def tidybot() -> list[TidyScenario]:
    """Load TidyBot's 96 scenarios: 672 placements to learn from, 672 to test with.

    Each scenario is a person of its own. No thing is in both halves of a scenario.

    Raises:
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    text = fetch("tidybot/scenarios.yml").read_text(encoding="utf-8")
    return [
        {
            "room": row["room"],
            "receptacles": row["receptacles"],
            "seen": [(thing, place) for thing, place in row["seen_placements"]],
            "unseen": [(thing, place) for thing, place in row["unseen_placements"]],
            "note": row["annotator_notes"],
            "tags": row["tags"],
        }
        for row in yaml.load(text, Loader=_SafeLoader)  # noqa: S506  # safe, both are
    ]


def tidybot_replies() -> dict[str, str]:
    """Load what text-davinci-003 replied to TidyBot's 821 prompts, by the prompt.

    Raises:
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    rows = read_jsonl(fetch("tidybot/text_davinci_003_replies.jsonl"))
    return {row["prompt"]: row["completion"] for row in rows}


def mobile_manipulation(part: MobilePart) -> list[PickAndPlace]:
    """Load Mobile Manipulation: 600 tasks, and 200 more as knowledge.

    It is KnowNo's set in the form that Introspective Planning gave it. Five rows have a
    location ``bottled``, which is upstream's slip for ``bottled water``; it is left as
    published.

    Raises:
        ValueError: there is no such part.
        DataUnavailable: the file is nowhere to be found.
        DataCorrupt: the file is damaged or altered.
    """
    _check_split("Mobile Manipulation", part, get_args(MobilePart))
    suffix = "" if part == "tasks" else "_knowledge"
    path = fetch(f"mobile_manipulation/mobile_manipulation{suffix}.txt")
    blocks = path.read_text(encoding="utf-8").strip().split("\n\n")
    return [_pick_and_place(block) for block in blocks]


def ambik(path: Path) -> list[KitchenRequest]:
    """Read a file of AmbiK that you have fetched; ftlib neither has nor fetches it.

    Args:
        path: one of ``AMBIK_FILES``, under its own name, from ``AMBIK_SOURCE``.

    Raises:
        ValueError: the file has another name, or lacks a column.
        DataUnavailable: the file is not there; the message has its address.
        DataCorrupt: the file has not the size it has upstream.
    """
    rows = read_csv(_users_own("AmbiK", path, AMBIK_SOURCE, AMBIK_FILES))
    try:
        return [_kitchen_request(row) for row in rows]
    except KeyError as error:
        raise ValueError(f"{path} has no column {error}") from error


def housekeep(path: Path) -> Placings:
    """Read Housekeep's annotations, which you have fetched; ftlib neither has them.

    There are 128 places, 269 objects and 10 annotations of each. An annotation's number
    is not a person: slots were filled by whoever came.

    Args:
        path: ``data.npy``, from ``HOUSEKEEP_SOURCE``. It is a pickle. Only arrays,
            dictionaries, lists, texts and numbers are read from it, and nothing that
            it names is called.

    Raises:
        ValueError: the file has another name, or names anything else to be called.
        DataUnavailable: the file is not there; the message has its address.
        DataCorrupt: the file has not the size it has upstream, or other contents.
    """
    path = _users_own("Housekeep", path, HOUSEKEEP_SOURCE, HOUSEKEEP_FILES)
    content = read_pickled_arrays(path)
    try:
        ranks = np.asarray(content["ranks"], dtype=np.int64)
        objects = [str(name) for name in content["objects"]]
        pairs = [str(name).split("|") for name in content["room_receptacles"]]
        places = [(room, receptacle) for room, receptacle in pairs]
    except (TypeError, KeyError, ValueError) as error:
        raise DataCorrupt(f"{path} does not hold Housekeep's ranks: {error}") from error
    if ranks.shape[:2] != (len(places), len(objects)) or ranks.ndim != 3:
        raise DataCorrupt(
            f"{path} has ranks of shape {ranks.shape} for {len(places)} places and "
            f"{len(objects)} objects"
        )
    return Placings(ranks, places, objects)


def _check_split(name: str, split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}: choose {' or '.join(splits)}")


def _check_language(name: str, language: str, languages: tuple[str, ...]) -> None:
    if language not in languages:
        raise ValueError(
            f"{name} has no language {language!r}: choose one of {', '.join(languages)}"
        )


def _right_reasons(row: dict[str, str]) -> list[str]:
    """The different right reasons of a row of ComVE, without the confusing ones."""
    confusing = {row[f"Confusing Reason{k}"].strip() for k in (1, 2)}
    right = dict.fromkeys(row[f"Right Reason{k}"].strip() for k in (1, 2, 3))
    return [reason for reason in right if reason and reason not in confusing]


_PICK_AND_PLACE = (
    "Scene",
    "Task",
    "User intent (object)",
    "User intent (location)",
    "Possible objects",
    "Possible locations",
    "Scene objects",
    "Task category",
)


def _pick_and_place(block: str) -> PickAndPlace:
    """A block of Mobile Manipulation: its number, then one field a line."""
    number, *lines = block.split("\n")
    fields = [line.split(": ", 1) for line in lines]
    if tuple(field[0] for field in fields) != _PICK_AND_PLACE:
        raise ValueError(
            f"task {number} has not the fields {', '.join(_PICK_AND_PLACE)}: {lines}"
        )
    scene, request, *lists, category = (field[1] for field in fields)
    intended, to, objects, locations, present = (text.split(", ") for text in lists)
    return {
        "scene": scene,
        "request": request,
        "intended_objects": intended,
        "intended_locations": to,
        "objects": objects,
        "locations": locations,
        "present": present,
        "category": category,
    }


def _kitchen_request(row: dict[str, str]) -> KitchenRequest:
    return {
        "kitchen": [item.strip() for item in row["environment_short"].split(",")],
        "request": row["ambiguous_task"].strip(),
        "clear": row["unambiguous_direct"].strip(),
        "kind": row["ambiguity_type"].strip(),
        "question": row["question"].strip(),
        "answer": row["answer"].strip(),
        "choices": [line.strip() for line in row["variants"].splitlines() if line],
        "intent": row["user_intent"].strip(),
    }


def _users_own(name: str, path: Path, source: str, files: dict[str, int]) -> Path:
    """Check that a file which the user has fetched is the one meant, by its size."""
    path = Path(path)
    places = {Path(file).name: (file, size) for file, size in files.items()}
    if path.name not in places:
        raise ValueError(
            f"{name} has no file {path.name!r}: keep upstream's name, one of "
            f"{', '.join(places)}"
        )
    file, size = places[path.name]
    if not path.is_file():
        raise DataUnavailable(
            f"{name} is not among ftlib's data, for we found no licence: there is no "
            f"{path}. Fetch {source}{file} yourself, {size} bytes, and give its path"
        )
    if path.stat().st_size != size:
        raise DataCorrupt(
            f"{path} has {path.stat().st_size} bytes, {source}{file} has {size}: "
            "fetch it again"
        )
    return path


def _read_lines(path: Path) -> list[str]:
    """Lines of a file, with single spaces; the last may lack its line end."""
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return [" ".join(line.split()) for line in lines]


def _read_array(path: Path) -> list[dict]:
    """Rows of a file that is one JSON array."""
    rows: list[dict] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def _number(number: float) -> str:
    """A number as people write it: 27.0 is 27."""
    return str(int(number)) if number == int(number) else repr(number)
