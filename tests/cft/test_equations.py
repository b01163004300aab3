"""Linear equations and two ways to get them wrong, all 6,720 of them."""

from fractions import Fraction

import pytest

from ftlib.cft import equations
from ftlib.cft.critiques import first_wrong_step, is_right
from ftlib.cft.equations import Equation, solve
from ftlib.cft.solutions import EQUATION
from ftlib.splits import split_of

ALL = list(equations.equations())
EXAMPLE = Equation(factor=3, shift=5, root=5)


@pytest.mark.parametrize(
    ("misconceptions", "text"),
    [
        ((), "3x = 20 - 5 = 15\nx = 15 / 3 = 5\nAnswer: 5"),
        (("sign",), "3x = 20 + 5 = 25\nx = 25 / 3 = 25/3\nAnswer: 25/3"),
        (("difference",), "3x = 20 - 5 = 15\nx = 15 - 3 = 12\nAnswer: 12"),
        (("sign", "difference"), "3x = 20 + 5 = 25\nx = 25 - 3 = 22\nAnswer: 22"),
    ],
)
def test_the_steps(misconceptions, text):
    assert EXAMPLE.question == "Solve 3x + 5 = 20."
    assert solve(EXAMPLE, misconceptions).text(EQUATION) == text


def test_a_negative_shift():
    equation = Equation(factor=2, shift=-7, root=-1)
    assert equation.question == "Solve 2x - 7 = -9."
    assert solve(equation).steps[0].text == "2x = -9 + 7 = -2"
    assert solve(equation, ["sign"]).steps[0].text == "2x = -9 - 7 = -16"


def test_right_solutions_solve_their_equations():
    for a, b, x in ALL:
        solution = solve(Equation(a, b, x))
        assert a * int(solution.answer) + b == Equation(a, b, x).total
        assert solution.answer == str(x)


def test_the_sign_is_wrong_at_the_first_step_always():
    for equation in ALL:
        mistaken = solve(equation, ["sign"])
        a, b, x = equation
        assert Fraction(mistaken.answer) == x + Fraction(2 * b, a)
        assert first_wrong_step(mistaken, solve(equation)) == 0
        assert equations.is_gap(equation, ["sign"])


def test_the_difference_is_wrong_at_the_second_step_but_once():
    """2x = 4 is solved by 4 − 2, too; there are 40 shifts to write it with."""
    harmless = [e for e in ALL if not equations.is_gap(e, ["difference"])]
    assert {(e.factor, e.root) for e in harmless} == {(2, 2)}
    assert len(harmless) == 40
    for equation in ALL:
        mistaken = solve(equation, ["difference"])
        assert int(mistaken.answer) == equation.factor * (equation.root - 1)
        expected = None if equation in harmless else 1
        assert first_wrong_step(mistaken, solve(equation)) == expected
        assert is_right(mistaken, solve(equation)) == (equation in harmless)


def test_samples_are_of_their_split_and_seed():
    sample = equations.sample(200, "train", seed=0)
    assert len(set(sample)) == 200
    assert {split_of(e.question) for e in sample} == {"train"}
    assert sample == equations.sample(200, "train", seed=0)
    assert sample != equations.sample(200, "train", seed=1)
    assert len({e.question for e in ALL}) == len(ALL) == 6720


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'test' has 839 equations, not 9999"):
        equations.sample(9999, "test", seed=0)
    with pytest.raises(ValueError, match="no misconception 'luck'"):
        solve(EXAMPLE, ["luck"])
