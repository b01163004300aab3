"""The loaders, and the grader on every reference answer of a problem."""

import itertools
import json
from fractions import Fraction

import pytest

from ftlib import data
from ftlib.metrics import find_answer, grade, parse_answer
from ftlib.metrics.exact import Value

LOADERS = {
    "math-500": (data.math500, 500),
    "minerva-math": (data.minerva, 272),
    "amc23": (data.amc23, 40),
    "svamp": (data.svamp, 1000),
}

# In Minerva, derivatives and I(0), which may be a function's value or a product.
UNREADABLE = {"minerva-math": 7}


def rows_of(name):
    where = next(row.where for row in data.catalogue() if row.name == name)
    if where == "not here":
        pytest.skip(f"{name} is not here")
    return LOADERS[name][0]() if name in LOADERS else None


@pytest.mark.parametrize("name", LOADERS)
def test_rows_have_a_question_and_a_reference(name):
    rows = rows_of(name)
    assert len(rows) == LOADERS[name][1]
    assert all(row["question"].strip() and row["reference"].strip() for row in rows)
    assert len({row["question"] for row in rows}) > 0.9 * len(rows)


@pytest.mark.parametrize("name", LOADERS)
def test_every_reference_is_equal_to_itself_and_most_are_read(name):
    rows = rows_of(name)
    grades = [grade(rf"\boxed{{{r['reference']}}}", r["reference"]) for r in rows]
    assert all(given.correct for given in grades)
    unreadable = [given.extracted for given in grades if given.reason != "equal"]
    assert len(unreadable) == UNREADABLE.get(name, 0), unreadable


@pytest.mark.parametrize("name", LOADERS)
def test_the_next_problems_reference_is_equal_only_where_it_says_the_same(name):
    """A grader that accepts everything would pass the test above."""
    rows = rows_of(name)
    references = [row["reference"] for row in rows]
    for given, right in itertools.pairwise(references):
        a, b = parse_answer(given), parse_answer(right)
        if not (isinstance(a, Value) and isinstance(b, Value)):
            continue
        if a.fraction() is not None and b.fraction() is not None:
            same = a.fraction() == b.fraction()
            assert grade(rf"\boxed{{{given}}}", right).correct == same


def test_minerva_references_are_read_as_pythons_floats_are():
    """Numbers in plain notation, by an oracle that is not ours."""
    seen = 0
    for row in rows_of("minerva-math"):
        try:
            expected = Fraction(row["reference"])
        except ValueError:
            continue
        seen += 1
        assert parse_answer(row["reference"]).fraction() == expected
    assert seen > 180


def test_math500_solutions_end_in_their_reference():
    """The box of each worked solution is found and graded."""
    rows = rows_of("math-500")
    correct = [grade(row["solution"], row["reference"]) for row in rows]
    assert [given for given in correct if not given.correct] == []
    assert {row["level"] for row in rows} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("split", ["test", "train"])
def test_gsm8k_solutions_end_in_their_reference(split):
    rows_of("gsm8k")
    for row in data.gsm8k(split):
        found = find_answer(row["answer"])
        assert found.rule == "hashes"
        exact = int(row["reference"].replace(",", ""))
        assert parse_answer(found.text).fraction() == exact


def test_svamp_equations_give_their_reference_but_for_one():
    """One label is wrong upstream: four apples, two picked, three grown, make five."""
    wrong = [
        (row["solution"], row["reference"])
        for row in rows_of("svamp")
        if parse_answer(row["solution"]).fraction() != Fraction(row["reference"])
    ]
    assert wrong == [("( ( 4.0 - 2.0 ) + 3.0 )", "1")]


def test_svamp_joins_story_and_question(tmp_path, monkeypatch):
    path = tmp_path / "SVAMP.json"
    row = {"Body": "Dan had $ 4. ", "Question": "How much?", "Type": "Sum"}
    path.write_text(json.dumps([{**row, "Equation": "( 4.0 )", "Answer": 4.5}]))
    monkeypatch.setattr("ftlib.data.sets.fetch", lambda name: path)
    assert data.svamp() == [
        {
            "question": "Dan had $ 4. How much?",
            "solution": "( 4.0 )",
            "reference": "4.5",
            "topic": "Sum",
        }
    ]


# --- explanations -------------------------------------------------------------


def test_esnli_has_every_pair_with_label_and_three_explanations():
    rows_of("esnli")
    for split, n in (("dev", 9842), ("test", 9824)):
        rows = data.esnli(split)
        assert len(rows) == n
        assert {r["label"] for r in rows} == {"entailment", "neutral", "contradiction"}
        for row in rows:
            assert len(row["explanations"]) == 3
            assert row["premise"]
            assert row["hypothesis"]
            assert all(row["explanations"])
    first = data.esnli("dev")[1]  # the lines of all six files belong together
    assert first["hypothesis"] == "Two woman are holding packages ."
    assert first["label"] == "entailment"
    assert "holding packages" in first["explanations"][0]


def test_comve_has_right_reasons_and_no_confusing_ones():
    rows_of("comve")
    for split, n, most in (("train", 10_000, 3), ("dev", 1000, 2), ("test", 1000, 2)):
        rows = data.comve(split)
        assert len(rows) == n
        assert all(1 <= len(row["reasons"]) <= most for row in rows)
        assert all(row["sense"] and row["nonsense"] for row in rows)
        assert sum(len(row["reasons"]) == most for row in rows) > 0.99 * n
    pair = next(r for r in data.comve("dev") if r["sense"] == "The closet got hangers")
    assert pair == {
        "sense": "The closet got hangers",
        "nonsense": "The hangers bought the closet",
        "reasons": [
            "Hangers are inanimate things which cannot buy something",
            "Hangers dont have money.",  # not "The hangers cannot eat"
        ],
    }


def test_cose_joins_questions_with_their_explanations():
    rows_of("cose")
    for split, n in (("train", 7610), ("dev", 950)):
        rows = data.cose(split)
        assert len(rows) == n
        for row in rows:
            assert len(row["choices"]) == 3
            assert row["answer"] in row["choices"]
            assert row["question"]
            assert row["explanation"]
    assert data.cose("train")[0] == {
        "question": "If a lantern is not for sale, where is it likely to be?",
        "choices": ["antique shop", "house", "dark place"],
        "answer": "house",
        "explanation": "A house is the only place that is not likely to sell things",
    }


@pytest.mark.parametrize(
    ("load", "split", "message"),
    [
        (data.gsm8k, "dev", "GSM8K has no split 'dev': choose train or test"),
        (data.esnli, "train", "e-SNLI has no split 'train': choose dev or test"),
        (data.comve, "all", "ComVE has no split 'all': choose train or dev or test"),
        (data.cose, "test", "CoS-E has no split 'test': choose train or dev"),
    ],
)
def test_a_split_that_does_not_exist_is_an_error(load, split, message):
    with pytest.raises(ValueError, match=message):
        load(split)


def test_ecqa_is_told_where_to_find():
    with pytest.raises(data.DataUnavailable, match="dair-iitd/ECQA-Dataset"):
        data.ecqa()


def test_files_whose_lines_do_not_match_are_an_error(tmp_path, monkeypatch):
    def fetch(name):
        path = tmp_path / name.replace("/", "-")
        path.write_text("a\nb\n" if "s2" in name else "a\nb\nc")
        return path

    monkeypatch.setattr("ftlib.data.sets.fetch", fetch)
    with pytest.raises(ValueError, match="shorter than"):
        data.esnli("dev")
