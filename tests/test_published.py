import math

import pytest

from ftlib import published
from ftlib.published import PublishedTable


@pytest.fixture(scope="module")
def cft() -> dict[str, PublishedTable]:
    return published.load("cft")


@pytest.mark.parametrize(("method", "rounding"), [("cft", 0.1), ("caref", 0.01)])
def test_the_papers_averages_are_those_of_its_columns(method, rounding):
    checked = 0
    for table in published.load(method).values():
        if table.columns[-1] != "average":
            continue
        for labels, (*numbers, average) in table.rows.items():
            # Each number is rounded by half of it, and so is their mean.
            error = abs(sum(numbers) / len(numbers) - average)
            assert error <= rounding + 1e-9, labels
            checked += 1
    assert checked > 10


def test_the_tables_give_the_claimed_gains(cft):
    table = cft["sft-and-cft"]

    def gain(column: str) -> float:
        ours, theirs = (
            table.value("Qwen2.5-Math-7B", arm, column=column)
            for arm in ("CFT", "SFT GPT-4o")
        )
        return ours - theirs

    assert gain("MATH") == pytest.approx(7.0)
    assert gain("Minerva") == pytest.approx(16.6)


def test_a_missing_row_or_column_is_named(cft):
    table = cft["minerva-by-version"]
    with pytest.raises(KeyError, match=r"no row .*choose among"):
        table.value("SFT teacher", column="version 1")
    with pytest.raises(KeyError, match="no column 'v1'"):
        table.value("CFT", column="v1")


def test_markdown_shows_the_rows_with_the_labels(cft):
    text = cft["sft-and-cft"].markdown(["Qwen2.5-7B"])
    assert len(text.splitlines()) == 2 + 5
    assert "71.1" in text
    assert "DeepSeek" not in text
    assert "model" not in text
    assert "DeepSeek" in cft["sft-and-cft"].markdown()


def test_columns_come_in_the_order_of_the_rows(cft):
    assert cft["self-critique"].column("MATH")[:2] == [80.2, 78.8]
    assert not any(map(math.isnan, cft["reinforcement"].column("average")))


def test_a_row_of_the_wrong_length_is_refused():
    content = {"source": "", "labels": ["a"], "columns": ["x", "y"], "rows": [["r", 1]]}
    with pytest.raises(ValueError, match="2 entries, not 3"):
        published._table("table", content)
