"""Chains modulo 11 against plain integer arithmetic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlib.cft import chains
from ftlib.cft.chains import MISCONCEPTIONS, QUESTIONS, SHORT_FACTOR, Vocabulary
from ftlib.cft.critiques import write_critique
from ftlib.cft.solutions import CHAIN, Solution
from ftlib.splits import split_of

FORMS = ("verdict", "locate", "fix", "rederive")
EVERY = tuple(MISCONCEPTIONS)
WRONG = {
    ("short factor", "*"): lambda v, a: v * (a - 1) if a >= 7 else v * a,
    ("turned difference", "-"): lambda v, a: a - v if a >= 7 else v - a,
    ("carry of ten", "+"): lambda v, a: v + a - 10 if v + a > 10 else v + a,
}
RIGHT = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
codes = st.integers(0, QUESTIONS - 1)
names = st.lists(st.sampled_from(EVERY), unique=True)


def by_hand(question, misconceptions=()):
    """Work out a question's text, one operation at a time."""
    first, *rest = question.split()
    value, values = int(first), []
    for sign, operand in zip(rest[::2], rest[1::2], strict=True):
        operation = RIGHT[sign]
        for name in misconceptions:
            operation = WRONG.get((name, sign), operation)
        value = operation(value, int(operand)) % 11
        values.append(value)
    return values


def one(code):
    return chains.numbered(np.array([code]))


@given(codes, names)
def test_values_are_those_worked_by_hand(code, misconceptions):
    chain = one(code)
    question = chain.questions()[0]
    assert chains.solve(chain, misconceptions)[0].tolist() == by_hand(
        question, misconceptions
    )


def test_every_single_step_of_every_misconception():
    for sign, operation in enumerate(chains.OPERATIONS):
        value, operand = (axis.ravel() for axis in np.mgrid[0:11, 1:11])
        ones = np.ones((110, 3), np.int64)
        chain = chains.Chains(
            value,
            np.column_stack([np.full(110, sign), 2 * ones]),  # Then three times × 1.
            np.column_stack([operand, ones]),
        )
        for name in EVERY:
            rule = WRONG.get((name, operation), RIGHT[operation])
            pairs = zip(value.tolist(), operand.tolist(), strict=True)
            expected = [rule(v, a) % 11 for v, a in pairs]
            assert (chains.solve(chain, [name]) == np.array(expected)[:, None]).all()


def test_the_example_of_the_module():
    example = "3 * 8 + 5 - 2 * 7"
    assert by_hand(example) == [2, 7, 5, 2]
    assert by_hand(example, SHORT_FACTOR) == [10, 4, 2, 1]


def test_numbers_and_questions_are_one_to_one():
    sample = np.random.default_rng(0).choice(QUESTIONS, 20_000, replace=False)
    numbered = chains.numbered(sample)
    assert len(set(numbered.questions())) == 20_000
    assert numbered.operands.min() == 1
    assert numbered.operands.max() == 10
    assert set(numbered.start.tolist()) == set(range(11))


@given(codes, names)
def test_gaps_are_wrong_answers_and_no_gaps_meet_nothing(code, misconceptions):
    chain = one(code)
    question = chain.questions()[0]
    right, wrong = by_hand(question), by_hand(question, misconceptions)
    assert chains.is_gap(chain, misconceptions)[0] == (right[-1] != wrong[-1])
    first, *rest = question.split()
    met = False
    for value, sign, a in zip(
        [int(first), *right], rest[::2], map(int, rest[1::2]), strict=False
    ):
        met |= sign == "*" and a >= 7 and "short factor" in misconceptions
        met |= sign == "-" and a >= 7 and "turned difference" in misconceptions
        met |= sign == "+" and value + a >= 11 and "carry of ten" in misconceptions
    assert chains.is_no_gap(chain, misconceptions)[0] == (not met)


@pytest.mark.parametrize("split", ["pretrain", "train", "validation", "test"])
@pytest.mark.parametrize("kind", ["gap", "no-gap", "any"])
def test_samples_are_of_their_split_and_kind(split, kind):
    sample = chains.sample(500, split, kind, seed=1, misconceptions=EVERY)
    questions = sample.questions()
    assert len(set(questions)) == len(sample) == 500
    assert {split_of(question) for question in questions} == {split}
    if kind != "any":
        same = [by_hand(q) == by_hand(q, EVERY) for q in questions]
        assert same == [kind == "no-gap"] * 500


def test_a_seed_is_a_sample():
    first, again, other = (
        chains.sample(50, "test", "gap", seed).questions() for seed in (3, 3, 4)
    )
    assert first == again != other


def test_splits_are_disjoint_and_a_sample_is_uniform():
    sample = chains.sample(5000, "train", "any", seed=0)
    train = set(sample.questions())
    assert not train & set(chains.sample(5000, "test", "any", seed=0).questions())
    shares = np.bincount(sample.operands.ravel(), minlength=11)[1:] / 20_000
    assert np.abs(shares - 0.1).max() < 5 * np.sqrt(0.09 / 20_000)


def test_a_sample_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match=r"found 0 of 5 'gap' questions in 'test'"):
        chains.sample(5, "test", "gap", seed=0, misconceptions=())
    with pytest.raises(ValueError, match="no kind 'some'"):
        chains.sample(5, "test", "some", seed=0)
    with pytest.raises(ValueError, match="no misconception 'guess'"):
        chains.solve(one(0), ["guess"])


def test_a_slip_is_one_step_and_a_wrong_answer():
    sample = chains.sample(3000, "train", "any", seed=0)
    right, slipped = chains.solve(sample), chains.slip(sample, seed=0)
    assert (slipped[:, -1] != right[:, -1]).all()
    first = (slipped != right).argmax(1)
    assert set(first.tolist()) == {0, 1, 2, 3}
    for question, values, at in zip(
        sample.questions(), slipped.tolist(), first.tolist(), strict=True
    ):
        rest = question.split()[1 + 2 * (at + 1) :]
        follows = by_hand(" ".join([str(values[at]), *rest]))
        assert values[at + 1 :] == follows


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_attempts_are_mistaken_as_often_as_asked(probability):
    gaps = chains.sample(5000, "train", "gap", seed=0)
    values = chains.attempt(gaps, probability, seed=0)
    wrong = (values == chains.solve(gaps, SHORT_FACTOR)).all(1)
    right = (values == chains.solve(gaps)).all(1)
    assert (wrong ^ right).all()
    assert abs(wrong.mean() - probability) <= 5 * np.sqrt(
        probability * (1 - probability) / 5000
    )


def test_a_probability_is_between_zero_and_one():
    with pytest.raises(ValueError, match=r"a probability, not 1\.5"):
        chains.attempt(one(0), 1.5, seed=0)


@given(codes, names)
def test_solutions_are_written_and_read_again(code, misconceptions):
    chain = one(code)
    solution = chains.solutions(chain, chains.solve(chain, misconceptions))[0]
    values = by_hand(solution.question, misconceptions)
    text = solution.text(CHAIN)
    assert text == " ".join(map(str, values)) + f" A {values[-1]}"
    assert chains.read(solution.question, text) == solution


@pytest.mark.parametrize("text", ["", "A 2", "2 7 5", "2 A 2 A", "2 x A 2", "Step 1"])
def test_what_is_no_solution_is_read_as_an_empty_one(text):
    assert chains.read("?", text) == Solution("?", (), "")


@given(codes, st.sampled_from(FORMS))
def test_tokens_give_the_text_back(code, form):
    chain = one(code)
    reference = chains.solutions(chain, chains.solve(chain))[0]
    responses = chains.solutions(chain, chains.solve(chain, EVERY))
    responses.append(Solution(reference.question, (), ""))
    vocabulary = Vocabulary()
    for response in responses:
        for text in (
            response.question,
            response.text(CHAIN),
            write_critique(form, response, reference, CHAIN),
        ):
            ids = vocabulary.encode(text)
            padded = [*ids, vocabulary.end, 5, vocabulary.pad]
            assert vocabulary.decode(padded) == text


def test_a_solution_takes_six_tokens():
    assert len(Vocabulary().encode("2 7 5 2 A 2")) == 6
    assert len(Vocabulary()) == len(set(Vocabulary().words)) < 64


def test_a_prompts_words_are_added():
    vocabulary = Vocabulary(["Is this right?\nSay it."])
    assert vocabulary.decode(vocabulary.encode("Say it.\n2")) == "Say it.\n2"
    with pytest.raises(ValueError, match=r"'it\.' in 'Say it\.' has no token"):
        Vocabulary(["Say"]).encode("Say it.")
