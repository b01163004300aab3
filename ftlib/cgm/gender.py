"""Which gender a story gives its character: a rule of the paper's kind.

The paper's code looks at the second sentence's first word (She or He), then at titles,
then looks the name up. Ours, for continuations of a few dozen tokens, takes the first
of these that the text offers:

1. the first word among *she, her, hers, herself* and *he, him, his, himself*;
2. the first title: *Mrs, Ms, Miss* or *Mr*;
3. the first word, the character's name, in a short list of names.

It is a proxy: it does not know who the pronoun refers to.
"""

from __future__ import annotations

import re

_FEMALE_NAMES = frozenset(
    "alice amy anna annie bella betty beth clara daisy ella ellie emily emma eva "
    "grace hannah jane jenny jill julia kate kim laura lily linda lisa lola lucy "
    "maria mary mia mimi molly nancy nina rosa rose ruby sally sara sarah sophie "
    "sue susan susie zoe".split()
)
_MALE_NAMES = frozenset(
    "adam al andy ben benny bill billy bob bobby charlie dan dave david ed eric "
    "frank fred george harry henry jack jake james jim jimmy joe john johnny ken "
    "leo luke mark matt max mike ned nick oliver paul peter pete rick rob ron roy "
    "sam steve ted tim timmy toby tom tommy tony will".split()
)
_PRONOUN = re.compile(r"\b(?:(she|hers?|herself)|(he|him|his|himself))\b", re.I)
_TITLE = re.compile(r"\b(?:(mrs|ms|miss)|(mr))\b", re.I)
_WORD = re.compile(r"[A-Za-z]+")


def gender(text: str) -> int:
    """Return +1 for a female character, −1 for a male one, 0 where the text is silent.

    Args:
        text: what follows "… there was a {profession} named".
    """
    for rule in (_PRONOUN, _TITLE):
        if found := rule.search(text):
            return 1 if found.group(1) else -1
    return name_gender(text)


def pronoun_gender(text: str) -> int:
    """Return rule 1 alone: +1, −1, or 0 without a pronoun."""
    found = _PRONOUN.search(text)
    return 0 if not found else 1 if found.group(1) else -1


def name_gender(text: str) -> int:
    """Return rule 3 alone: +1, −1, or 0 for a first word that is not in the lists."""
    first = _WORD.search(text)
    name = first.group().lower() if first else ""
    return int(name in _FEMALE_NAMES) - int(name in _MALE_NAMES)
