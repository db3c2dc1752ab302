"""Quotation of cells in messages: short, and never the text of a report."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CHARACTERS = 60  # of a cell in a message
MAX_WORDS = 3  # a text with more words may be a report
MAX_DENSE_LETTERS = 8  # of scripts without blanks between words
_DENSE_LETTER = re.compile(
    # Thai, Lao, Myanmar, Khmer, Japanese, Chinese.
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
)
_IMAGE_SUFFIX = re.compile(
    r"[^\s.]\.(?:png|jpe?g|dcm|dicom|tiff?|bmp|gif|webp|jp2|j2k|pgm|ppm|nii|gz|npy)$", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?]\s|[.!?]$|[。！？؟।]")


def quote(value: Any) -> str:
    """Returns a cell as a message may show it: its value if it is short, else its kind and size.

    >>> quote("held out"), quote("No effusion. Heart is normal."), quote(b"GIF89"), quote([1, 2])
    ("'held out'", 'a text of 29 characters', '5 bytes', '[1, 2]')
    >>> quote({"bytes": b"GIF89", "path": None})
    'an object of bytes, path'
    """
    if isinstance(value, str):
        if is_prose(value):
            return f"a text of {len(value)} characters"
        return repr(value) if len(value) <= MAX_CHARACTERS else repr(shorten(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping):
        return shorten(f"an object of {', '.join(map(_quote_key, value))}")
    if isinstance(value, Sequence):
        is_short = len(value) <= 8 and all(isinstance(item, bool | float | int) for item in value)
        return shorten(_represent(list(value))) if is_short else f"a list of {len(value)}"
    return shorten(_represent(value))


def quote_path(value: Any) -> str:
    """Returns a path as a message may show it: a long one from its end, a report not at all.

    Of a path with many words, only the name of the file is shown.

    >>> quote_path("img/001.png"), quote_path("There is effusion in the left lower zone")
    ('img/001.png', 'a text of 40 characters')
    """
    if not isinstance(value, str):
        return quote(value)
    name = re.split(r"[/\\]", value)[-1] if len(value.split()) > 2 * MAX_WORDS else value
    if not is_path(value) or len(name.split()) > 2 * MAX_WORDS:
        return f"a text of {len(value)} characters"
    line = _to_line(value if name == value else f".../{name}")
    return line if len(line) <= MAX_CHARACTERS else f"...{line[3 - MAX_CHARACTERS :]}"


def quote_name(name: str, num_rows: int) -> str:
    """Returns the name of a finding for a list; one of a single row is hidden if it may be a text.

    >>> [quote_name("Disease of both lungs", number) for number in (2, 1)]
    ['Disease of both lungs', 'a text of 21 characters']
    """
    return shorten(name) if num_rows > 1 or not is_prose(name) else quote(name)


def is_path(text: str) -> bool:
    """Returns whether a text may be a path: a name with blanks ends like the name of an image.

    >>> is_path("chest 1/front.png"), is_path("3f2e"), is_path("Clear lungs"), is_path("by Dr.Yu")
    (True, True, False, False)
    """
    if _IMAGE_SUFFIX.search(text):
        return True
    return len(text.split()) <= 1 and not is_prose(text)


def is_prose(text: str) -> bool:
    """Returns whether a text may be a sentence: more than three words, or an end of a sentence.

    In a script without blanks, more than eight letters may be one.

    >>> is_prose("Pleural Effusion"), is_prose("No effusion.")
    (False, True)
    """
    if len(text.split()) > MAX_WORDS or len(_DENSE_LETTER.findall(text)) > MAX_DENSE_LETTERS:
        return True
    return has_sentence_end(text) and any(map(str.isalpha, text))


def has_sentence_end(text: str) -> bool:
    """Returns whether a sentence ends in a text, or at its end.

    >>> has_sentence_end("No effusion."), has_sentence_end("Dr.Yu")
    (True, False)
    """
    return _SENTENCE_END.search(text) is not None


def shorten(text: str) -> str:
    """Returns a text in one line of at most `MAX_CHARACTERS` characters."""
    line = _to_line(text)
    return line if len(line) <= MAX_CHARACTERS else f"{line[: MAX_CHARACTERS - 3]}..."


def _to_line(text: str) -> str:
    # Control characters of a manifest could rewrite what a terminal shows.
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def count(number: int, noun: str, plural: str = "") -> str:
    """Returns a number of things.

    >>> count(1, "image"), count(2, "study", "studies")
    ('1 image', '2 studies')
    """
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def _quote_key(key: Any) -> str:
    return quote(key) if isinstance(key, str) and is_prose(key) else str(key)


def _represent(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python refuses to write an int of more than 4,300 digits
        return f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a list"
