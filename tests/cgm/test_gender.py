"""The gender rule: pronoun, then title, then name."""

import pytest

from ftlib.cgm.gender import gender, name_gender, pronoun_gender


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Lily. She liked to help.", 1),
        ("Max. He had a red plane.", -1),
        ("Sam. Sam loved her job.", 1),
        ("Sue. HIS work was hard.", -1),
        ("Mrs. Fox. The fox was old.", 1),
        ("Mr. Fox, who was kind.", -1),
        ("Miss Ray watched the sea.", 1),
        ("Ms Lee and Mr Lee.", 1),
        ("Tom. Tom was flying.", -1),
        ("  anna, the tall one", 1),
        ("Dr. Who was there.", 0),
        ("", 0),
        ("Sheila shed a tear; the hero there hears", 0),
        ("Jeff. Everyone saw himself in the lake", -1),
        ("123 Bob", -1),
    ],
)
def test_rule(text, expected):
    assert gender(text) == expected


def test_the_pronoun_outweighs_title_and_name():
    text = "Mr. Tom. She smiled."
    assert (pronoun_gender(text), name_gender("Tom. She"), gender(text)) == (1, -1, 1)


def test_the_first_pronoun_decides():
    assert gender("Sam met a girl. She waved, he smiled.") == 1
