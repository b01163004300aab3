"""The real language model's experiment, on a toy of the same kind."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_models import CHATML, CHATML_TOKENS, byte_level_bpe, tiny_llama
from transformers import PreTrainedTokenizerFast

from ftlib import data, results
from ftlib.cft import experiment, gsm8k
from ftlib.cft.annotations import worked
from ftlib.cft.critiques import is_right
from ftlib.cft.data import INSTRUCTION, encode_prompts
from ftlib.cft.evaluation import complete
from ftlib.cft.finetuning import Tuned, strangers
from ftlib.cft.gsm8k import Condition, Exam, Homework, Written
from ftlib.cft.settings import (
    ALL_WEIGHTS,
    GSM8K_LEARNING_RATES,
    LORA,
    REAL_WORLD,
    TRIED_GSM8K_LEARNING_RATES,
    TRIED_LORA_LEARNING_RATES,
    Gsm8kSettings,
)
from ftlib.cft.solutions import GSM8K
from ftlib.data import DataUnavailable
from ftlib.data import gsm8k as load_gsm8k
from ftlib.experiments import load_plan, run_plan
from ftlib.metrics import Grade, grade
from ftlib.outcomes import outcomes
from ftlib.results import Metric, NotRecordedError, read


def row(a, b, c):
    return {
        "question": f"Ann has {a} nuts and finds {b} bags of {c}. How many has she?",
        "answer": f"She finds {b} * {c} = <<{b}*{c}={b * c}>>{b * c} nuts.\n"
        f"She has {a} + {b * c} = <<{a}+{b * c}={a + b * c}>>{a + b * c} nuts.\n"
        f"#### {a + b * c}",
        "reference": str(a + b * c),
    }


TRAIN = [
    *(row(10 + i, 3 + i % 5, 40 + i) for i in range(24)),
    {"question": "How many is one?", "answer": "It is 1.\n#### 1", "reference": "1"},
]
TEST = {
    "gsm8k": [row(60 + i, 4, 7 + i) for i in range(5)],
    "svamp": [{"question": "What is 2 + 3?", "reference": "5"}] * 3,
    "math-500": [{"question": "Half of $1$?", "reference": r"\frac{1}{2}"}] * 2,
}
TOY = Gsm8kSettings(
    validation=4,
    max_length=400,
    steps=4,
    batch_size=4,
    checkpoints=2,
    rank=2,
    alpha=4,
    answer_tokens=6,
    math_tokens=9,
    round_tokens=4,
    cache_tokens=500,
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A Llama of a few thousand random weights, under a real model's short name."""
    folder = tmp_path_factory.mktemp("models") / TOY.model
    corpus = [one["question"] + one["answer"] for one in TRAIN]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe([*corpus, INSTRUCTION], CHATML_TOKENS, 360),
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    model = tiny_llama(len(tokenizer), tie_word_embeddings=True, **ids)
    model.save_pretrained(folder)
    return folder.parent


@pytest.fixture(autouse=True)
def _toy_world(model_folder, monkeypatch):
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(model_folder))
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(
        data, "gsm8k", lambda split: TRAIN if split == "train" else TEST["gsm8k"]
    )
    monkeypatch.setattr(data, "svamp", lambda: TEST["svamp"])
    monkeypatch.setattr(data, "math500", lambda: TEST["math-500"])
    gsm8k.homework.cache_clear()


@pytest.fixture
def _graded_here(monkeypatch):
    """Without a process of its own, which takes a second to start."""
    monkeypatch.setattr(gsm8k, "grade_all", lambda *pairs: list(map(grade, *pairs)))


def condition(name, world=TOY):
    return Condition(name, (ALL_WEIGHTS | LORA)[name], world, name in LORA)


# -- the plan --------------------------------------------------------------------------


def test_the_plan_at_scale_gpu():
    arms = load_plan("cft", "gpu")
    compared = [arm for arm in arms if arm.experiment == "gsm8k"]
    tuning = [arm for arm in arms if arm.experiment == "gsm8k-learning-rate"]
    assert [arm.name for arm in compared] == [*ALL_WEIGHTS, *LORA]
    assert len(arms) == len(compared) + len(tuning) == len({str(arm) for arm in arms})
    for arm in arms:
        assert arm.requires == ["smollm2-135m"]
        assert arm.settings["steps"] == REAL_WORLD.steps
        tested = "math/gsm8k/test.jsonl" in arm.data
        assert "math/gsm8k/train.jsonl" in arm.data
        assert tested == (arm.experiment == "gsm8k")
        assert len(arm.data) == (4 if tested else 1)
    assert "gsm8k" not in {arm.experiment for arm in load_plan("cft", "cpu")}


def test_arms_differ_only_in_what_they_name():
    named = {"arm", "recipe", "lora", "learning_rate"}
    for arm in gsm8k.gsm8k_arms():
        shared = {k: v for k, v in arm.settings.items() if k not in named}
        assert shared == dataclasses.asdict(REAL_WORLD)
        lora = arm.settings["lora"]
        assert lora == arm.name.startswith("LoRA")
        tried = TRIED_LORA_LEARNING_RATES if lora else TRIED_GSM8K_LEARNING_RATES
        is_base = arm.settings["recipe"] is None
        assert arm.settings["learning_rate"] in ([0] if is_base else tried)


def test_learning_rates_are_the_best_of_the_records(best_rates):
    """Without records there is nothing yet that the rates could follow."""
    try:
        tuning = results.load("cft", "gpu").select(experiment="gsm8k-learning-rate")
    except NotRecordedError:
        pytest.skip("cft is not recorded at scale gpu yet")
    assert best_rates(tuning, "arm") == GSM8K_LEARNING_RATES


def test_the_gpu_scale_runs_unattended_on_any_device(monkeypatch, tmp_path):
    """What `make gpu` runs, at toy size: one arm of every kind, with its records."""
    monkeypatch.setattr(experiment, "gsm8k_arms", lambda: gsm8k.gsm8k_arms(TOY))
    tuning = "CFT shuffled response 0.0001"
    names = ["base", "SFT verified", "LoRA CFT rederive", tuning]

    def ran():
        return run_plan("cft", "gpu", [3], arms=names, directory=tmp_path)

    recorded = ran()
    stored = read(tmp_path / "cft" / "gpu.json")
    assert [record.key for record in stored] == [record.key for record in recorded]
    by_arm = {record.arm: record.metrics for record in recorded}
    assert set(by_arm) == set(names)
    assert set(by_arm.pop(tuning)) == {"validation", "step"}
    for metrics in by_arm.values():
        for name, problems in TEST.items():
            right = outcomes(metrics, name)
            assert len(right) == len(problems) == metrics[name].n
            assert right.mean() == metrics[name].value
            for share in ("", " ended", " parsed", " announced", " critique"):
                assert 0 <= metrics[f"last {name}{share}"].value <= 1
        assert metrics["refused"] == Metric(1 / 25, 25)
        assert metrics["validation"].n == TOY.validation
    assert by_arm["base"]["steps"].value == by_arm["base"]["examples"].value == 0
    assert by_arm["LoRA CFT rederive"]["examples"].value == 20
    assert by_arm["SFT verified"]["examples"].value < 20
    before = (tmp_path / "cft" / "gpu.json").read_text()
    ran()  # finds all of it done
    assert (tmp_path / "cft" / "gpu.json").read_text() == before
    assert json.loads(before)["records"]


# -- questions and examples ------------------------------------------------------------


def questions(work):
    return [reference.question for reference in work.references]


def test_no_question_is_trained_on_and_asked(monkeypatch):
    work = gsm8k.homework(TOY, 0)
    asked = set(work.validation.questions)
    assert len(asked) == TOY.validation
    assert not asked & set(questions(work))
    assert len(asked) + len(questions(work)) == len(TRAIN) - 1
    answers = {one["question"]: one["reference"] for one in TRAIN}
    assert [answers[q] for q in work.validation.questions] == work.validation.answers
    # By a hash of its text, wherever in the file it stands.
    monkeypatch.setattr(data, "gsm8k", lambda split: TRAIN[::-1])
    assert gsm8k.homework(TOY, 1).validation == work.validation


def test_gsm8k_itself(monkeypatch):
    """Six hundred of its questions: a seed does not decide which can be made wrong."""
    try:
        rows, test = load_gsm8k("train")[:600], load_gsm8k("test")
    except DataUnavailable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(data, "gsm8k", lambda split: rows)
    world = dataclasses.replace(REAL_WORLD, validation=100)
    works = [gsm8k.homework(world, seed) for seed in (0, 1)]
    assert questions(works[0]) == questions(works[1])
    assert works[0].refused == works[1].refused
    assert works[0].validation == works[1].validation
    asked = {*questions(works[0]), *works[0].validation.questions}
    assert len(asked) == round(600 * (1 - works[0].refused.value)) > 500
    assert not asked & {one["question"] for one in test}
    for work in works:
        pairs = zip(work.responses, work.references, strict=True)
        wrong = [not is_right(*pair) for pair in pairs]
        assert np.mean(wrong) == pytest.approx(world.wrong, abs=0.1)  # 4 deviations


def test_a_seed_decides_which_responses_are_wrong_and_not_the_questions():
    often = dataclasses.replace(TOY, wrong=0.5)
    works = [gsm8k.homework(often, seed) for seed in (0, 1)]
    assert questions(works[0]) == questions(works[1])
    assert works[0].validation == works[1].validation
    wrong = [
        [not is_right(*pair) for pair in zip(w.responses, w.references, strict=True)]
        for w in works
    ]
    assert wrong[0] != wrong[1]
    assert any(
        one != other
        for one, other, *both in zip(
            works[0].responses, works[1].responses, *wrong, strict=True
        )
        if all(both)
    )
    for share in (0.0, 1.0):
        work = gsm8k.homework(dataclasses.replace(TOY, wrong=share), 0)
        pairs = zip(work.responses, work.references, strict=True)
        assert {is_right(*pair) for pair in pairs} == {share == 0}


def test_recipes_differ_as_they_say():
    work = gsm8k.homework(dataclasses.replace(TOY, wrong=0.5), 0)
    made = {
        name: gsm8k.examples(recipe, work, 0)
        for name, recipe in ALL_WEIGHTS.items()
        if recipe
    }
    right = [
        is_right(*pair) for pair in zip(work.responses, work.references, strict=True)
    ]
    assert 0 < sum(right) < len(right)
    asked = questions(work)
    texts = [response.text(GSM8K) for response in work.responses]
    solved = [reference.text(GSM8K) for reference in work.references]
    assert made["SFT noisy"] == list(zip(asked, texts, strict=True))
    assert made["SFT teacher"] == list(zip(asked, solved, strict=True))
    triples = zip(asked, solved, right, strict=True)
    assert made["SFT verified"] == [(q, text) for q, text, ok in triples if ok]
    shown = "{}\n\nQuestion:\n{}\n\nSolution:\n{}".format
    for name in ("CFT locate", "CFT fix", "CFT rederive"):
        prompts = [
            shown(INSTRUCTION, q, text) for q, text in zip(asked, texts, strict=True)
        ]
        assert [prompt for prompt, _ in made[name]] == prompts
    for (_, target), solution, ok in zip(
        made["CFT rederive"], solved, right, strict=True
    ):
        verdict = "right" if ok else "wrong"
        assert target == f"{solution}\nConclusion: {verdict}"
    others = [
        prompt.partition("Solution:\n")[2]
        for prompt, _ in made["CFT shuffled response"]
    ]
    assert sorted(others) == sorted(texts)
    assert all(one != own for one, own in zip(others, texts, strict=True))
    assert [target for _, target in made["CFT shuffled response"]] == [
        target for _, target in made["CFT rederive"]
    ]


@pytest.mark.parametrize("n", [2, 3, 50])
def test_a_stranger_is_never_oneself(n):
    for seed in range(20):
        others = strangers(n, seed)
        assert sorted(others) == list(range(n))
        assert all(index != other for index, other in enumerate(others))


def test_an_example_that_does_not_fit_is_refused():
    _, tokenizer = gsm8k.student(condition("base"), 0)
    recipe = ALL_WEIGHTS["SFT teacher"]
    made = gsm8k.examples(recipe, gsm8k.homework(TOY, 0), 0)
    short = dataclasses.replace(TOY, max_length=60)
    with pytest.raises(ValueError, match="are longer than max_length 60"):
        gsm8k.features(made, tokenizer, short)
    hostile = [made[0]._replace(prompt="<|im_end|>")]
    with pytest.raises(ValueError, match="'control token': 1"):
        gsm8k.features(hostile, tokenizer, TOY)


# -- training --------------------------------------------------------------------------


@pytest.mark.usefixtures("_graded_here")
def test_lora_leaves_the_models_weights():
    one = condition("LoRA SFT teacher")
    model, tokenizer = gsm8k.student(one, 0)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    tuned = gsm8k.fine_tune(one, model, tokenizer, 1e-2, 0)
    adapted = {name for name in before if "lora_" in name}
    assert set(tuned.checkpoints[-1]) == adapted
    # Seven linear layers in each of two blocks, and not the head.
    assert len(adapted) == 2 * 7 * 2
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == (name not in adapted), name


@pytest.mark.usefixtures("_graded_here")
def test_what_writes_is_the_tuned_model():
    """Adapters merged, in a copy; the tuned model itself stays as it is."""
    one = condition("LoRA SFT teacher")
    model, tokenizer = gsm8k.student(one, 0)
    gsm8k.fine_tune(one, model, tokenizer, 1e-1, 0)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits
    with model.disable_adapter():
        assert (model(ids).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(
        gsm8k.writer(model)(ids).logits, expected, rtol=1e-4, atol=1e-4
    )
    assert torch.equal(model(ids).logits, expected)


def test_adapters_begin_as_the_seed_says():
    first, again, other = (
        gsm8k.student(condition("LoRA SFT noisy"), seed)[0].state_dict()
        for seed in (0, 0, 1)
    )
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_the_checkpoint_best_on_validation_is_tested(monkeypatch):
    """And the last one beside it."""
    seen = []
    accuracies = iter([0.25, 0.75, 0.5])

    def examine(model, tokenizer, exams, world):
        weights = next(model.parameters()).detach().clone()
        seen.append((list(exams), weights))
        if "validation" in exams:
            return {"validation": Metric(next(accuracies), 4)}
        return {"gsm8k": Metric(float(len(seen)), 5), "bits/gsm8k/0": Metric(1.0, 5)}

    monkeypatch.setattr(gsm8k, "examine", examine)
    world = dataclasses.replace(TOY, steps=6, checkpoints=3)
    metrics = gsm8k.run(condition("SFT noisy", world), 1e-2, 0)
    assert [len(exams) for exams, _ in seen] == [1, 1, 1, 3, 3]
    weights = [weight for _, weight in seen]
    assert torch.equal(weights[3], weights[1])
    assert torch.equal(weights[4], weights[2])
    assert not torch.equal(weights[1], weights[2])
    assert metrics["validation"].value == 0.75
    assert (metrics["step"], metrics["steps"]) == (4, 6)
    assert metrics["gsm8k"].value == 4
    assert metrics["last gsm8k"].value == 5
    assert "last bits/gsm8k/0" not in metrics


def test_learning_rates_are_tuned_on_seeds_of_their_own(monkeypatch):
    seen = []

    def fine_tune(one, model, tokenizer, rate, seed):
        seen.append((one.name, rate, seed))
        return Tuned(model, [{}], [2], [Metric(0.5, 4)], 4, 0.0)

    monkeypatch.setattr(gsm8k, "fine_tune", fine_tune)
    [arm] = [a for a in gsm8k.gsm8k_arms(TOY) if a.name == "CFT fix 3e-05"]
    assert arm.run(1)["validation"].value == 0.5
    assert seen == [("CFT fix", 3e-5, 1001)]


@pytest.mark.usefixtures("_graded_here")
def test_what_was_learned_is_asked_for(monkeypatch):
    """A model that knows its examples by heart answers their questions in an exam."""
    world = dataclasses.replace(
        TOY, steps=100, checkpoints=1, answer_tokens=80, round_tokens=32
    )
    few = [row(1, 2, 3), row(4, 5, 6), row(7, 8, 9), row(2, 9, 5)]
    solved = [worked(one["question"], one["answer"]) for one in few]
    exam = Exam([s.question for s in solved], [s.answer for s in solved], 80)
    work = Homework(solved, solved, exam, Metric(0.0, 4))
    monkeypatch.setattr(gsm8k, "homework", lambda world, seed: work)
    one = condition("SFT teacher", world)
    model, tokenizer = gsm8k.student(one, 0)
    before = gsm8k.examine(model, tokenizer, {"exam": exam}, world)
    assert before["exam"].value == 0
    gsm8k.fine_tune(one, model, tokenizer, 1e-2, 0)
    after = gsm8k.answer(model, tokenizer, {"exam": exam}, world)
    assert after == [Written(s.text(GSM8K), ended=True) for s in solved]


@pytest.mark.usefixtures("_graded_here", "as_on_a_gpu")
@pytest.mark.parametrize("name", ["CFT rederive", "LoRA CFT rederive"])
def test_passes_are_in_bf16_and_tuned_weights_are_not(monkeypatch, name):
    one = condition(name)
    model, tokenizer = gsm8k.student(one, 0)
    seen = []
    complete_before = gsm8k.complete

    def completed(model, *args, **kwargs):
        seen.append(model.dtype)
        return complete_before(model, *args, **kwargs)

    monkeypatch.setattr(gsm8k, "complete", completed)
    tuned = gsm8k.fine_tune(one, model, tokenizer, 1e-2, 0)
    assert set(seen) == {torch.bfloat16}
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    kept = [weight for one in tuned.checkpoints for weight in one.values()]
    assert {weight.dtype for weight in kept} == {torch.float32}
    assert all(weight.isfinite().all() for weight in kept)


# -- answers ---------------------------------------------------------------------------


def test_scores_of_texts_written_by_hand():
    texts = [
        ("3 + 4 = 7\n#### 7", True),
        ("3 + 4 = 7\n#### 7\nConclusion: right", True),  # right, and a critique
        ("Conclusion: wrong\nIt is so 8", False),
        ("I say nothing", True),
        ("#### 3 +* (", True),
        ("My conclusion: right", True),  # no verdict's wording
        ("#### 7", False),
        ("#### 7", False),
    ]
    written = [Written(*pair) for pair in texts]
    grades = [grade(one.text, "7") for one in written[:-2]]
    grades += [Grade(False, None, "timed out"), Grade(False, None, "crashed")]
    values = {k: m.value for k, m in gsm8k.scores("x", written, grades).items()}
    assert values == {
        "x": 2 / 8,
        "x ended": 5 / 8,
        "x parsed": 3 / 8,
        "x announced": 3 / 8,
        "x critique": 2 / 8,
        "x timed out": 2 / 8,
    }
    assert {m.n for m in gsm8k.scores("x", written, grades).values()} == {8}


def test_every_exam_gets_its_own_answers_and_grades(monkeypatch):
    """Graded as they are recorded: in a process of their own."""
    exams = {
        "one": Exam(["a", "b", "c"], ["1", "2", "3"], 5),
        "other": Exam(["d", "e"], ["4", r"\frac{1}{2}"], 5),
    }
    texts = ["#### 1", "#### 0", "The answer is 3.", "4", r"So \boxed{0.5}"]
    monkeypatch.setattr(
        gsm8k, "answer", lambda *given: [Written(text, ended=True) for text in texts]
    )
    metrics = gsm8k.examine(None, None, exams, TOY)
    assert outcomes(metrics, "one").tolist() == [True, False, True]
    assert outcomes(metrics, "other").tolist() == [True, True]
    assert metrics["one"] == Metric(2 / 3, 3)
    assert metrics["other announced"] == Metric(1 / 2, 2)


def test_answers_are_those_written_one_by_one():
    """Whatever the batches and rounds; each is cut off where its exam says."""
    model, tokenizer = gsm8k.student(condition("base"), 0)
    asked = ["Why?", "How many has Ann?", "A much longer question: " + "so " * 30]
    prompts = encode_prompts(tokenizer, asked * 2)
    longest = [11, 11, 11, 3, 4, 5]
    alone = [
        complete(model, [prompt], n, end=-1)[0]
        for prompt, n in zip(prompts, longest, strict=True)
    ]
    end = alone[0][5]  # some token that one of them comes to write
    expected = [one[: one.index(end) + 1] if end in one else one for one in alone]
    assert len({len(one) for one in expected}) > 2
    for cache_tokens in (1, 150, 10_000):
        world = dataclasses.replace(TOY, cache_tokens=cache_tokens)
        assert gsm8k.write(model, prompts, longest, end, world) == expected


def test_batches_hold_rows_of_one_length_and_no_more_tokens_than_they_may():
    lengths = dict(enumerate(np.random.default_rng(0).integers(1, 100, 200).tolist()))
    lengths[200] = 5000
    found = gsm8k.batches(lengths, 1000)
    assert sorted(i for batch in found for i in batch) == list(range(201))
    assert found[-1] == [200]
    for batch in found[:-1]:
        assert len(batch) * max(lengths[i] for i in batch) <= 1000
    flat = [lengths[i] for batch in found for i in batch]
    assert flat == sorted(flat)
    assert len(found) < 2 * sum(flat[:-1]) / 1000 + 2


def test_a_models_own_generation_settings_are_not_taken():
    model, _ = gsm8k.student(condition("base"), 0)
    plain = complete(gsm8k.writer(model), [[5, 6, 7]], 12, end=-1)
    model.generation_config.repetition_penalty = 5.0
    assert complete(gsm8k.writer(model), [[5, 6, 7]], 12, end=-1) == plain
    assert complete(model, [[5, 6, 7]], 12, end=-1) != plain


def test_an_answer_ends_as_the_chat_template_ends_a_turn():
    _, tokenizer = gsm8k.student(condition("base"), 0)
    tokenizer.eos_token = "<|endoftext|>"
    end = gsm8k.end_of_turn(tokenizer)
    assert tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
