"""Critiques by rule: four forms, right and wrong responses, and none at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlib.cft.critiques import (
    WORDS,
    first_wrong_step,
    is_right,
    read_verdict,
    write_critique,
    write_wrong_critique,
)
from ftlib.cft.solutions import CHAIN, GSM8K, Solution, Step

FORMS = ("verdict", "locate", "fix", "rederive")


def solution(values, answer=None):
    answer = (values.split() or [""])[-1] if answer is None else answer
    return Solution("?", tuple(Step(v, v) for v in values.split()), answer)


REFERENCE = solution("2 7 5 2")
solutions = st.builds(
    lambda values, answer: solution(" ".join(map(str, values)), str(answer)),
    st.lists(st.integers(0, 3), max_size=4),
    st.integers(0, 3),
)
references = solutions.filter(lambda s: s.steps)


def written(response, reference=REFERENCE):
    return [write_critique(form, response, reference, CHAIN) for form in FORMS]


@pytest.mark.parametrize(
    ("response", "located", "correction"),
    [
        (solution("2 8 5 2"), "Step 2 is wrong: 8", "7"),
        (solution("3 8 6 1"), "Step 1 is wrong: 3", "2"),
        (solution("2 7 5", "2"), "Step 4 is missing.", "2"),
        (solution("2 7 5 2 9"), "Step 5 is wrong: 9", "A 2"),
        (solution("2 7 5 2", "3"), "The answer is wrong: A 3", "A 2"),
        (solution("2 7 5 2", ""), "The answer is missing.", "A 2"),
        (solution("", "2"), "There are no steps.", "2"),
        (solution(""), "There are no steps.", "2"),
    ],
)
def test_a_wrong_response(response, located, correction):
    assert written(response) == [
        "Conclusion: wrong",
        f"{located}\nConclusion: wrong",
        f"{located}\nIt should be: {correction}\nConclusion: wrong",
        "2 7 5 2 A 2\nConclusion: wrong",
    ]


def test_a_right_response():
    assert written(REFERENCE) == [
        "Conclusion: right",
        "Every step is right.\nConclusion: right",
        "Every step is right.\nConclusion: right",
        "2 7 5 2 A 2\nConclusion: right",
    ]


def test_the_rederivation_takes_the_tasks_form():
    critique = write_critique("rederive", solution(""), REFERENCE, GSM8K)
    assert critique == "2\n7\n5\n2\n#### 2\nConclusion: wrong"


@given(solutions, references)
def test_the_verdict_is_equality(response, reference):
    verdict = "right" if response == reference else "wrong"
    assert is_right(response, reference) == (response == reference)
    for critique in written(response, reference):
        assert read_verdict(critique) == verdict
        assert critique.count("Conclusion: ") == 1


@given(solutions, references)
def test_the_first_wrong_step_is_where_the_common_prefix_ends(response, reference):
    ours = [step.claim for step in response.steps]
    theirs = [step.claim for step in reference.steps]
    index = first_wrong_step(response, reference)
    if index is None:
        assert ours == theirs
    else:
        assert ours[:index] == theirs[:index]
        assert ours[index : index + 1] != theirs[index : index + 1]


@given(solutions, references)
def test_every_word_is_a_numbers_or_in_the_list(response, reference):
    for critique in written(response, reference):
        assert {w for w in critique.split() if not w.isdigit()} <= {*WORDS, "A"}


@pytest.mark.parametrize(
    "text",
    ["", "Conclusion:", "Step 2 is wrong: 8\nConclusion: wro", "Conclusion: rightly"],
)
def test_a_truncated_critique_has_no_verdict(text):
    assert read_verdict(text) is None


def test_only_the_last_line_is_the_verdict():
    assert read_verdict("Conclusion: right\nConclusion: wrong\n") == "wrong"
    assert read_verdict("Conclusion: right\nor so") is None


def test_a_mistaken_teacher_calls_the_mistake_right():
    mistaken = solution("2 6 4 1")
    wrong = [
        write_wrong_critique(form, mistaken, REFERENCE, mistaken, CHAIN)
        for form in FORMS
    ]
    assert wrong[0] == "Conclusion: right"
    assert wrong[3] == "2 6 4 1 A 1\nConclusion: right"


def test_a_mistaken_teacher_calls_a_right_response_wrong():
    mistaken = solution("2 6 4 1")
    critique = write_wrong_critique("fix", REFERENCE, REFERENCE, mistaken, CHAIN)
    assert critique == "Step 2 is wrong: 7\nIt should be: 6\nConclusion: wrong"


@pytest.mark.parametrize(
    ("form", "mistaken"), [("verdict", solution("2 6 4 1")), ("rederive", REFERENCE)]
)
def test_a_wrong_critique_that_is_right_is_an_error(form, mistaken):
    with pytest.raises(ValueError, match="is right: give another"):
        write_wrong_critique(form, solution("9 9 9 9"), REFERENCE, mistaken, CHAIN)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no form 'praise'"):
        write_critique("praise", REFERENCE, REFERENCE, CHAIN)
    other = REFERENCE._replace(question="another")
    with pytest.raises(ValueError, match="the response is to 'another'"):
        write_critique("verdict", other, REFERENCE, CHAIN)
    with pytest.raises(ValueError, match=r"the reference to '\?' has no steps"):
        write_critique("verdict", REFERENCE, solution("", "2"), CHAIN)
