"""The TFDS schema that all datasets share on disk, and conversion of records to it and back."""

import io
import struct
import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int8, Int32, UInt8
from PIL import Image

from plan_jax.data.tfds import tfds
from plan_jax.types import Geometry, Phrase, Record

_PNG_SIGNATURE, _PNG_AVERAGE = b"\x89PNG\r\n\x1a\n", 3
# Images are decoded here with Pillow, because TFDS decodes them with OpenCV or TensorFlow, neither
# of which is a dependency.
_DECODERS = {"image": tfds.decode.SkipDecoding()}


class Pair(NamedTuple):
    """The part of a record that training reads.

    `labels` and the boxes `regions` (x0, y0, x1, y1; pixels) are in the order of the dataset's
    `findings` and `region_names`. `sections` are the parts of a report by name.
    """

    image: UInt8[np.ndarray, "Y X 1"]
    text: str
    labels: Int8[np.ndarray, " F"]
    regions: Float32[np.ndarray, "R 4"]
    sections: Mapping[str, str]


def record_features() -> tfds.features.FeaturesDict:
    """Returns the schema that every builder declares; no image size or class count is part of it.

    Masks are packed bits, `[N, Y, ceil(X / 8)]`, in the order of the phrases (or of `anatomy` in
    the builder's metadata); N = 0 when there are none.
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
            # The boxes of all phrases in one list; box_phrase is the index of each box's phrase.
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
            "record_id": tfds.features.Text(),
            "study_id": tfds.features.Text(),
            "view": tfds.features.Text(),
            "sections": tfds.features.Sequence(
                {"name": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            # Rows and columns of the original image; nothing where the image is the original.
            "original_shape": tfds.features.Tensor(shape=(None,), dtype=np.int32),
        }
    )


# Encoding ---------------------------------------------------------------------------------------


def to_example(record: Record) -> dict[str, Any]:
    """Returns a record as an example of `record_features()`, for `_generate_examples` to yield.

    The image may be UInt8[Y X] or UInt8[Y X 1]. If any phrase has a mask, every phrase is stored
    with one (all False where the phrase has none). Anatomy is stored in the order of the record's
    mapping, which must be the order of `anatomy` in the builder's metadata, or be empty.
    """
    shape = rows, columns = record.image.shape[:2]
    boxes = [(box, index) for index, phrase in enumerate(record.phrases) for box in phrase.boxes]
    empty_mask = np.zeros(shape, bool)
    masks = [empty_mask if phrase.mask is None else phrase.mask for phrase in record.phrases]
    if all(phrase.mask is None for phrase in record.phrases):
        masks = []
    return {
        "image": encode_png(record.image.reshape(rows, columns)),
        "text": record.text,
        "patient_id": record.patient_id,
        "labels": np.asarray(record.labels, np.int8),
        "regions": np.asarray(record.regions, np.float32).reshape(-1, 4),
        "phrases": [
            {
                "text": phrase.text,
                "finding": phrase.finding,
                "key": phrase.key,
                "bare": phrase.bare,
            }
            for phrase in record.phrases
        ],
        "boxes": np.asarray([box for box, _ in boxes], np.float32).reshape(-1, 4),
        "box_phrase": np.asarray([index for _, index in boxes], np.int32),
        "masks": pack_masks(masks, shape),
        "anatomy": pack_masks(list(record.anatomy.values()), shape),
        "triplets": [
            {"region": region, "finding": finding, "existence": existence}
            for region, finding, existence in record.triplets
        ],
        "record_id": record.record_id,
        "study_id": record.study_id,
        "view": record.view,
        "sections": [{"name": name, "text": text} for name, text in record.sections.items()],
        "original_shape": np.asarray(record.geometry.shape if record.geometry else (), np.int32),
    }


def serialize(record: Record) -> bytes:
    """Returns a record as the bytes that are stored on disk."""
    return _cached_features().serialize_example(to_example(record))


def pack_masks(
    masks: list[Bool[np.ndarray, "Y X"]], shape: tuple[int, int]
) -> UInt8[np.ndarray, "N Y _"]:
    """Packs N boolean masks of one shape into bits along their rows.

    >>> pack_masks([np.eye(2, dtype=bool)], (2, 2)).tolist()
    [[[128], [64]]]
    """
    if not masks:
        return np.zeros((0, shape[0], (shape[1] + 7) // 8), np.uint8)
    return np.packbits(np.stack(masks).astype(bool), axis=-1)


def encode_png(image: UInt8[np.ndarray, "Y X"]) -> io.BytesIO:
    """Returns an image as PNG, in half of Pillow's time, which tries five filters for each row.

    The filter of all rows is Average: a pixel is stored as its difference from the mean of the
    pixels to the left and above, rounded down.
    """
    rows, columns = image.shape
    mean = np.zeros((rows, columns), np.uint16)
    mean[:, 1:] = image[:, :-1]
    mean[1:] += image[:-1]
    mean >>= 1
    lines = np.full((rows, columns + 1), _PNG_AVERAGE, np.uint8)
    np.subtract(image, mean.astype(np.uint8), out=lines[:, 1:])
    # Radiographs repeat no patterns: a search for them takes time and makes files larger.
    packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)  # 8 bits of grey
    pixels = packer.compress(lines.tobytes()) + packer.flush()
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return io.BytesIO(_PNG_SIGNATURE + b"".join(_frame_chunk(*chunk) for chunk in chunks))


def _frame_chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a chunk of PNG: length, kind, content and checksum."""
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


# Decoding ---------------------------------------------------------------------------------------


def from_example(
    example: dict[str, Any], anatomy_names: tuple[str, ...] = (), *, with_image: bool = True
) -> Record:
    """Returns the record of an example of `record_features()` whose image is still encoded.

    Without `with_image` the image is not decoded: it is black, has its shape and takes no memory.
    """
    image = decode_png(example["image"]) if with_image else _blank_png(example["image"])
    width = image.shape[1]
    phrases = _transpose_columns(example["phrases"])
    masks_NYX = unpack_masks(example["masks"], width)
    anatomy_NYX = unpack_masks(example["anatomy"], width)
    box_phrase = np.asarray(example["box_phrase"])
    boxes = np.asarray(example["boxes"], np.float32).reshape(-1, 4)
    return Record(
        image=image,
        text=_decode_text(example["text"]),
        patient_id=_decode_text(example["patient_id"]),
        labels=np.asarray(example["labels"], np.int8),
        regions=np.asarray(example["regions"], np.float32).reshape(-1, 4),
        phrases=tuple(
            Phrase(
                text=_decode_text(phrase["text"]),
                finding=int(phrase["finding"]),
                key=_decode_text(phrase["key"]),
                bare=_decode_text(phrase["bare"]),
                boxes=tuple(
                    (x0, y0, x1, y1) for x0, y0, x1, y1 in boxes[box_phrase == index].tolist()
                ),
                # `to_example` stores a missing mask as an empty one.
                mask=masks_NYX[index] if len(masks_NYX) and masks_NYX[index].any() else None,
            )
            for index, phrase in enumerate(phrases)
        ),
        anatomy=dict(zip(anatomy_names, anatomy_NYX, strict=True)) if len(anatomy_NYX) else {},
        triplets=tuple(
            (
                _decode_text(triplet["region"]),
                _decode_text(triplet["finding"]),
                int(triplet["existence"]),
            )
            for triplet in _transpose_columns(example["triplets"])
        ),
        record_id=_decode_text(example["record_id"]),
        study_id=_decode_text(example["study_id"]),
        view=_decode_text(example["view"]),
        sections=_decode_sections(example["sections"]),
        geometry=_locate(np.asarray(example["original_shape"], np.int32), image.shape[:2]),
    )


def _decode_sections(columns: dict[str, Any] | list) -> dict[str, str]:
    rows = _transpose_columns(columns)
    return {_decode_text(row["name"]): _decode_text(row["text"]) for row in rows}


def _locate(original_shape: Int32[np.ndarray, " N"], shape: tuple[int, int]) -> Geometry:
    """Returns where an original of that shape, or of the image's own, lies in an image."""
    rows, columns = (int(number) for number in original_shape) if len(original_shape) else shape
    return Geometry((rows, columns), (shape[0] / rows, shape[1] / columns))


def deserialize(
    data: bytes, anatomy_names: tuple[str, ...] = (), *, with_image: bool = True
) -> Record:
    """Returns the record of serialised bytes.

    Args:
      data: the serialised record.
      anatomy_names: the names of the record's anatomy masks, in the order in which they are stored.
      with_image: False for a black image, see `from_example`.
    """
    example = _cached_features().deserialize_example_np(data, decoders=_DECODERS)
    return from_example(example, anatomy_names, with_image=with_image)


def deserialize_pair(data: bytes) -> Pair:
    """Returns the part of a serialised record that training reads; decodes nothing else."""
    example = _select_features(*Pair._fields).deserialize_example_np(data, decoders=_DECODERS)
    return Pair(
        image=decode_png(example["image"]),
        text=_decode_text(example["text"]),
        labels=example["labels"],
        regions=np.asarray(example["regions"], np.float32).reshape(-1, 4),
        sections=_decode_sections(example["sections"]),
    )


def deserialize_report(data: bytes) -> tuple[str, dict[str, str]]:
    """Returns the text of a serialised record and the sections of its report; nothing else."""
    example = _select_features("text", "sections").deserialize_example_np(data)
    return _decode_text(example["text"]), _decode_sections(example["sections"])


def deserialize_image(data: bytes) -> UInt8[np.ndarray, "Y X 1"]:
    """Returns the image [Y X 1] of a serialised record; decodes nothing else."""
    features = _select_features("image")
    return decode_png(features.deserialize_example_np(data, decoders=_DECODERS)["image"])


def deserialize_field(data: bytes, name: str) -> Any:
    """Returns `labels` Int8[F], or a text (`text`, `patient_id` ...), of a serialised record.

    Nothing else is decoded.
    """
    value = _select_features(name).deserialize_example_np(data)[name]
    return np.asarray(value, np.int8) if name == "labels" else _decode_text(value)


def unpack_masks(packed: UInt8[np.ndarray, "N Y _"], width: int) -> Bool[np.ndarray, "N Y X"]:
    """Inverts `pack_masks` for masks of `width` columns.

    >>> unpack_masks(np.asarray([[[128], [64]]], np.uint8), 2).astype(int).tolist()
    [[[1, 0], [0, 1]]]
    """
    # `count` drops the bits that pad a row to whole bytes.
    return np.unpackbits(packed, axis=-1, count=width).astype(bool)


@cache
def _cached_features() -> tfds.features.FeaturesDict:
    return record_features()


@cache
def _select_features(*names: str) -> tfds.features.FeaturesDict:
    """Returns a part of the schema, to decode nothing else."""
    features = _cached_features()
    return tfds.features.FeaturesDict({name: features[name] for name in names})


def decode_png(encoded: bytes) -> UInt8[np.ndarray, "Y X 1"]:
    """Returns the image of a PNG."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.array(image, np.uint8)[..., None]


def _blank_png(encoded: bytes) -> UInt8[np.ndarray, "Y X 1"]:
    """Returns a black image of the shape of an encoded one, of which only the header is read."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.broadcast_to(np.uint8(0), (image.height, image.width, 1))


def _decode_text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _transpose_columns(columns: dict[str, Any] | list) -> list[dict[str, Any]]:
    """Returns the rows of a feature that TFDS reads as a dict of columns."""
    if isinstance(columns, list):  # an example that has not been on disk
        return columns
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
