"""A vocabulary of words; the worlds' own are tested with the worlds."""

import pytest

from ftlib.words import WordVocabulary, words_in


def test_words_are_between_white_space_and_line_ends_are_words():
    assert words_in(" a\tb \n\n c. ") == ["a", "b", "\n", "\n", "c."]


def test_ids_are_in_order_after_padding_and_end():
    vocabulary = WordVocabulary(["b", "a", "b", "\n"])
    assert vocabulary.words == ("<pad>", "<eos>", "b", "a", "\n")
    assert len(vocabulary) == 5
    assert vocabulary.encode("a b\na") == [3, 2, 4, 3]
    padded = [vocabulary.pad, 3, vocabulary.pad, 4, 2, vocabulary.end, 3]
    assert vocabulary.decode(padded) == "a\nb"
    with pytest.raises(ValueError, match="'c' in 'a c' has no token"):
        vocabulary.encode("a c")
