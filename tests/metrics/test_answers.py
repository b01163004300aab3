import contextlib
import random
import time
from fractions import Fraction

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.metrics import Found, equal, find_answer, last_boxed, parse_answer
from ftlib.metrics.exact import UnreadableError, Value
from ftlib.metrics.notation import read

EQUAL = r"""
18 | 18.0
18 | 018
18 | +18
-5 | −5
1,234 | 1234
1,234,567.50 | 1234567.5
10,\!080 | 10080
11,\! 111,\! 111,\! 100 | 11111111100
10{,}080 | 10080
10\,080 | 10080
58,500 | 58500
\$18.90 | 18.9
$18.90 | 18.90
\$32,\!348 | 32348
€5 | 5
50\% | 50
50% | 50
50 percent | 50%
90^\circ | 90
90^{\circ} | 90
90° | 90
90 degrees | 90
\frac{270}7\text{ degrees} | 270/7
864 \mbox{ inches}^2 | 864
15\text{ cm}^{2} | 15
5.4 \text{ cents} | 27/5
18 eggs | 18
7 km per hour | 7
5cm | 5
3.5 kg. | 7/2
9.8 m/s^2 | 9.8
9.8 \mathrm{~m} / \mathrm{s}^{2} | 9.8
300 \mathrm{~J} \cdot \mathrm{K}^{-1} | 300
f(x) = 2x+1 | 2x+1
.35625 | 57/160
.0000672 | 6.72e-5
0.5 | 1/2
-1./3 | -\frac13
\frac{14}{3} | \dfrac{14}{3}
\tfrac{14}{3} | 14/3
\frac43 | 4/3
\frac 59 | 5/9
\frac9{19} | 9/19
\frac{1,000}{3} | 1000/3
-\frac{1}{2} | \frac{-1}{2}
\frac{1}{-2} | -0.5
\frac{2}{4} | \frac{1}{2}
1\frac{4}{5} | 9/5
-1\frac{4}{5} | -1.8
137 \frac{1}{2} | 137.5
7 1/2 | 7.5
1.6\times 10^{-5} | 0.000016
1.6 \cdot 10^{-5} | 1.6e-5
1.6 x 10^-5 | 1.6E-5
1.6×10^{-5} | 16*10**-6
4.5e33 | 45 \times 10^{32}
2^{10} | 1024
2^10 | 1024
(-2)^3 | -8
-2^2 | -4
2^{-1} | 0.5
\frac{\frac{1}{2}}{3} | 1/6
3\sqrt{13} | \sqrt{117}
11\sqrt2 | \sqrt{242}
\frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2}
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt3}
\sqrt{2}\sqrt{3} | \sqrt{6}
√13 | \sqrt{13}
2sqrt(3) | \sqrt{12}
\sqrt[3]{8} | 2
\sqrt[3]{-8} | -2
\sqrt[3]{2}\sqrt[3]{4} | 2
8^{2/3} | 4
\sqrt{-4} | 2i
\sqrt{\frac{4}{9}} | 2/3
\frac{1}{1+\sqrt{2}} | \sqrt{2}-1
(1+\sqrt{5})^2 | 6+2\sqrt{5}
11 \sqrt{5} + 11 | 11(1+\sqrt5)
288 \pi | 288π
18+2\pi | 2\pi+18
\frac{20000}{\pi} | 20000 / \pi
2pi | 2\pi
6 - 5i | -5i+6
(1+i)^2 | 2i
\frac{1}{i} | -i
p - q | -q+p
x^5 - x^4 + 1 | 1 + x^5 - x^4
(a+5)(b+2) | ab+2a+5b+10
(x+1)^2 | x^2+2x+1
x(x+1) | x^2+x
2k+2 | 2(k+1)
\frac{11+9a}{20} | \frac{9a}{20}+\frac{11}{20}
\frac{x^2-1}{x-1} | x+1
e^{-2t} | \frac{1}{(e^t)^2}
e^{t}e^{2t} | \exp(3t)
2^{n+1} | 2\cdot 2^n
\sin^2 x | (\sin x)^2
\cos 2x | \cos(2x)
x_1 | x_{1}
\lambda_{\text {red}} | \lambda_{red}
\mathrm{m}c^2 | mc^2
x=5 | 5
5 | y = 5
y = 2x + 3 | 2x+3
y = 2x + 3 | 2x - y + 3 = 0
5x - 7y + 11z + 4 = 0 | -10x + 14y - 22z = 8
x > 2 | 2 < x
x \ge 2 | 2x - 4 >= 0
x \in [-2,7] | [-2,7]
\left( 3, \frac{\pi}{2} \right) | (3,\pi/2)
(6,31,-1) | ( 6 , 31 , -1 )
(-\infty, 0] | (-∞,0]
\left(\frac{3}{5},\frac{8}{3}\right] | (0.6,\frac83]
(0,9) \cup (9,36) | (9,36) ∪ (0,9)
1,-2 | -2, 1
3, 5, 7 | 7,5,3
3, 5, and 7 | 3,5,7
x=1 or x=-2 | 1,-2
x=-2,1 | 1,-2
\{1,2\} | \{2, 1\}
\{1\pm\sqrt{5},-2\} | -2, 1-\sqrt5, 1+\sqrt5
1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
\frac{-1 \pm \sqrt{5}}{2} | \frac{-1-\sqrt5}{2}, \frac{-1+\sqrt5}{2}
x = \pm 3 | 3, -3
\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix} | \begin{bmatrix} 0.2 \\ -3.6 \end{bmatrix}
\begin{pmatrix} -1 & 0 \\ 0 & 2 \end{pmatrix} | \begin{matrix}-1&0\\0&2\\\end{matrix}
\text{Evelyn} | evelyn
\text{(C)} | C
\textbf{(C)} | (C)
no solution | No  solution
52_8 | 52_{8}
\boxed{7} | 7
\(7\) | $7$
\left[ \frac{\pi^2}{8}, 2 \right] | [\pi^2/8,2]
"""

DIFFERENT = r"""
18 | 19
0.12 | 0.14
0.01 | 0.04
1.6e-5 | 1.9e-5
0.00002 | 0.00004
50 | 0.5
0.5 | 50\%
50\% | \frac{1}{2}
5000 | 50
0.3333 | 1/3
3.14 | \pi
3.14159265358979 | \pi
1.4142 | \sqrt{2}
1000000000000000000001 | 1000000000000000000000
[0,1] | (0,1)
(0,1] | [0,1)
(0,1) | \{0,1\}
(1,2) | (2,1)
(1,2) | 1,2
(58,500) | 58500
1,1 | 1
\{1,1,2\} | \{1,2,2\}
1,2 | 1,3
1,2,3 | 1,2
(0,9) \cup (9,36) | (0,36)
1 \pm \sqrt{19} | 1+\sqrt{19}
\sqrt{2}+\sqrt{3} | \sqrt{5}
\sqrt{x^2} | x
\sqrt{x^2} | \sqrt{x}
\sqrt{-x} | \sqrt{x}
\sqrt{-4} | -2
2\pi | 2
x=5 | y=5
x > 2 | x < 2
x \ge 2 | x > 2
x > 2 | -x > -2
y = 2x+3 | y = 2x-3
even | neve
even | odd
(C) | (D)
(C) | c
xy | x+y
x^2 | 2x
x_1 | x_2
2^3 | 2\cdot 3
x | X
e | 2.718281828
i | 1
52_8 | 42
52_8 | 52
52_8 | 52_9
-2^2 | 4
1\frac{4}{5} | 4/5
\sin x | \cos x
\sin^2 x | \sin(x^2)
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 & 2 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | (1,2)
\frac{1}{x} | x
(-\infty, 0] | (-\infty, 0)
y' | y
300 K | 300
f(x) = 2x | g(x) = 2x
"""

UNREADABLE = r"""

\frac{1}{0}
\frac{1}{x-x}
0^{-1}
0^0
\frac{1}
\frac{1}{2
(1,2
1,2)
\{1,2
((1)
3 4
\sqrt 13
2\frac{3}{2}
1/2x
3/4\pi
f(2)
5 million
3 dozen
2 thirds
5 times 3
10 less than 20
3 \text{ million}
1 < x < 2
18 (eighteen)
not 18
about 18
5 choose 2
x = y = 2
(1,2) + 3
\frac{dy}{dx}
\sin^{-1} x
\unknown{3}
\int_0^1 x
|x|
5!
1..2
1.2.3
x^
^2
\sqrt[0]{2}
\sqrt[4]{-2}
__import__('os').system('true')
\text{the answer}3
10^{10^{10}}
10^10^10
2^{99999999}
x^{1000001}
(1+x+y)^{300}
1e999999999
\sqrt{100000000000000003}
\x00
"""


def rows(table):
    return table.strip("\n").split("\n")


def pairs(table):
    return [tuple(line.split(" | ")) for line in rows(table)]


def test_the_table_is_long_enough():
    assert len(rows(EQUAL)) + len(rows(DIFFERENT)) + len(rows(UNREADABLE)) >= 120


@pytest.mark.parametrize(("a", "b"), pairs(EQUAL))
def test_equal(a, b):
    assert equal(read(a), read(b))
    assert equal(read(b), read(a))


@pytest.mark.parametrize(("a", "b"), pairs(DIFFERENT))
def test_different(a, b):
    assert not equal(read(a), read(b))
    assert not equal(read(b), read(a))


@pytest.mark.parametrize("text", rows(UNREADABLE))
def test_unreadable(text):
    text = text.replace(r"\x00", "3\0")
    assert parse_answer(text) is None
    with pytest.raises(UnreadableError, match=r"\w"):
        read(text)


# --- round trips

fractions = st.fractions(max_denominator=10**6).filter(lambda q: abs(q) < 10**12)


def spellings(q: Fraction) -> list[str]:
    """Ways to write a fraction, none of them written by the package."""
    p, d = q.numerator, q.denominator
    sign, whole, rest = "-" if q < 0 else "", abs(p) // d, abs(p) % d
    ways = [
        f"{p}/{d}",
        rf"\frac{{{p}}}{{{d}}}",
        rf"{sign}\dfrac{{{abs(p)}}}{{{d}}}",
        rf"-\tfrac{{{-p}}}{{{d}}}",
        rf"\left(\frac{{{3 * p}}}{{{3 * d}}}\right)",
        f"x = {p} / {d}",
        rf"\frac{{{p}}}{{{d}}} \text{{ cm}}",
        rf"\frac{{{p} \times 10^{{-3}}}}{{{d} \cdot 10^{{-3}}}}",
    ]
    if rest:
        ways += [
            rf"{sign}{whole}\frac{{{rest}}}{{{d}}}",
            f"{sign}{whole} {rest}/{d}",
        ]
    else:
        ways += [f"{p:,}", f"{p}.000", rf"\${p}", f"{p} apples", f"{p}e0"]
    return ways


@given(fractions)
@settings(max_examples=150, deadline=None)
def test_every_spelling_of_a_fraction_is_that_fraction(q):
    for spelling in spellings(q):
        value = read(spelling)
        if spelling.startswith("x"):
            value = value.assigned
        assert value.fraction() == q, spelling


@given(
    st.integers(-(10**8), 10**8), st.integers(-30, 30), st.sampled_from("eE"), st.data()
)
@settings(max_examples=100, deadline=None)
def test_decimals_and_powers_of_ten_are_exact(digits, exponent, mark, data):
    exact = Fraction(digits) * Fraction(10) ** exponent
    times = data.draw(st.sampled_from([r"\times", r"\cdot", "*", "x"]))
    for spelling in (
        f"{digits}{mark}{exponent}",
        rf"{digits} {times} 10^{{{exponent}}}",
        f"{digits}{times}10^{exponent}".replace(r"\cdot10", r"\cdot 10").replace(
            r"\times10", r"\times 10"
        ),
        f"{Fraction(digits) * Fraction(10) ** exponent}",
    ):
        assert read(spelling).fraction() == exact, spelling


@given(fractions, fractions)
@settings(max_examples=100, deadline=None)
def test_numbers_are_equal_iff_fractions_are(p, q):
    assert equal(read(str(p)), read(rf"\frac{{{q.numerator}}}{{{q.denominator}}}")) == (
        p == q
    )


def random_number(draw, depth):
    """A random real number as sympy builds it."""
    if depth == 0:
        return draw.choice(
            [
                sympy.Integer(draw.randint(1, 30)),
                sympy.Rational(draw.randint(1, 20), draw.randint(1, 20)),
                sympy.sqrt(draw.randint(2, 60)),
                sympy.pi,
            ]
        )
    a, b = random_number(draw, depth - 1), random_number(draw, depth - 1)
    operation = draw.choice("++-*/")
    if operation == "+":
        return a + b
    if operation == "-":
        return a - b
    return a * b if operation == "*" else a / b


def test_values_agree_with_sympy():
    """What sympy typesets is read as the number sympy computes."""
    draw = random.Random(0)
    read_back = 0
    for _ in range(80):
        number = random_number(draw, 3)
        if not number.is_finite:  # a division by zero
            continue
        value = read(sympy.latex(number))
        read_back += 1
        got, expected = value.approximate(), sympy.N(number, 60)
        assert abs(sympy.Rational(got.numerator, got.denominator) - expected) < (
            sympy.Float(10) ** -40 * (1 + abs(expected))
        )
        spread = sympy.latex(sympy.expand(number))
        assert equal(value, read(spread))
        assert not equal(value, read(spread + "+ 10^{-6}"))
    assert read_back > 70


# --- where the answer stands


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", Found(r"\frac{1}{2}", "boxed")),
        (r"\boxed{\text{a {nested} one}}", Found(r"\text{a {nested} one}", "boxed")),
        (r"\boxed{\{1,2\}}", Found(r"\{1,2\}", "boxed")),
        (r"\boxed{\left\{1,2\right.}", Found(r"\left\{1,2\right.", "boxed")),
        (r"\boxed{3} and \boxed{4", Found("3", "boxed")),
        (r"{ \boxed {3}", Found("3", "boxed")),
        (r"} \boxed{3} {", Found("3", "boxed")),
        (r"\boxed{5} #### 6, the answer is 7", Found("5", "boxed")),
        ("3*4=<<3*4=12>>12\n#### 12", Found("12", "hashes")),
        ("#### 12\n#### 1,300 \nmore", Found("1,300", "hashes")),
        ("#### 3\nThe answer is 4", Found("3", "hashes")),
        ("The answer is 3.5. I hope it is correct.", Found("3.5", "phrase")),
        ("The final answer is $x+1$. I hope", Found("x+1", "phrase")),
        ("The answer is 3. No, the answer is 4.", Found("4", "phrase")),
        ("**Answer:** 42", Found("42", "phrase")),
        ("Final answer:\n\n$42$", Found("42", "phrase")),
        ("the ANSWER IS: 18 eggs, because", Found("18 eggs", "phrase")),
        ("The answer is $18 per day.", Found("$18 per day", "phrase")),
        ("First 3, then 4 apples.", Found("4", "number")),
        ("so 10-3 = 7-0", Found("0", "number")),
        ("it is -3", Found("-3", "number")),
        ("about 1,234.5 in all", Found("1,234.5", "number")),
        ("that gives 3/4.", Found("3/4", "number")),
        ("or .5", Found(".5", "number")),
        (r"near 1.6 \times 10^{-5}", Found(r"1.6 \times 10^{-5}", "number")),
        ("near 1.6e-5", Found("1.6e-5", "number")),
        ("The answer is", None),
        ("####", None),
        (r"\boxed{}", None),
        ("", None),
    ],
)
def test_find_answer(text, found):
    assert find_answer(text) == found


def test_an_empty_box_leaves_it_to_the_other_rules():
    assert find_answer(r"\boxed{ } but 3") == Found("3", "number")


def test_last_boxed_takes_the_last_one():
    assert last_boxed(r"\boxed{\boxed{1}2}") == "1"
    assert last_boxed("none") is None


# --- hostile texts

MEGA = 10**6
HOSTILE = {
    "digits": "9" * MEGA,
    "grouped digits": "1" + ",234" * (MEGA // 4) + "5",
    "open braces": "{" * MEGA,
    "closed braces": "}" * MEGA,
    "open boxes": r"\boxed{" * (MEGA // 7),
    "closed boxes": r"\boxed{" * 10**5 + "1" + "}" * 10**5,
    "null bytes": "\0" * MEGA,
    "backslashes": "\\" * MEGA,
    "spaces": "answer is " + " " * MEGA,
    "box and spaces": r"\boxed" + " " * MEGA,
    "phrases": "answer is 1. " * (MEGA // 13),
    "hashes": "#" * MEGA,
    "minus signs": "-" * MEGA,
    "dots": "1." * (MEGA // 2),
    "slashes": "1/" * (MEGA // 2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_of_anything_is_searched_at_once(name):
    begin = time.process_time()
    found = find_answer(HOSTILE[name])
    assert found is None or parse_answer(found.text) is None or len(found.text) < 9
    assert time.process_time() - begin < 3


TALL = [
    "(" * 900 + "1" + ")" * 900,
    "[(" * 400,
    "{" * 900 + "1" + "}" * 900,
    r"\sqrt{" * 300 + "2" + "}" * 300,
    r"\frac" * 390,
    r"\frac{1}{" * 200 + "2" + "}" * 200,
    r"\sqrt" * 390 + "2",
    r"\sin" * 490 + "x",
    r"\{" * 900,
    "^".join("9" * 900),
    "-" * 1900 + "1",
    "x^{-" * 400,
    "9" * 1999,
    "9" * 900 + "^{99999}",
    "1e" + "9" * 1900,
    "+".join(rf"\sqrt{{{n}}}" for n in range(9999999900, 9999999999)),
    "(" + "+".join("abcdefghij") + ")^{12}",
    "(1+x)^{19}(1+y)^{19}(1+z)^{19}",
    r"\frac{1}{1+x}+" * 90 + "1",
    "".join(rf"\frac{{1}}{{{letter}+1}}+" for letter in "abcdfghjklmnopqrst") + "1",
    "3 " + "a" * 1900 + " b c d e f g",
    "e^{" + "+".join(f"x_{n}" for n in range(250)) + "}",
    r"\sin(" * 35 + "x+1" + ")" * 35,
    r"(1+\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7}+\sqrt{11})^{60}",
    "1," * 990 + "1",
    r"\begin{pmatrix}" + "1&" * 900 + r"1\end{pmatrix}",
    "\u0663\u0664",  # digits, but not ours
    "²" * 1900,
    "\ud800",
]


@pytest.mark.parametrize("text", TALL, ids=range(len(TALL)))
def test_tall_answers_are_read_or_refused_at_once(text):
    begin = time.process_time()
    value = parse_answer(text)
    if value is not None:
        with contextlib.suppress(UnreadableError):
            assert equal(value, value)
    assert time.process_time() - begin < 2


@given(
    st.text(alphabet=r"\{}()[],.0123456789+-*/^_=<>$%xyei sqrtfacboxdpmn", max_size=40)
)
@settings(max_examples=400, deadline=None)
def test_no_text_raises_anything_else(text):
    found = find_answer(text)
    value = parse_answer(found.text if found else text)
    assert value is None or equal(value, value)
    if isinstance(value, Value):
        assert value == read(found.text if found else text)
