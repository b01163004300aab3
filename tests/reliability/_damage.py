"""What can happen to the bytes of a file, and how a reader must take it."""

import random
from collections.abc import Callable, Iterator
from typing import Any


def damages(content: bytes, cases: int) -> Iterator[bytes]:
    """Yield flipped bits, lost ends and zeroed stretches; all differ from the content.

    Args:
        content: of the whole file.
        cases: how many to yield.
    """
    draw = random.Random(0)
    kinds = [_flip, _flip, _flip, _truncate, _zero]
    found = 0
    while found < cases:
        damaged = draw.choice(kinds)(content, draw)
        if damaged != content:
            found += 1
            yield damaged


def _flip(content: bytes, draw: random.Random) -> bytes:
    flipped = bytearray(content)
    for _ in range(draw.choice([1, 1, 2])):
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _zero(content: bytes, draw: random.Random) -> bytes:
    """As a block that never reached the disk."""
    first = draw.randrange(len(content))
    last = min(len(content), first + draw.choice([1, 64, 512]))
    return content[:first] + bytes(last - first) + content[last:]


def judge(
    read: Callable[[], Any], original: Any, error: type[Exception], name: str
) -> bool:
    """Accept the exact original or the error that names the file, and nothing else.

    Returns:
        Whether the damage was refused.
    """
    try:
        found = read()
    except error as refusal:
        if name not in str(refusal):
            raise AssertionError(f"the error does not name {name}") from refusal
        return True
    assert found == original, "another content was read, without a word"
    return False
