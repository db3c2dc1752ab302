"""Scores and pictures of single examples in the folder of a run, so that runs can be compared.

`examples.npz` holds what each metric is computed from, example by example, and the phrases of the
page with their heat maps. Examples are identified by digests of their names, without their texts.
"""

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt64

from plan_jax.logger import write_atomically
from plan_jax.metrics.intervals import STATISTICS
from plan_jax.types import ExampleScores, PhraseExample, UserError

FILE = "examples.npz"
_PICTURES = ("image", "truth", "heat_maps")
_READ_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error),
    RuntimeError,  # an archive with a password or of an unknown method, deeply nested JSON
)


@dataclass(frozen=True)
class ScoreTable:
    """The `ExampleScores` of a metric as they are stored: digests in place of the names."""

    digests: UInt64[np.ndarray, " N"]
    table: Float[np.ndarray, "N 2 F"]
    statistic: str


@dataclass(frozen=True)
class StoredExamples:
    """The content of `examples.npz`: data and split, scores by key of the metric, and phrases.

    Attributes:
      data: the dataset and the split.
      scores: scores of single examples, by the key of the metric.
      phrases: those of the page.
      options: what each task was measured with, by its name.
      is_stale: whether the file was left out, because it belongs to other metrics.
    """

    data: str = ""
    scores: Mapping[str, ScoreTable] = field(default_factory=dict)
    phrases: Sequence[PhraseExample] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    is_stale: bool = False


def save_examples(
    folder: Path,
    data: str,
    scores: Mapping[str, ExampleScores],
    rows: Sequence[Any],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes `examples.npz` into a folder, for the `metrics.json` that is there.

    Args:
      folder: the folder of a run or of an evaluation.
      data: the dataset and the split, for people.
      scores: scores of single examples, by the key of the metric.
      rows: examples of the page, of which those of phrases are stored.
      options: what each task was measured with, by its name.
    """
    phrases = [row for row in rows if isinstance(row, PhraseExample)]
    arrays: dict[str, np.ndarray] = {}
    for i, scored in enumerate(scores.values()):
        arrays[f"table_{i}"] = scored.table
        arrays[f"digests_{i}"] = np.array([digest(name) for name in scored.names], np.uint64)
    for i, phrase in enumerate(phrases):
        arrays |= {f"{name}_{i}": np.asarray(getattr(phrase, name)) for name in _PICTURES}
    content = {
        "data": data,
        "options": options or {},
        "metrics": _hash_metrics(folder),
        "scores": [[key, scored.statistic] for key, scored in scores.items()],
        "phrases": [
            [phrase.kind, phrase.phrase, phrase.cnr, phrase.pointing, str(digest(phrase.name))]
            for phrase in phrases
        ],
    }
    stream = io.BytesIO()
    np.savez_compressed(stream, content=np.array(json.dumps(content)), **arrays)  # type: ignore[arg-type]
    write_atomically(folder / FILE, stream.getvalue())


def load_examples(folder: Path) -> StoredExamples:
    """Loads `examples.npz`; runs of earlier versions have none, and then it is empty.

    It is empty too if the file was written for other metrics than those in the folder.

    Raises:
      UserError: the file cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return StoredExamples()
    try:
        with np.load(path) as arrays:
            content = json.loads(str(arrays["content"]))
            if content.get("metrics") != _hash_metrics(folder):
                return StoredExamples(is_stale=True)
            scores = {
                key: ScoreTable(arrays[f"digests_{i}"], arrays[f"table_{i}"], statistic)
                for i, (key, statistic) in enumerate(content["scores"])
                if statistic in STATISTICS
            }
            phrases = []
            for i, (kind, phrase, cnr, pointing, name) in enumerate(content["phrases"]):
                image, truth, heat_maps = (arrays[f"{part}_{i}"] for part in _PICTURES)
                phrases.append(
                    PhraseExample(kind, phrase, image, truth, heat_maps, cnr, pointing, name)
                )
            return StoredExamples(content["data"], scores, phrases, content["options"])
    except _READ_ERRORS as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
        raise UserError(
            f"{path} cannot be read ({reason}); delete it, or evaluate the run again"
        ) from None


def _hash_metrics(folder: Path) -> str:
    path = folder / "metrics.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def digest(name: str) -> int:
    """Returns a number of 64 bits that stands for a name.

    >>> digest("0 effusion on the left") == digest("0 effusion on the right")
    False
    """
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
