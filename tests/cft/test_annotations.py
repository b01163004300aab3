"""GSM8K's annotations: arithmetic, corruption, and what it carries along."""

import contextlib
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlib.cft import annotations
from ftlib.cft.annotations import (
    KINDS,
    RefusedError,
    calculations,
    checks,
    corrupt,
    corrupt_all,
    evaluate,
    worked,
)
from ftlib.cft.critiques import first_wrong_step, write_critique, write_wrong_critique
from ftlib.cft.solutions import GSM8K
from ftlib.data import DataUnavailable, gsm8k

QUESTION = "Janet's ducks lay 16 eggs. She eats three and bakes with four, sells at $5."
ANSWER = (
    "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\n"
    "She makes 9 * 5 = $<<9*5=45>>45 a day.\n"
    "#### 45"
)


@pytest.fixture(scope="module")
def rows():
    try:
        return gsm8k("test")
    except DataUnavailable as error:
        pytest.skip(str(error))


# Arithmetic

numbers = st.one_of(
    st.integers(0, 999).map(lambda n: (str(n), Fraction(n))),
    st.integers(0, 999).map(lambda n: (f"{n / 100:.2f}", Fraction(n, 100))),
    st.integers(0, 99).map(lambda n: (f".{n:02d}", Fraction(n, 100))),
)


def joined(left, sign, right):
    """Both in parentheses, so that the tree is the text's only reading."""
    (a, x), (b, y) = left, right
    if sign == "/" and y == 0:
        sign = "+"
    value = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if y else x}[sign]
    return f"({a}){sign}({b})", value


expressions = st.recursive(
    numbers,
    lambda inner: st.builds(joined, inner, st.sampled_from("+-*/"), inner),
    max_leaves=6,
).filter(lambda e: len(e[0]) <= annotations.MAX_EXPRESSION)


@given(expressions)
def test_parentheses_decide(expression):
    text, value = expression
    assert evaluate(text) == value


@given(
    st.lists(st.integers(1, 99), min_size=2, max_size=8),
    st.lists(st.sampled_from("+-*/"), min_size=7, max_size=7),
)
def test_precedence_without_parentheses(values, signs):
    """Products first, from left to right, then sums from left to right."""
    terms, term = [], Fraction(values[0])
    for sign, value in zip(signs, values[1:], strict=False):
        if sign in "*/":
            term = term * value if sign == "*" else term / value
        else:
            terms.append(term)
            term = Fraction(value if sign == "+" else -value)
    text = str(values[0]) + "".join(
        f"{sign} {value}" for sign, value in zip(signs, values[1:], strict=False)
    )
    assert evaluate(text) == sum(terms) + term


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-48+21+(-3)", Fraction(-30)),
        ("2--3", Fraction(5)),
        ("20*.01*20", Fraction(4)),
        ("3/4", Fraction(3, 4)),
        (" 1 / 3 ", Fraction(1, 3)),
        ("0.1+0.2", Fraction(3, 10)),
    ],
)
def test_values_are_exact(text, value):
    assert evaluate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "()",
        "1+",
        "*2",
        "1 2",
        "560//10",
        "2**9",
        "(1",
        "1)",
        "1e9",
        "0x1f",
        "1,000",
        "x",
        "__import__('os')",
        "1/0",
        "1/(2-2)",
        "²",
        "1.",
        "9" * 101,
        "(" * 50 + ")" * 51,
    ],
)
def test_what_is_not_arithmetic_is_an_error(text):
    with pytest.raises(ValueError, match=r"not arithmetic|characters"):
        evaluate(text)


def test_the_deepest_expression_is_no_deeper_than_the_stack():
    assert evaluate("(" * 49 + "7" + ")" * 49) == 7
    assert evaluate("-" * 99 + "7") == -7


@given(st.text(alphabet="0123456789.+-*/() ", max_size=40))
def test_any_text_is_a_value_or_a_value_error(text):
    with contextlib.suppress(ValueError):
        assert isinstance(evaluate(text), Fraction)


# Reading


def test_an_answer_reads_as_prose():
    solution = worked(QUESTION, ANSWER)
    assert solution.text(GSM8K) == (
        "Janet sells 16 - 3 - 4 = 9 duck eggs a day.\nShe makes 9 * 5 = $45 a day.\n"
        "#### 45"
    )
    assert [step.claim for step in solution.steps] == ["9", "45"]
    with pytest.raises(ValueError, match="ends with a line '#### …', not 'No end'"):
        worked(QUESTION, "No end")


def test_a_wrong_annotation_does_not_check():
    wrong = ANSWER.replace("<<9*5=45>>", "<<9*5=44>>")
    assert [checks(wrong, each) for each in calculations(wrong)] == [True, False]


def test_all_annotations_of_the_test_split_check(rows):
    found = [
        checks(row["answer"], each)
        for row in rows
        for each in calculations(row["answer"])
    ]
    assert len(found) == 4282
    assert all(found)


# Corruption


def corruptions(kind):
    """Every way the example can go wrong in some kind."""
    return {corrupt(QUESTION, ANSWER, seed, [kind]) for seed in range(200)}


def test_a_slip_is_carried_on():
    texts = {each.response.text(GSM8K) for each in corruptions("result")}
    assert (
        "Janet sells 16 - 3 - 4 = 8 duck eggs a day.\nShe makes 8 * 5 = $40 a day.\n"
        "#### 40"
    ) in texts
    assert (
        "Janet sells 16 - 3 - 4 = 9 duck eggs a day.\nShe makes 9 * 5 = $46 a day.\n"
        "#### 46"
    ) in texts


def test_a_wrong_operator_is_carried_on():
    found = corruptions("operator")
    annotated = {each.annotated for each in found}
    assert (
        "Janet sells 16 + 3 - 4 = <<16+3-4=15>>15 duck eggs a day.\n"
        "She makes 15 * 5 = $<<15*5=75>>75 a day.\n#### 75"
    ) in annotated
    eggs = {text.partition(">>")[0].partition("<<")[2] for text in annotated}
    # Neither 16 / 3 − 4 nor 16 − 3 / 4 eggs: those are not whole.
    assert eggs == {"16-3-4=9", "16+3-4=15", "16*3-4=44", "16-3+4=17", "16-3*4=4"}


def test_a_wrong_operand_is_one_of_the_questions():
    found = corruptions("operand")
    for each in found:
        numbers = map(Fraction, re.findall(r"\d+", each.annotated.split("=")[0]))
        assert set(numbers) <= {16, 3, 4, 5}
    assert any("16 - 5 - 4 = <<16-5-4=7>>7" in each.annotated for each in found)
    assert any("9 * 16 = $<<9*16=144>>144" in each.annotated for each in found)


REFUSALS = [
    (
        "Of 20 pupils 11 are girls. 9 leave.",
        "20-11=<<20-11=9>>9 boys\n20-9=<<20-9=11>>11 stay\n#### 9",
        "the answer does not follow from the wrong value",
    ),
    ("How many?", "Some: 3*4=12\n#### 12", "there are no annotations"),
    ("How many?", "3*4=<<3*4=13>>13\n#### 13", "an annotation does not check"),
    ("How many?", "3**4=<<3**4=81>>81\n#### 81", "an annotation is not arithmetic"),
    ("How many?", "3*4=<<3*4=12>>\n#### 12", "the prose does not show a result"),
    ("How many?", "3*4=<<3*4=12>>12\n#### 1e99", "the answer is not a number"),
    ("3*4?", "<<3*4=12>>12\n#### 13", "the answer is no annotation's result"),
    ("3*4?", "<<3*4=12>>12, so twelve\n#### 12", "a result is mentioned in words"),
    ("3*4?", "<<3*4=12>>12 is the 12th\n#### 12", "ordinal or a time"),
    ("3*4?", "<<3*4=12>>12 = 6 + 6\n#### 12", "a calculation without annotation"),
    ("3*4, or 12?", "<<3*4=12>>12, yes, 12\n#### 12", "another source"),
]


@pytest.mark.parametrize(("question", "answer", "reason"), REFUSALS)
def test_what_would_be_a_guess_is_refused(question, answer, reason):
    with pytest.raises(RefusedError, match=re.escape(reason)):
        corrupt(question, answer, 0, ["result"])


@pytest.mark.parametrize(
    ("later", "reason"),
    [
        ("200*.4=$<<200*.4=80>>80", "in another form"),
        ("40+777=<<40+777=817>>817", "has no known source"),
    ],
)
def test_a_wrong_value_in_disguise_is_refused(later, reason):
    """Of the two calculations only the later one can go wrong."""
    final = later.rpartition(">>")[2]
    answer = f"80-40=<<80-40=40>>40 percent\n{later}\n#### {final}"
    for seed in range(20):
        done = corrupt("Of 200, 80 less 30?", answer, seed, ["result"])
        assert done.annotated.startswith("80-40=<<80-40=40>>40")
    item = annotations._Item("Of 200, 80 less 30?", answer)
    with pytest.raises(RefusedError, match=reason):
        annotations._carried_on(item, 0, {}, Fraction(41))


def test_kinds_and_seeds_give_the_same_every_time():
    assert corrupt(QUESTION, ANSWER, 7) == corrupt(QUESTION, ANSWER, 7)
    assert {corrupt(QUESTION, ANSWER, seed).kind for seed in range(30)} == set(KINDS)


def test_numbers_keep_their_manner():
    assert annotations._like("1,200.00", Fraction(98765, 4)) == "24,691.25"
    assert annotations._like("4.50", Fraction(11, 2)) == "5.50"
    assert annotations._like("12", Fraction(1000)) == "1000"
    assert annotations._like("1.5", Fraction(30)) == "30"
    assert annotations._cardinals("Twenty-five or three hundred") == {20, 5, 25, 3, 100}


def values_of(answer):
    return [each.value for each in calculations(answer)]


def value_of(text):
    return Fraction(text.replace(",", ""))


def operands_of(expression):
    return [Fraction(text) for text in re.findall(r"\d*\.\d+|\d+", expression)]


def expressions_of(answer):
    return [answer[each.start : each.equals] for each in calculations(answer)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_wrong_value_is_carried_on_in_real_answers(rows, kind):
    """Every annotation worked out anew from the wrong value, by plain substitution."""
    answers = {row["question"]: row["answer"] for row in rows}
    done, refused = corrupt_all(rows, seed=0, kinds=[kind])
    assert len(done) + sum(refused.values()) == len(rows)
    assert len(done) > 1100
    for each in done:
        right = answers[each.reference.question]
        old, new = values_of(right), values_of(each.annotated)
        before, after = expressions_of(right), expressions_of(each.annotated)
        first = next(i for i in range(len(old)) if old[i] != new[i])
        # Nothing changes before the mistake, and the mistake is of its kind.
        assert before[:first] == after[:first]
        assert (evaluate(after[first]) == new[first]) == (kind != "result")
        assert (before[first] == after[first]) == (kind == "result")
        # Afterwards every wrong number is used, and every result follows.
        wrong = {old[first]: new[first]}
        for i in range(first + 1, len(old)):
            carried = [wrong.get(x, x) for x in operands_of(before[i])]
            assert operands_of(after[i]) == carried
            assert evaluate(after[i]) == new[i]
            if old[i] != new[i]:
                wrong[old[i]] = new[i]
        final, stated = value_of(each.reference.answer), value_of(each.response.answer)
        assert stated == wrong[final] == new[len(old) - 1 - old[::-1].index(final)]


def test_the_prose_follows_in_real_answers(rows):
    """Words stay; of the numbers, those change that repeat a wrong result."""
    done, _ = corrupt_all(rows, seed=1, kinds=["result"])
    number = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+")
    repeated = 0
    for each in done:
        given = {value_of(text) for text in number.findall(each.reference.question)}
        wrong = {}
        for right, step in zip(each.reference.steps, each.response.steps, strict=True):
            assert number.sub("N", right.text) == number.sub("N", step.text)
            if right.claim != step.claim:
                wrong[value_of(right.claim)] = value_of(step.claim)
            texts = number.findall(right.text), number.findall(step.text)
            for old, new in zip(
                *(map(value_of, found) for found in texts), strict=True
            ):
                if old not in given:
                    assert new == wrong.get(old, old)
                elif old != new:
                    assert new == wrong[old]
                repeated += old != new
    assert repeated > 1.5 * len(done)


def test_critiques_of_real_answers(rows):
    done, _ = corrupt_all(rows[:200], seed=0)
    for each in done:
        index = first_wrong_step(each.response, each.reference)
        right, wrong = each.reference.steps[index], each.response.steps[index]
        fix = write_critique("fix", each.response, each.reference, GSM8K)
        assert fix == (
            f"Step {index + 1} is wrong: {wrong.text}\nIt should be: {right.text}\n"
            "Conclusion: wrong"
        )
        rederived = write_critique("rederive", each.response, each.reference, GSM8K)
        assert rederived == f"{each.reference.text(GSM8K)}\nConclusion: wrong"
        bad = write_wrong_critique(
            "rederive", each.response, each.reference, each.response, GSM8K
        )
        assert bad == f"{each.response.text(GSM8K)}\nConclusion: right"
