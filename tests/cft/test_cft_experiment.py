"""The plan runs, its arms differ in what they name, and nothing leaks into a test."""

import dataclasses
import itertools

import pytest
import torch

from ftlib import results
from ftlib.cft import evaluation, experiment
from ftlib.cft.critiques import is_right
from ftlib.cft.data import PaddingCollator
from ftlib.cft.evaluation import VOCABULARY, Exam
from ftlib.cft.experiment import Snapshots
from ftlib.cft.objective import Learner, training_loss
from ftlib.cft.settings import (
    CHAINS,
    CONTROLS,
    LEARNING_RATES,
    MAIN,
    BaseSettings,
    Recipe,
)
from ftlib.cft.solutions import CHAIN
from ftlib.outcomes import outcomes
from ftlib.results import NotRecordedError
from ftlib.splits import split_of
from ftlib.training import TrainingSettings, train

TOY_BASE = BaseSettings(
    width=16,
    layers=1,
    heads=2,
    solutions=64,
    critiques=64,
    training=TrainingSettings(
        steps=4, batch_size=16, learning_rate=1e-3, checkpoint_every=2
    ),
)
TOY = dataclasses.replace(
    CHAINS,
    base=TOY_BASE,
    questions=40,
    steps=6,
    batch_size=8,
    checkpoints=3,
    validation=8,
    test=12,
)
NAMED = {"arm", "stages", "learning_rate", "equal_tokens", "method"}

pytestmark = pytest.mark.usefixtures("base_cache")


def test_arms_are_recorded_under_distinct_names():
    names = [str(arm) for arm in experiment.plan("cpu")]
    assert len(names) == len(set(names))
    assert {"chains/CFT rederive", "controls/CFT no response"} <= set(names)


# One of each way through the code; the recipes are tested by themselves below.
@pytest.mark.parametrize(
    "name",
    ["chains/base", "controls/CFT then SFT", "equal-tokens/CFT verdict"],
)
def test_an_arm_runs_from_end_to_end(name):
    [arm] = [a for a in experiment.chain_arms(TOY) if str(a) == name]
    metrics = arm.run(0)
    assert {"gap", "gap valid", "no-gap", "accuracy", "last gap", "step"} <= set(
        metrics
    )
    right = outcomes(metrics, "gap")
    assert len(right) == TOY.test
    assert right.mean() == metrics["gap"].value


def test_main_arms_differ_only_in_what_they_name():
    arms = [
        a for a in experiment.chain_arms(TOY) if a.experiment in ("chains", "controls")
    ]
    shared = [{k: v for k, v in a.settings.items() if k not in NAMED} for a in arms]
    assert len(arms) == len(MAIN) + len(CONTROLS)
    assert all(settings == shared[0] for settings in shared)


def test_the_other_experiments_change_one_setting_of_the_world():
    for a in experiment.chain_arms(TOY):
        changed = {
            name
            for name, value in dataclasses.asdict(TOY).items()
            if name != "base" and a.settings[name] != value
        }
        assert changed == ({"mistaken"} if a.experiment == "noise" else set())
        name = f"{a.experiment} {a.name}"
        base = a.settings["base"]
        assert (base["critiques"] == 0) == ("never-criticised" in name)
        assert (base["mistaken"] == 1) == ("always-mistaken" in name)


def test_splits_share_no_question():
    world = dataclasses.replace(TOY, questions=300, validation=150, test=150)
    drawn = {
        "train": {s.question for s in experiment.homework(world, 3).references},
        **{
            split: {
                q
                for e in experiment.exams_of(world, split, 3).values()
                for q in e.questions
            }
            for split in ("validation", "test")
        },
        "pretrain": {
            VOCABULARY.decode(f["input_ids"]).partition(" =")[0]
            for f in experiment.corpus(dataclasses.replace(TOY_BASE, solutions=300), 3)
        },
    }
    for split, questions in drawn.items():
        assert {split_of(question) for question in questions} == {split}
    for one, other in itertools.combinations(drawn.values(), 2):
        assert not one & other


def test_learning_rates_are_tuned_on_seeds_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(
        experiment, "fine_tune", lambda c, rate, seed: seen.append((str(c), rate, seed))
    )
    arms = [a for a in experiment.chain_arms(TOY) if a.experiment == "learning-rate"]
    with pytest.raises(AttributeError):  # it returned no model
        arms[0].run(1)
    assert seen == [
        (arms[0].settings["method"], arms[0].settings["learning_rate"], 1001)
    ]


def test_learning_rates_are_the_best_of_the_records(best_rates):
    """Without records there is nothing yet that the rates could follow."""
    try:
        records = results.load("cft", "cpu").select(experiment="learning-rate")
    except NotRecordedError:
        pytest.skip("cft is not recorded yet")
    assert best_rates(records, "method") == LEARNING_RATES


# -- what the loss falls on ------------------------------------------------------------


def parts(features):
    """The text of the prompt and of the target."""
    masked = sum(label == -100 for label in features["labels"])
    ids = features["input_ids"]
    assert features["labels"][masked:] == ids[masked:]  # nothing masked after that
    assert ids[-1] == VOCABULARY.end
    return VOCABULARY.decode(ids[:masked]), VOCABULARY.decode(ids[masked:])


@pytest.fixture(scope="module")
def work():
    return experiment.homework(TOY, 0)


def test_a_response_is_read_and_never_imitated(work):
    made = experiment.features(Recipe("critique"), work, 0)
    for response, reference, one in zip(
        work.responses, work.references, made, strict=True
    ):
        prompt, target = parts(one)
        assert prompt == f"{response.question} = {response.text(CHAIN)} rederive"
        verdict = "right" if is_right(response, reference) else "wrong"
        assert target == f"{reference.text(CHAIN)}\nConclusion: {verdict}"


def test_a_response_gets_no_gradient_of_its_own(work):
    """Other labels on the prompt's tokens would be the loss of another method."""
    torch.manual_seed(0)
    model = experiment._new_model(TOY_BASE)
    batch = PaddingCollator()(experiment.features(Recipe("critique"), work, 0)[:4])
    logits = model(batch["input_ids"]).logits
    logits.retain_grad()
    kept = batch["labels"][:, 1:] >= 0
    picked = logits[:, :-1][kept].log_softmax(-1)
    chosen = picked.gather(1, batch["labels"][:, 1:][kept][:, None])[:, 0]
    rows = kept.nonzero()[:, 0]
    weights = 1 / (len(kept) * kept.sum(1)[rows])
    expected = -(weights * chosen).sum()
    loss, _ = training_loss(Learner(model), batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    assert not logits.grad[:, :-1][~kept].any()


def test_recipes_differ_as_they_say(work):
    def texts(*args, **kwargs):
        return [parts(f) for f in experiment.features(Recipe(*args, **kwargs), work, 0)]

    right = [is_right(*p) for p in zip(work.responses, work.references, strict=True)]
    assert 0 < sum(right) < len(right)
    own = texts("critique")
    shuffled = texts("critique", shown="shuffled")
    assert [target for _, target in shuffled] == [target for _, target in own]
    questions = [prompt.partition(" =")[0] for prompt, _ in own]
    assert [prompt.partition(" =")[0] for prompt, _ in shuffled] == questions
    shown = [[prompt.partition("= ")[2] for prompt, _ in x] for x in (own, shuffled)]
    assert sorted(shown[0]) == sorted(shown[1])
    assert shown[0] != shown[1]
    blank = experiment.features(Recipe("critique", shown="blank"), work, 0)
    assert [parts(f) for f in blank] == texts("critique", shown="none")  # pads unseen
    assert all(f["input_ids"][10:16] == [VOCABULARY.pad] * 6 for f in blank)
    none = texts("critique", shown="none")
    assert none == [
        (f"{question} = rederive", target)
        for question, (_, target) in zip(questions, own, strict=True)
    ]
    assert len(texts("critique", kept="right")) == sum(right)
    assert len(texts("critique", kept="wrong")) == len(right) - sum(right)
    noisy, slips = texts("response"), texts("response", noise="slips")
    teacher = texts("solution")
    for ok, *targets in zip(right, noisy, slips, teacher, strict=True):
        same = [target == targets[2] for target in targets[:2]]
        assert same == [ok, ok]
    wrong = texts("critique", wrong_critiques=1.0)
    assert all(a[1] != b[1] for a, b in zip(wrong, own, strict=True))


def test_equal_tokens_scales_the_steps(work):
    world = dataclasses.replace(TOY, steps=90)
    condition = experiment.Condition(
        "e", "n", MAIN["CFT rederive"], world, equal_tokens=True
    )
    critiques = experiment.features(Recipe("critique"), work, 0)
    # 4 values, "A", the answer, an end; a critique has "\n", two words more.
    assert experiment._steps(condition, critiques, work) == round(90 * 7 / 10)


# -- training and the cache ------------------------------------------------------------


def test_snapshots_are_the_weights_after_so_many_steps():
    torch.manual_seed(0)
    model = experiment._new_model(TOY_BASE)
    examples = experiment.corpus(TOY_BASE, 0)
    snapshots = Snapshots(model, steps=[6], wanted=3)
    settings = TOY.training(1e-3, 6, 0)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    train(Learner(model), examples, snapshots.loss, settings, collate=PaddingCollator())
    snapshots.take()
    assert list(snapshots.taken) == [2, 4, 6]
    again = experiment._new_model(TOY_BASE)
    again.load_state_dict(start)
    seen = []

    def stop(learner, batch):
        seen.append({k: v.clone() for k, v in again.state_dict().items()})
        return training_loss(learner, batch)

    train(Learner(again), examples, stop, settings, collate=PaddingCollator())
    for name, weight in snapshots.taken[4].items():
        assert torch.equal(weight, seen[4][name])


def test_candidates_are_of_the_last_stage():
    model = experiment._new_model(TOY_BASE)
    snapshots = Snapshots(model, steps=[6, 4], wanted=2)
    batch = PaddingCollator()(experiment.corpus(TOY_BASE, 0)[:2])
    for _ in range(10):
        snapshots.loss(Learner(model), batch)
    snapshots.take()
    assert list(snapshots.taken) == [8, 10]


def test_a_base_is_pretrained_once_and_resumes(check_base):
    check_base(experiment, TOY_BASE)


def test_a_base_has_a_file_for_every_setting_and_seed():
    other = dataclasses.replace(TOY_BASE, mistaken=0.5)
    paths = {
        experiment._base_path(base, seed)
        for base in (TOY_BASE, other)
        for seed in (0, 1)
    }
    assert len(paths) == 4


# -- answers, votes and budgets --------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ends", "answer", "valid"),
    [
        ("2 3 4 5 A 5", True, "5", True),
        ("2 3 4 6 A 6", True, "6", True),  # wrong, but well formed
        ("2 3 4 5 A 5", False, "5", False),
        ("2 3 4 5 A 5\nConclusion: right", True, "5", False),
        ("2 A 3 4 5 A 10", True, "10", False),
        ("2 3 4 A", True, None, False),
        ("2 3 4 5", True, None, False),
        ("A right", True, None, False),
    ],
)
def test_an_answer_is_read_apart_from_its_format(text, ends, answer, valid):
    written = VOCABULARY.encode(text) + [VOCABULARY.end] * ends
    assert evaluation.read_answer(written) == answer
    assert evaluation.is_well_formed("1 + 1 + 1 + 1 + 1", written) == valid


def test_an_unreadable_answer_is_wrong():
    exam = Exam(["1 + 1 + 1 + 1 + 1"] * 3, ["5"] * 3)
    assert evaluation.grade(exam, ["5", None, "6"]).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["3", "4", "4"], "4"),
        (["3", "4"], "3"),
        (["4", "3", "3", "4"], "4"),
        ([None, None, "7"], "7"),
        ([None, None], None),
    ],
)
def test_majority(answers, winner):
    assert evaluation.majority(answers) == winner


@pytest.mark.parametrize(
    ("budget", "spent", "votes"),
    [(21, [7, 7, 7, 7], 3), (20, [7, 7, 7], 2), (3, [7, 7], 1), (14, [7, 7], 2)],
)
def test_votes_never_cost_more_than_the_budget(budget, spent, votes):
    assert evaluation.votes_within(budget, spent) == votes


class Script:
    """Stands in for a model: writes the given texts in order, and notes the prompts."""

    def __init__(self, *rounds):
        self.rounds = list(rounds)
        self.asked = []

    def __call__(self, model, prompts, longest, temperature):
        self.asked.append([VOCABULARY.decode(prompt) for prompt in prompts])
        texts = self.rounds.pop(0)
        assert len(texts) == len(prompts)
        return [[*VOCABULARY.encode(text), VOCABULARY.end] for text in texts]


RIGHT, WRONG = "2 3 4 5 A 5", "2 3 4 6 A 6"


def test_self_critique_answers_again_only_what_it_calls_wrong(monkeypatch):
    exam = Exam(["1 + 1 + 1 + 1 + 1", "2 + 1 + 1 + 1 + 1"], ["5", "6"])
    critique = "{}\nConclusion: {}"
    script = Script(
        [critique.format(RIGHT, "right"), critique.format(RIGHT, "wrong")],
        [WRONG],
        [critique.format(WRONG, "right")],
    )
    monkeypatch.setattr(evaluation, "complete", script)
    first = [[*VOCABULARY.encode(RIGHT), VOCABULARY.end]] * 2
    last, tokens = evaluation.self_critique(None, exam, first, 1.0)
    assert [VOCABULARY.decode(written) for written in last] == [RIGHT, WRONG]
    assert tokens == 2 * 7 + 2 * 10 + 7 + 10
    assert script.asked[0][0] == f"1 + 1 + 1 + 1 + 1 = {RIGHT} rederive"
    assert script.asked[1] == ["2 + 1 + 1 + 1 + 1 ="]
    assert script.asked[2] == [f"2 + 1 + 1 + 1 + 1 = {WRONG} rederive"]


def test_the_vote_gets_the_tokens_of_self_critique(monkeypatch):
    exam = Exam(["1 + 1 + 1 + 1 + 1"], ["5"])
    script = Script(
        [WRONG],
        [f"{RIGHT}\nConclusion: wrong"],
        [WRONG],
        [f"{WRONG}\nConclusion: right"],
        *[[RIGHT]] * 4,
    )
    monkeypatch.setattr(evaluation, "complete", script)
    metrics = evaluation.compare(None, exam, 1.0)
    # 7 + 10 + 7 + 10 = 34 tokens pay for four answers of 7: one wrong, three right.
    assert metrics["self-critique tokens"].value == 34
    assert metrics["majority tokens"].value == 28
    assert [
        metrics[name].value for name in ("direct", "self-critique", "majority")
    ] == [
        0,
        0,
        1,
    ]


def test_completions_equal_greedy_steps_whatever_the_padding():
    torch.manual_seed(0)
    model = experiment._new_model(TOY_BASE).eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    written = evaluation.complete(model, prompts, 4)
    for prompt, tokens in zip(prompts, written, strict=True):
        ids = list(prompt)
        for token in tokens:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
        assert len(tokens) == 4 or tokens[-1] == VOCABULARY.end
