"""From what files write for a class, numbers or words, to labels and class names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmlayers.errors import UserError

_NUMBER = re.compile(r"-?[0-9]{1,9}(\.0+)?")  # pandas writes 3.0 where a column has gaps


def class_word(value: Any) -> str:
    """Return what a file writes for a class in one form, "" for nothing.

    Blanks around it are dropped and accented letters are of one piece (Unicode NFC): two ways to
    write one word are not two classes.
    """
    if value is None or value != value:  # NaN
        return ""
    return unicodedata.normalize("NFC", str(value)).strip()


def is_number(word: str) -> bool:
    """Return whether a word can be the number of a class."""
    return _NUMBER.fullmatch(word) is not None


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset.

    Attributes:
        names: Class names by label.
        labels: Label of each word that stands for a class.
        remark: How numbers were counted where they are not 0, 1, 2, …, and that they are the names
            where there are no others; else "".
    """

    names: tuple[str, ...]
    labels: Mapping[str, int]
    remark: str = ""

    def label(self, word: str, where: str) -> int:
        """Return the label of a word.

        Raises:
            UserError: It stands for none of the classes.
        """
        if word in self.labels:
            return self.labels[word]
        if is_number(word):
            known = "0, 1, 2, …" if word.startswith("-") else f"0 to {len(self.names) - 1}"
            raise UserError(f"{where} has label {word}; labels are {known}")
        raise UserError(f"{where} has the class {word[:80]!r}, which is not declared")


def read_classes(
    written: Iterable[tuple[str, str]], declared: tuple[str, ...], where: str
) -> Classes:
    """Return the classes of all splits of a dataset.

    Words are numbered in alphabetical order. Numbers keep their order, closed up and counted from
    0. Of declared names a number counts from 0, or from 1 where none is 0 and the highest is the
    number of names.

    Args:
        written: The word of each item's class, "" for none, and the class name beside it, if any.
        declared: Class names that the manifest gives.
        where: File or dataset, for messages.

    Raises:
        UserError: A class has two names, or declared names are in another order than those beside
            the numbers.
    """
    pairs = {(word, name) for word, name in written if word}
    numeric = all(is_number(word) for word, _ in pairs)
    keys = {word: str(int(word.partition(".")[0])) if numeric else word for word, _ in pairs}
    names: dict[str, str] = {}
    for word, name in sorted(pairs):
        known = names.get(keys[word], "")
        if known and name and known != name:
            raise UserError(
                f"{where}: label {word[:80]} has two class names, {known[:80]!r} and {name[:80]!r}"
            )
        names[keys[word]] = known or name
    if not numeric:
        order = [class_word(name) for name in declared] or sorted(names)
        final = declared or tuple(names[key] or key for key in order)
        return Classes(final, {key: label for label, key in enumerate(order)})
    # Negative numbers stand for no class (-1 is the usual mark of a hidden label).
    numbers = sorted(number for key in names if (number := int(key)) >= 0)
    first = int(bool(declared) and numbers[:1] != [0] and numbers[-1:] == [len(declared)])
    if declared:
        label_of = {number: number - first for number in numbers if number - first < len(declared)}
    else:
        label_of = {number: label for label, number in enumerate(numbers)}
    labels = {class_word(name): label for label, name in enumerate(declared)}
    for number, label in label_of.items():
        # Other names may be better ones; the same in another order are of the wrong images.
        if labels.get(name := names[str(number)], label) != label:
            raise UserError(
                f"{where}: label {number} is called {name[:80]!r} beside it and "
                f"{declared[label][:80]!r} by the declared names; put these in its order"
            )
    labels |= {word: label_of[int(key)] for word, key in keys.items() if int(key) in label_of}
    remark = ""
    if any(number != label for number, label in label_of.items()):
        remark = f"its labels, {numbers[0]} to {numbers[-1]}, are counted from 0"
    final = declared or tuple(names[str(n)] or str(n) for n in numbers)
    return Classes(final, labels, remark)
