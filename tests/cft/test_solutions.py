"""How solutions are written."""

from ftlib.cft.solutions import CHAIN, EQUATION, GSM8K, Solution, Step

STEPS = (Step("2", "2"), Step("7", "7"))


def test_each_task_writes_in_its_own_way():
    solution = Solution("?", STEPS, "7")
    assert solution.text(CHAIN) == "2 7 A 7"
    assert solution.text(EQUATION) == "2\n7\nAnswer: 7"
    assert solution.text(GSM8K) == "2\n7\n#### 7"


def test_what_is_missing_is_not_written():
    assert Solution("?", (), "").text(CHAIN) == ""
    assert Solution("?", STEPS, "").text(CHAIN) == "2 7"
    assert Solution("?", (), "7").text(GSM8K) == "#### 7"
