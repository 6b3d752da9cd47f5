"""What tells the code of a user's own method from what it was."""

from __future__ import annotations

import ast
import linecache
import sys

from vlmlayers.files import checksum

# Of which classes of the user's own inherit; their versions stand for their code.
LIBRARIES = {"vlmadapters", "vlmlayers", "torch", *sys.stdlib_module_names} - {"__main__"}


def code_mark(*classes: type) -> str:
    """Return the checksum of the code of some classes and of what they inherit from.

    Whole files count, or cells of a notebook, but comments and layout do not. What ships here and
    what Python and torch bring is left out, and so is what the files import.
    """
    bases = dict.fromkeys(base for one in classes for base in one.__mro__)
    own = [one for one in bases if one.__module__.partition(".")[0] not in LIBRARIES]
    texts = dict.fromkeys(text for one in own for text in _source(one))
    return checksum("\n".join(map(_bare, texts)))


def _source(made: type) -> list[str]:
    """Return the text of the file that defines a class, or of the notebook's cell."""
    file = getattr(sys.modules.get(made.__module__), "__file__", None)
    places = [file] if file else _of_functions(made)
    for place in places:
        linecache.checkcache(place)
    return ["".join(linecache.getlines(place)) for place in places]


def _of_functions(made: type) -> list[str]:
    codes = [getattr(one, "__code__", None) for one in vars(made).values()]
    return sorted({code.co_filename for code in codes if code is not None})


def _bare(text: str) -> str:
    try:
        return ast.unparse(ast.parse(text))
    except SyntaxError:  # a cell of a notebook with commands of its own
        return text
