"""Words as the tokens of a tiny model: in a small world each has one of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable


def words_in(text: str) -> list[str]:
    """Split a text at white space; a line end is a word too."""
    return re.findall(r"\n|\S+", text)


class WordVocabulary:
    """The tokens of a tiny model: padding, the end of a text, and words.

    Args:
        words: in the order of their ids; one that comes again keeps its first.

    Attributes:
        words: the tokens' texts, by id.
        pad: id of the padding, 0.
        end: id of the end of a text, 1.

    >>> vocabulary = WordVocabulary(words_in("the cat sat"))
    >>> vocabulary.encode("cat sat")
    [3, 4]
    >>> vocabulary.decode([3, 4, 1, 2])
    'cat sat'
    """

    pad = 0
    end = 1

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(dict.fromkeys(["<pad>", "<eos>", *words]))
        self._ids = {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, without the end.

        Raises:
            ValueError: a word has no token.
        """
        try:
            return [self._ids[word] for word in words_in(text)]
        except KeyError as error:
            raise ValueError(f"{error} in {text!r} has no token") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids up to the first end, padding left out, into a text."""
        words = []
        for index in ids:
            if index == self.end:
                break
            if index != self.pad:
                words.append(self.words[index])
        return re.sub(" ?\n ?", "\n", " ".join(words))
