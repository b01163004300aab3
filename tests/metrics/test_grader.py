import functools
import subprocess
import sys
import time

import pytest
from _judges import number_of_process, slow

from ftlib.metrics import Grade, grade, grade_all, published_rounding_rule


def test_grade_reports_answer_reason_and_rule():
    assert grade(r"so \boxed{\frac{1}{2}}", "0.5") == Grade(
        True, r"\frac{1}{2}", "equal", "boxed"
    )
    assert grade("The answer is 3.", "4") == Grade(False, "3", "different", "phrase")


@pytest.mark.parametrize("text", ["", "   ", "no digits at all", r"\boxed{}", "####"])
def test_no_answer_is_said_so(text):
    assert grade(text, "4") == Grade(False, None, "no answer")


@pytest.mark.parametrize(
    ("answer", "reference", "correct", "reason"),
    [
        ("1/2x", "3", False, "unreadable answer"),
        ("two million", "2000000", False, "different"),  # words
        ("2 million", "2000000", False, "unreadable answer"),
        (r"\frac{dx}{dt} = x", r"\frac{d x}{d t}=x", True, "same text"),
        (r"\frac{dx}{dt} = y", r"\frac{d x}{d t}=x", False, "unreadable reference"),
        ("3", "I(0)", False, "unreadable reference"),
        ("x^{10^{10}}", "3", False, "unreadable answer"),
    ],
)
def test_what_cannot_be_read_is_never_silently_wrong(
    answer, reference, correct, reason
):
    given = grade(rf"\boxed{{{answer}}}", reference)
    assert (given.correct, given.reason) == (correct, reason)


def test_tolerance_is_relative_and_of_the_reference():
    assert not grade("#### 1.61", "1.6").correct
    assert grade("#### 1.61", "1.6", relative_tolerance=0.01).correct
    assert grade(r"#### \frac{\pi}{2}", "1.57", relative_tolerance=0.01).correct
    assert grade(r"#### 4.55 \times 10^{33}", "4.5e33", relative_tolerance=0.02).correct
    assert not grade("#### 1.9e-5", "1.6e-5", relative_tolerance=0.01).correct
    assert not grade("#### 1e-9", "0", relative_tolerance=0.5).correct


# Pairs that the published grader takes for equal, by its own rounding rule.
ROUNDED = [(0.12, 0.14), (0.01, 0.04), (1.6e-5, 1.9e-5), (2e-5, 4e-5)]


@pytest.mark.parametrize(("a", "b"), ROUNDED)
def test_the_published_rounding_rule_and_not_ours(a, b):
    assert published_rounding_rule(a, b)
    assert not grade(f"#### {a}", str(b)).correct
    assert not grade(f"#### {a}", str(b), relative_tolerance=0.01).correct


@pytest.mark.parametrize(("a", "b"), [(12.3, 12.4), (3, 4)])
def test_the_published_rounding_rule_keeps_apart(a, b):
    assert not published_rounding_rule(a, b)


@pytest.mark.parametrize(
    ("a", "b"), [("50", "0.5"), ("0.5", "50"), ("[0,1]", "(0,1)"), ("5000", "50\\%")]
)
def test_the_published_graders_other_pitfalls(a, b):
    assert not grade(rf"\boxed{{{a}}}", b).correct


def test_grade_all_is_grade_in_one_other_process():
    texts = [r"\boxed{3}", "nothing", "#### 1,000", r"\boxed{\frac12}"]
    references = ["3", "3", "1000", "0.25"]
    expected = [grade(t, r) for t, r in zip(texts, references, strict=True)]
    assert grade_all(texts, references) == expected
    processes = grade_all(texts, references, judge=number_of_process)
    assert len({given.extracted for given in processes}) == 1


def test_grade_all_takes_a_partial():
    judge = functools.partial(grade, relative_tolerance=0.05)
    assert grade_all(["#### 1.01"], ["1"], judge=judge)[0].correct


def test_hung_and_dead_items_are_reported_and_the_rest_goes_on():
    texts = ["#### 1", "hang", "#### 2", "die", "raise", "hang", "#### 3"]
    begin = time.monotonic()
    grades = grade_all(texts, ["1"] * len(texts), seconds=0.5, judge=slow)
    assert time.monotonic() - begin < 60
    assert [given.reason for given in grades] == [
        "equal",
        "timed out",
        "different",
        "crashed",
        "crashed",
        "timed out",
        "different",
    ]
    assert [given.correct for given in grades] == [True] + 6 * [False]


def test_grade_all_of_nothing_starts_nothing():
    assert grade_all([], []) == []


def test_grade_all_refuses_bad_arguments():
    with pytest.raises(ValueError, match="shorter"):
        grade_all(["1", "2"], ["1"])
    with pytest.raises(ValueError, match="some time"):
        grade_all(["1"], ["1"], seconds=0)


def run(code: str, folder) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )


def test_grade_all_works_where_main_is_no_file(tmp_path):
    """As in a notebook, whose cells a spawned process cannot import."""
    code = "from ftlib.metrics import grade_all; print(grade_all(['#### 1'], ['1']))"
    done = run(code, tmp_path)
    assert "correct=True" in done.stdout, done.stderr


def test_a_judge_of_main_is_refused(tmp_path):
    code = """
from ftlib.metrics import grade_all
def judge(text, reference): ...
grade_all(["1"], ["1"], judge=judge)
"""
    done = run(code, tmp_path)
    assert "RuntimeError: the grading process did not start" in done.stderr


def test_importing_the_grader_leaves_torch_alone(tmp_path):
    code = "import sys, ftlib.metrics; print('torch' in sys.modules)"
    assert run(code, tmp_path).stdout.strip() == "False"


def test_a_judge_that_cannot_be_imported_is_refused():
    with pytest.raises(Exception, match=r"(?i)pickle"):
        grade_all(["1"], ["1"], judge=lambda text, reference: grade(text, reference))
