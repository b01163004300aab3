"""Judges that a grading process can import."""

import os
import time

from ftlib.metrics import Grade, grade


def slow(text: str, reference: str) -> Grade:
    """Hang, die or grade, as the text asks."""
    if text == "hang":
        time.sleep(600)
    if text == "die":
        os._exit(3)
    if text == "raise":
        raise RuntimeError("a judge that fails")
    return grade(text, reference)


def number_of_process(text: str, reference: str) -> Grade:
    """Report in which process an item was graded."""
    return Grade(True, str(os.getpid()), "equal")
