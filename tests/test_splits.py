"""Which split a question falls into."""

import hashlib
import subprocess
import sys
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ftlib.splits import split_of


@given(st.text())
def test_the_first_byte_of_the_hash_decides(question):
    byte = int(hashlib.sha256(question.encode()).hexdigest()[:2], 16)
    expected = ["pretrain"] * 4 + ["train"] * 2 + ["validation", "test"]
    assert split_of(question) == expected[byte // 32]


def test_shares_are_a_half_a_quarter_and_two_eighths():
    counts = Counter(split_of(str(i)) for i in range(20_000))
    for split, share in [("pretrain", 4), ("train", 2), ("validation", 1), ("test", 1)]:
        assert abs(counts[split] / 20_000 - share / 8) < 0.01


def test_another_process_splits_alike():
    """Python's own hash would not."""
    questions = [str(i) for i in range(50)]
    code = "from ftlib.splits import *; print(*map(split_of, map(str, range(50))))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [split_of(question) for question in questions]
