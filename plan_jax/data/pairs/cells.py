"""The cells of a manifest: words that mean missing, and lists or objects that are written as text.

Functions raise ValueError for a cell that cannot be meant. The builder then skips and reports the
row.
"""

import ast
import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]

# Spellings of a missing value in CSV files of pandas, R, Excel and databases.
_MISSING_WORDS = frozenset(
    (
        *("nan", "na", "n/a", "n.a", "nat", "null", "none", "nil", "\\n", "1.#qnan"),
        *("missing", "undefined", "unavailable", "unspecified"),
        *("not available", "not applicable", "not specified", "no data", "no value"),
    )
)
_BYTES_LITERAL = re.compile(r"""b(['"]).*\1""", re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NUMPY_SCALAR = re.compile(r"\bnp\.\w+\(([^()]*)\)")
_QUOTED_OR_NAN = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|\bnan\b""", re.IGNORECASE)
# How a list, a tuple, an object or a set of strings begins, and an array of numpy.
_LITERAL = re.compile(r"""[\[{]|\(\s*b?['"]|array\(""")
# Numpy writes a list of strings without commas. Python would read one string from it.
_NUMPY_STRINGS = re.compile(r"""['"]\s+['"]""")
# Characters without width that come with copied text: two spaces, a mark and a soft hyphen.
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))
MAX_LITERAL = 100_000  # characters of a list in Python's spelling
MAX_NUMBER = 400  # characters
MAX_DEPTH = 50  # of lists in a cell; Python's parser can crash on thousands


def is_missing(value: Any) -> bool:
    """Returns whether a cell says that there is no value.

    >>> [is_missing(cell) for cell in (None, float("nan"), " N/A", "<NA>", "None", "-", "0", "no")]
    [True, True, True, True, True, True, False, False]
    """
    if value is None:
        return True
    if isinstance(value, float):
        return math.isnan(value)
    if not isinstance(value, str):
        return False
    # Brackets, quotes and dashes around a word, as in `<NA>`, `(null)`, `#N/A` and `-nan`.
    text = value.strip().casefold()
    word = text.strip("<>()[]{}'\"#.-?_ \u2013\u2014")
    if not word:
        return not set("[]{}()") & set(text)  # an empty list is a value
    return word in _MISSING_WORDS


def get_cell(row: Row, column: str | None) -> Any:
    """Returns a cell, or None if the column or the value is missing.

    Text is trimmed. Bytes that are UTF-8 become text.

    >>> [get_cell({"a": " x ", "b": "nan", "c": b"y"}, column) for column in ("a", "b", "c", None)]
    ['x', None, 'y', None]
    """
    value = None if column is None else row.get(column)
    if isinstance(value, str) and _BYTES_LITERAL.fullmatch(value.strip()):
        value = _evaluate_literal(value.strip(), value)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if is_missing(value):
        return None
    return value.strip() if isinstance(value, str) else value


def parse_literal(value: Any) -> Any:
    """Parses a cell that is a list or an object, in JSON or in Python's spelling.

    Any other cell is returned unchanged.

    >>> parse_literal('{"a": 1}'), parse_literal("['a', 'b']"), parse_literal("a; b")
    ({'a': 1}, ['a', 'b'], 'a; b')

    Raises:
      ValueError: if it begins like a list or an object and is neither.
    """
    if not isinstance(value, str) or not _LITERAL.match(value):
        return value
    if value.startswith("array("):
        raise ValueError("is an array as numpy writes it; write a JSON list")
    try:
        return replace_surrogates(json.loads(value), value)
    except json.JSONDecodeError as error:
        message = error.msg
    except (RecursionError, ValueError):  # nested too deep; an int of more than 4,300 digits
        raise ValueError("is nested too deep or has a number too long to be read") from None
    if _NUMPY_STRINGS.search(value):
        raise ValueError("is a list without commas, as numpy writes it; write a JSON list")
    content = _evaluate_literal(value, None)
    if content is None:
        raise ValueError(f"is not JSON: {message}")
    return sorted(content, key=str) if isinstance(content, set) else content


def replace_surrogates(content: Any, source: str) -> Any:
    """Returns parsed JSON whose texts can be written as UTF-8: half a character becomes U+FFFD.

    Tools that cut texts at a number of UTF-16 units leave such halves, as `\\ud83d`.

    Args:
      content: what JSON has been parsed to.
      source: the JSON.
    """
    if not _SURROGATE.search(source):
        return content
    if isinstance(content, str):
        return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(content, list):
        return [replace_surrogates(item, source) for item in content]
    if isinstance(content, dict):
        return {
            replace_surrogates(key, source): replace_surrogates(item, source)
            for key, item in content.items()
        }
    return content


def is_literal_of_strings(text: str) -> bool:
    """Returns whether a text begins as a list or an object of strings, well-formed or not.

    >>> is_literal_of_strings("['No effusion.' 'Clear.']"), is_literal_of_strings("[** name **]")
    (True, False)
    """
    return re.match(r"""(?:array\()?[\[{(]\s*b?['"]""", text) is not None


def _evaluate_literal(value: str, default: Any) -> Any:
    """Returns the value of a literal of Python, or `default` if it is none."""
    if len(value) > MAX_LITERAL or _count_nesting(value) > MAX_DEPTH:
        return default
    # pandas writes a missing value as nan, which is no literal.
    value = _QUOTED_OR_NAN.sub(lambda m: "None" if m[0].lower() == "nan" else m[0], value)
    try:
        return ast.literal_eval(_NUMPY_SCALAR.sub(r"\1", value))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return default


def _count_nesting(value: str) -> int:
    depth = deepest = 0
    for character in value:
        if character in "[{(":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]})":
            depth -= 1
    return deepest


def normalise_name(name: Any) -> str:
    """Returns a name in one spelling of its accents, without blanks around it or in a row.

    >>> normalise_name(" Pleural   Effusion ")
    'Pleural Effusion'
    """
    return " ".join(unicodedata.normalize("NFC", str(name).translate(_INVISIBLE)).split())


def fold_name(name: Any) -> str:
    """Returns the key of a name: equal for spellings that differ in case, `_`, `-` or blanks.

    >>> fold_name("Pleural_Effusion") == fold_name("pleural effusion")
    True
    """
    text = unicodedata.normalize("NFKC", str(name).translate(_INVISIBLE)).casefold()
    return " ".join(re.sub(r"[\s_\-]+", " ", text).split())


def to_number(value: Any) -> float | None:
    """Returns a cell as a finite float, or None if it is no number.

    >>> to_number("7.0"), to_number("a"), to_number(10**400)
    (7.0, None, None)
    """
    is_long = isinstance(value, str) and len(value) > MAX_NUMBER
    if is_long or isinstance(value, Mapping | list | tuple | bytes):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
