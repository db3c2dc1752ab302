"""The one TFDS schema of every dataset on disk: a record to an example, and back."""

import io
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Bool, Float32, Int8, UInt8
from PIL import Image

from plan_jax.types import Phrase, Record

_ENCODED = {"image": tfds.decode.SkipDecoding()}  # ours, with Pillow: TFDS's asks for OpenCV


class Row(NamedTuple):
    """What training reads of a study."""

    image: UInt8[np.ndarray, "Y X 1"]
    text: str
    labels: Int8[np.ndarray, " F"]
    regions: Float32[np.ndarray, "R 4"]


def feature_dict() -> tfds.features.FeaturesDict:
    """Return the schema that every builder declares; no size or class count is part of it.

    Masks are packed bits, `[n, Y, ceil(X / 8)]`, in the order of the phrases (or of `anatomy` in
    the builder's metadata); n = 0 when there are none.
    """
    packed = {"shape": (None, None, None), "dtype": np.uint8, "encoding": "zlib"}
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(
                shape=(None, None, 1), dtype=np.uint8, encoding_format="png"
            ),
            "text": tfds.features.Text(),
            "patient_id": tfds.features.Text(),
            "labels": tfds.features.Tensor(shape=(None,), dtype=np.int8),
            "regions": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
            "phrases": tfds.features.Sequence(
                {
                    "text": tfds.features.Text(),
                    "finding": np.int32,
                    "key": tfds.features.Text(),
                    "bare": tfds.features.Text(),
                }
            ),
            "boxes": tfds.features.Sequence(tfds.features.Tensor(shape=(4,), dtype=np.float32)),
            "box_phrase": tfds.features.Sequence(np.int32),
            "masks": tfds.features.Tensor(**packed),
            "anatomy": tfds.features.Tensor(**packed),
            "triplets": tfds.features.Sequence(
                {
                    "region": tfds.features.Text(),
                    "finding": tfds.features.Text(),
                    "existence": np.int32,
                }
            ),
        }
    )


def to_example(record: Record) -> dict[str, Any]:
    """Turn a record into an example of `feature_dict()`, ready for `_generate_examples` to yield.

    The image may be UInt8[Y X] or UInt8[Y X 1]. If any phrase has a mask, every phrase gets one
    (all False where the phrase has none). Anatomy is stored in the order of the record's mapping,
    which has to be the order of `anatomy` in the builder's metadata, or empty.
    """
    image = record.image.reshape(record.image.shape[:2])
    boxes = [(box, i) for i, phrase in enumerate(record.phrases) for box in phrase.boxes]
    nothing = np.zeros(image.shape, bool)
    masks = [nothing if phrase.mask is None else phrase.mask for phrase in record.phrases]
    if all(phrase.mask is None for phrase in record.phrases):
        masks = []
    return {
        "image": _png(image),
        "text": record.text,
        "patient_id": record.patient_id,
        "labels": np.asarray(record.labels, np.int8),
        "regions": np.asarray(record.regions, np.float32).reshape(-1, 4),
        "phrases": [
            {"text": p.text, "finding": p.finding, "key": p.key, "bare": p.bare}
            for p in record.phrases
        ],
        "boxes": np.asarray([box for box, _ in boxes], np.float32).reshape(-1, 4),
        "box_phrase": np.asarray([i for _, i in boxes], np.int32),
        "masks": pack(masks, image.shape),
        "anatomy": pack(list(record.anatomy.values()), image.shape),
        "triplets": [
            {"region": region, "finding": finding, "existence": existence}
            for region, finding, existence in record.triplets
        ],
    }


def pack(
    masks: list[Bool[np.ndarray, "Y X"]], shape: tuple[int, int]
) -> UInt8[np.ndarray, "n Y _"]:
    """Pack boolean masks of one shape into bits along their rows.

    >>> pack([np.eye(2, dtype=bool)], (2, 2)).tolist()
    [[[128], [64]]]
    """
    if not masks:
        return np.zeros((0, shape[0], (shape[1] + 7) // 8), np.uint8)
    return np.packbits(np.stack(masks).astype(bool), axis=-1)


def unpack(packed: UInt8[np.ndarray, "n Y _"], width: int) -> Bool[np.ndarray, "n Y X"]:
    """Undo `pack` for masks of the given width.

    >>> unpack(np.asarray([[[128], [64]]], np.uint8), 2).astype(int).tolist()
    [[[1, 0], [0, 1]]]
    """
    return np.unpackbits(packed, axis=-1, count=width).astype(bool)


def _png(image: UInt8[np.ndarray, "Y X"]) -> io.BytesIO:
    """Encode lightly: preparing is several times faster than at the default level."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "png", compress_level=1)
    out.seek(0)
    return out


def from_example(example: dict[str, Any], anatomy: tuple[str, ...] = ()) -> Record:
    """Turn an example of `feature_dict()`, its image still encoded, back into a record."""
    image = _image(example["image"])
    phrases = _rows(example["phrases"])
    masks = unpack(example["masks"], image.shape[1])
    owner = np.asarray(example["box_phrase"])
    boxes = np.asarray(example["boxes"], np.float32).reshape(-1, 4)
    regions = unpack(example["anatomy"], image.shape[1])
    return Record(
        image=image,
        text=_string(example["text"]),
        patient_id=_string(example["patient_id"]),
        labels=np.asarray(example["labels"], np.int8),
        regions=np.asarray(example["regions"], np.float32).reshape(-1, 4),
        phrases=tuple(
            Phrase(
                text=_string(row["text"]),
                finding=int(row["finding"]),
                key=_string(row["key"]),
                bare=_string(row["bare"]),
                boxes=tuple(tuple(map(float, box)) for box in boxes[owner == i]),
                mask=masks[i] if len(masks) and masks[i].any() else None,
            )
            for i, row in enumerate(phrases)
        ),
        anatomy=dict(zip(anatomy, regions, strict=True)) if len(regions) else {},
        triplets=tuple(
            (_string(row["region"]), _string(row["finding"]), int(row["existence"]))
            for row in _rows(example["triplets"])
        ),
    )


def serialize(record: Record) -> bytes:
    """Serialise a record as it lies on disk."""
    return _schema().serialize_example(to_example(record))


def deserialize(data: bytes, anatomy: tuple[str, ...] = ()) -> Record:
    """Undo `serialize`; `anatomy` names the record's anatomy masks, in order."""
    return from_example(_schema().deserialize_example_np(data, decoders=_ENCODED), anatomy)


def deserialize_row(data: bytes) -> Row:
    """Decode image, text, labels and regions of a serialised record, and nothing else."""
    found = _brief().deserialize_example_np(data, decoders=_ENCODED)
    regions = np.asarray(found["regions"], np.float32).reshape(-1, 4)
    return Row(_image(found["image"]), _string(found["text"]), found["labels"], regions)


@cache
def _schema() -> tfds.features.FeaturesDict:
    return feature_dict()


@cache
def _brief() -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict({name: _schema()[name] for name in Row._fields})


def _image(encoded: bytes) -> UInt8[np.ndarray, "Y X 1"]:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.array(image, np.uint8)[..., None]


def _string(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _rows(columns: dict[str, Any] | list) -> list[dict[str, Any]]:
    """Turn TFDS's dict of columns back into rows."""
    if isinstance(columns, list):
        return columns
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
