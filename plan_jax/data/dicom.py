"""Reading of DICOM files as 8-bit grey, as viewers show them."""

import contextlib
import io
import math
from collections.abc import Iterator, MutableSet
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Num, UInt8

from plan_jax.data import grey
from plan_jax.data.grey import ImageError
from plan_jax.types import UserError

MIN_PYDICOM = 3  # the first version that has `pydicom.pixels`
MAX_REASON = 60  # characters of a file's or a library's own words in a message
PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR")  # besides YBR_...
OVERLAY_GROUPS = range(0x6000, 0x6020, 2)
DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax of compressed elements
MAX_HEADER = 4096  # bytes that hold the transfer syntax
PIXEL_ELEMENTS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# What is noted of an image, besides a bit depth that was guessed.
OWN_RANGE, SIGNED, PADDED = "own range", "signed", "padded"


@contextlib.contextmanager
def _report_unreadable() -> Iterator[None]:
    """Turns what pydicom raises for a file that it cannot read into an ImageError."""
    try:
        yield
    except (ImageError, UserError):
        raise
    except Exception as error:  # pydicom raises many kinds
        raise ImageError(f"is not readable as DICOM ({_shorten(error)})") from None


class Window(NamedTuple):
    """The grey values that a viewer shows of a film, after the rescaling that the file asks for.

    Attributes:
      center: the level, shown as middle grey.
      width: from black to white; 1 or more.
      low: the smallest value of the film.
      high: the largest value.
    """

    center: float
    width: float
    low: float
    high: float


def is_dicom(data: bytes) -> bool:
    """Returns whether a file begins like DICOM, with its preamble or directly with an element."""
    starts_with_element = data[:2] in (b"\x02\x00", b"\x08\x00") and data[3:4] == b"\x00"
    return data[128:132] == b"DICM" or starts_with_element


@_report_unreadable()
def decode_dicom(
    data: bytes,
    path: Path,
    bit_depth: int = 0,
    notes: MutableSet[str | int] | None = None,
    window: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "Y X"]:
    """Decodes a DICOM file of one frame as grey in which bone is bright.

    Colour, also by palette, becomes luminance. Grey values are rescaled and shown in the file's
    first window that has a width. Without one, black and white are the ends of what `BitsStored`
    can hold; where that is the whole of 16 bits, the depth is that of `grey.find_bit_depth`. Black
    is 0 unless more than a marker is negative: then it is the most negative value of the depth.
    Pixels of padding are black and have no part in the scale. MONOCHROME1 is inverted.

    Args:
      data: content of the file.
      path: its path, for messages.
      bit_depth: depth of an image without a window that does not say it (0: guessed).
      notes: receives the bit depth if it was guessed, OWN_RANGE if black and white are those of the
        image itself, SIGNED if black is negative, PADDED if padding was recognised by its value.
      window: centre and width to show grey in, in place of those of the file.

    Raises:
      UserError: if pydicom is not installed, or too old.
      ImageError: if the pixels cannot be read; the message says what is missing.
    """
    notes = set() if notes is None else notes
    dataset, stored = _read_pixels(data, path)
    if _is_colour(stored, dataset):
        return _show_colour(stored, dataset)
    if window is not None:
        dataset.WindowCenter, dataset.WindowWidth = window
        dataset.VOILUTFunction = "LINEAR"
        if "VOILUTSequence" in dataset:
            del dataset.VOILUTSequence
    return _show_grey(stored, dataset, bit_depth, notes)


@_report_unreadable()
def read_window(data: bytes, path: Path, bit_depth: int = 0) -> Window | None:
    """Returns the window in which `decode_dicom` shows a file; None if it is in colour.

    That of a look-up table is the range of its values.

    Raises:
      UserError, ImageError: as `decode_dicom`.
    """
    dataset, stored = _read_pixels(data, path)
    if _is_colour(stored, dataset):
        return None
    from pydicom.pixels import apply_modality_lut

    _repair_scale(dataset)
    is_padding = _find_padding(stored, dataset)
    stored = _clear_overlays(stored, dataset)
    film = stored.ravel() if is_padding.all() else stored[~is_padding]
    values = apply_modality_lut(film, dataset)
    low, high = float(values.min()), float(values.max())
    if "WindowWidth" in dataset and "VOILUTSequence" not in dataset:
        return Window(float(dataset.WindowCenter), float(dataset.WindowWidth), low, high)
    black, white = low, high
    if "VOILUTSequence" not in dataset and "ModalityLUTSequence" not in dataset:
        ends = np.asarray(_find_range(film, dataset, bit_depth, set()))
        black, white = sorted(map(float, apply_modality_lut(ends, dataset)))
    return Window((black + white) / 2, max(white - black, 1.0), low, high)


def _read_pixels(data: bytes, path: Path) -> tuple[Any, Num[np.ndarray, "Y X *C"]]:
    """Returns the dataset of a file and its stored values [Y X] or [Y X 3]."""
    pydicom = _import_pydicom(path)
    has_prefix = data[128:132] == b"DICM"
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    if not has_prefix and "Rows" not in dataset:
        raise ImageError("is not an image that can be read")
    _check_elements(dataset, has_prefix)
    return dataset, _decode_pixels(dataset)


def _is_colour(stored: Num[np.ndarray, "Y X *C"], dataset: Any) -> bool:
    return stored.ndim == 3 or dataset.PhotometricInterpretation == "PALETTE COLOR"


def read_shape(data: bytes, path: Path) -> tuple[int, int]:
    """Returns the rows and columns that a file promises, without decoding it; 0 if it is silent.

    Raises:
      UserError: if pydicom is not installed, or too old.
      ImageError: if its elements are compressed: it may be far larger than it says.
    """
    pydicom = _import_pydicom(path)
    if DEFLATED in data[:MAX_HEADER]:
        raise ImageError("is DICOM whose elements are compressed; save it uncompressed")
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
        return _read_number(dataset, "Rows", 0), _read_number(dataset, "Columns", 0)
    except Exception:  # `decode_dicom` says what is wrong with the file
        return 0, 0


def read_tags(data: bytes, path: Path) -> dict[str, str]:
    """Returns what a DICOM file says of its kind and its view, in capitals; "" where it is silent.

    The keys are Modality, BodyPartExamined, ViewPosition and PatientOrientation, of which the first
    value, the direction of the rows, is returned.

    Raises:
      UserError: if pydicom is not installed, or too old.
    """
    pydicom = _import_pydicom(path)
    names = ("Modality", "BodyPartExamined", "ViewPosition", "PatientOrientation")
    tags = dict.fromkeys(names, "")
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
        for name in names:
            value = dataset.get(name) or ""
            first = value if isinstance(value, str) else next(iter(value), "")
            tags[name] = str(first).strip().upper()[:MAX_REASON]
    except Exception:  # `decode_dicom` says what is wrong with the file
        return tags
    return tags


def _import_pydicom(path: Path) -> Any:
    try:
        import pydicom
    except ImportError:
        raise UserError(f"image {path} is DICOM; pip install 'plan-jax[dicom]'") from None
    version = pydicom.__version__
    if int(version.partition(".")[0]) < MIN_PYDICOM:
        raise UserError(
            f"image {path} is DICOM, and pydicom {version} is too old to read it; "
            f"pip install 'pydicom>={MIN_PYDICOM}'"
        )
    return pydicom


def _shorten(error: Exception) -> str:
    """Returns the words of a library's error, or its kind if it has none.

    Where several decoders failed, its last line is what the last of them said.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:MAX_REASON]


# Pixels -----------------------------------------------------------------------------------------


def _check_elements(dataset: Any, has_prefix: bool) -> None:
    """Raises ImageError if a dataset has not what an image of one frame needs."""
    if not any(dataset.get(name) for name in PIXEL_ELEMENTS):
        modality = str(dataset.get("Modality") or "unknown")[:MAX_REASON]
        raise ImageError(f"is DICOM without pixel data (its modality is {modality})")
    for name in ("Rows", "Columns", "PhotometricInterpretation"):
        if not dataset.get(name):
            raise ImageError(f"is DICOM without {name}, which its pixels need")
    photometric = dataset.PhotometricInterpretation
    if photometric not in PHOTOMETRIC and not photometric.startswith("YBR_"):
        raise ImageError(
            f"is DICOM of photometric interpretation {photometric[:MAX_REASON]}, which is not "
            f"read; save it as {', '.join(PHOTOMETRIC)}"
        )
    if not getattr(dataset, "file_meta", {}).get("TransferSyntaxUID"):
        prefix = "" if has_prefix else "the prefix DICM and "
        raise ImageError(
            f"is DICOM without {prefix}the transfer syntax (0002,0010), which says how its pixels "
            "are coded; export it again as a whole DICOM file"
        )
    num_frames = max(_read_number(dataset, "NumberOfFrames", 1), 1)
    if num_frames > 1:
        raise ImageError(
            f"has {num_frames:g} frames, not one; save the frame to use as a file of its own"
        )
    dataset.NumberOfFrames = num_frames  # in place of an empty element


def _decode_pixels(dataset: Any) -> Num[np.ndarray, "Y X *C"]:
    """Returns the stored values, [Y X] or [Y X 3], where YBR has become RGB.

    Raises:
      ImageError: if they are damaged, or no decoder for them is installed.
    """
    from pydicom.pixels import get_decoder, pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except RuntimeError:  # pydicom has none
        raise ImageError(
            f"is coded as {syntax.name[:MAX_REASON]}, which pydicom cannot decode; "
            "save it uncompressed"
        ) from None
    if not decoder.is_available:
        raise ImageError(
            f"is compressed as {syntax.name}, and no decoder for it is installed; "
            f"{_name_decoders(decoder)}"
        )
    try:
        # Unused bits are left to `_find_outliers`, because padding may use them.
        is_signed = _read_number(dataset, "PixelRepresentation", 0) == 1
        return pixel_array(dataset, correct_unused_bits=is_signed)
    except Exception as error:
        reason = f"has pixels that cannot be decoded ({_shorten(error)})"
        # A decoder that reads one kind of a compression may not read all of them.
        if syntax.is_compressed and decoder.missing_dependencies:
            reason += f"; they are compressed as {syntax.name}, try {_name_decoders(decoder)}"
        raise ImageError(reason) from None


def _name_decoders(decoder: Any) -> str:
    """Returns which packages to install: those that pydicom says a decoder lacks.

    Its lines are `pylibjpeg - requires pylibjpeg>=2.0 and pylibjpeg-libjpeg>=2.1`.
    """
    choices = []
    for line in decoder.missing_dependencies:
        packages = [word.partition(">=")[0] for word in line.split() if ">=" in word]
        if packages:
            choices.append(" ".join({"gdcm": "python-gdcm"}.get(name, name) for name in packages))
    extra = "'plan-jax[dicom]', or " if "python-gdcm" in choices else ""
    return f"pip install {extra}{', or '.join(choices)}"


# Scale ------------------------------------------------------------------------------------------


def _show_colour(stored: Num[np.ndarray, "Y X *C"], dataset: Any) -> UInt8[np.ndarray, "Y X"]:
    from pydicom.pixels import apply_color_lut

    depth = _read_number(dataset, "BitsStored", 8)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        # Entries of 8 bits are also stored in tables of 16.
        depth = 8 if stored.max() < 256 else dataset.RedPaletteColorLookupTableDescriptor[2]
    return grey.clip_to_uint8(grey.convert_to_luminance(stored[..., :3]), 0.0, 2.0**depth - 1)


def _show_grey(
    stored: Num[np.ndarray, "Y X"], dataset: Any, bit_depth: int, notes: MutableSet[str | int]
) -> UInt8[np.ndarray, "Y X"]:
    """Returns the grey values that a viewer shows."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    _repair_scale(dataset)
    is_padding = _find_padding(stored, dataset)
    stored = _clear_overlays(stored, dataset)
    is_outlier = _find_outliers(stored, dataset) & ~is_padding
    is_unsigned = np.issubdtype(stored.dtype, np.unsignedinteger)
    if is_outlier.mean() > grey.MAX_MARKER:
        # Many files have a border of padding whose value no element declares.
        has_film = len(np.unique(stored[~is_padding & ~is_outlier])) > 1
        if has_film and np.ptp(stored[is_outlier]) == 0:
            is_padding |= is_outlier
            notes.add(PADDED)
        elif is_unsigned and "VOILUTSequence" not in dataset and "WindowWidth" not in dataset:
            raise ImageError(
                f"has grey values up to {stored[is_outlier].max()}, beyond its BitsStored "
                f"{dataset.BitsStored}; correct that element"
            )
    film = stored.ravel() if is_padding.all() else stored[~is_padding]
    values = apply_modality_lut(stored, dataset)
    if "VOILUTSequence" in dataset:
        length, first, _ = dataset.VOILUTSequence[0].LUTDescriptor
        table = apply_voi_lut(np.arange(first, first + (length or 2**16)), dataset)
        values = apply_voi_lut(np.round(values).astype(np.int64), dataset)
        black, white = table.min(), table.max()
    elif "WindowWidth" in dataset:
        # What infinity becomes is the black and the white of the window.
        shown = apply_voi_lut(np.append(values.ravel(), [-np.inf, np.inf]), dataset)
        values, (black, white) = shown[:-2].reshape(stored.shape), shown[-2:]
        if np.ptp(values) == 0 < np.ptp(film):
            raise ImageError(
                f"has a window (center {dataset.WindowCenter}, width {dataset.WindowWidth}) that "
                "shows none of its grey values; delete the window or correct it"
            )
    else:
        low, high = _find_range(film, dataset, bit_depth, notes)
        has_table = "ModalityLUTSequence" in dataset
        ends = np.arange(int(low), int(high) + 1) if has_table else np.asarray([low, high])
        limits = apply_modality_lut(ends, dataset)
        black, white = limits.min(), limits.max()
    pixels = grey.clip_to_uint8(values, float(black), float(white))
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = 255 - pixels
    return np.where(is_padding, np.uint8(0), pixels)


def _repair_scale(dataset: Any) -> None:
    """Completes or deletes elements of the scale that say nothing, as viewers ignore them.

    An empty slope is 1, an empty intercept 0. A window is the first with a centre and a width.
    """
    if not _has_table(dataset, "ModalityLUTSequence"):
        dataset.RescaleSlope = _read_number(dataset, "RescaleSlope", 1) or 1
        dataset.RescaleIntercept = _read_number(dataset, "RescaleIntercept", 0)
    dataset.PixelRepresentation = _read_number(dataset, "PixelRepresentation", 0)
    _has_table(dataset, "VOILUTSequence")
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    dataset.VOILUTFunction = (
        function if function in ("LINEAR", "LINEAR_EXACT", "SIGMOID") else "LINEAR"
    )
    min_width = 1 if dataset.VOILUTFunction == "LINEAR" else 1e-9
    centers, widths = (_read_numbers(dataset, f"Window{name}") for name in ("Center", "Width"))
    for center, width in zip(centers, widths, strict=False):
        if not math.isnan(center) and width >= min_width:
            dataset.WindowCenter, dataset.WindowWidth = center, width
            return
    for name in ("WindowCenter", "WindowWidth"):
        if name in dataset:
            del dataset[name]


def _has_table(dataset: Any, name: str) -> bool:
    """Returns whether a sequence has a look-up table; a sequence without one is deleted."""
    items = dataset.get(name)
    if items and items[0].get("LUTDescriptor") and items[0].get("LUTData"):
        entries = items[0].LUTData
        # pydicom takes bytes for entries of 16 bits, also where there is one byte an entry.
        if isinstance(entries, bytes) and len(entries) == (items[0].LUTDescriptor[0] or 2**16):
            items[0].add_new("LUTData", "US", list(entries))
        return True
    if name in dataset:
        del dataset[name]
    return False


def _find_padding(stored: Num[np.ndarray, "Y X"], dataset: Any) -> Bool[np.ndarray, "Y X"]:
    """Returns which pixels are padding, by its value or its range of values."""
    first = _read_number(dataset, "PixelPaddingValue", math.nan)
    last = _read_number(dataset, "PixelPaddingRangeLimit", first)
    return (stored >= min(first, last)) & (stored <= max(first, last))


def _find_outliers(stored: Num[np.ndarray, "Y X"], dataset: Any) -> Bool[np.ndarray, "Y X"]:
    """Returns which pixels use bits beyond `BitsStored`; of values with a sign, which have it."""
    if not np.issubdtype(stored.dtype, np.unsignedinteger):
        return stored < 0
    return stored >> _read_number(dataset, "BitsStored", 16) > 0


def _clear_overlays(stored: Num[np.ndarray, "Y X"], dataset: Any) -> Num[np.ndarray, "Y X"]:
    """Returns values without the overlays that old files store in the bits beyond `BitsStored`."""
    positions = [dataset.get((group, 0x0102)) for group in OVERLAY_GROUPS]
    has_overlay = any(position is not None and position.value for position in positions)
    if has_overlay and np.issubdtype(stored.dtype, np.unsignedinteger):
        return stored & (2 ** _read_number(dataset, "BitsStored", 16) - 1)
    return stored


def _find_range(
    film: Num[np.ndarray, " N"], dataset: Any, bit_depth: int, notes: MutableSet[str | int]
) -> tuple[float, float]:
    """Returns the stored values of black and white."""
    low, high = float(film.min()), float(film.max())
    allocated = _read_number(dataset, "BitsAllocated", 16)
    bits = _read_number(dataset, "BitsStored", allocated)
    if np.issubdtype(film.dtype, np.floating):
        if grey.is_unit(film):
            return 0.0, 1.0
        notes.add(OWN_RANGE)
        return low, high
    # A few negative pixels are a marker: they must not change the scale of all the rest.
    if is_signed := bool(np.mean(film < 0) > grey.MAX_MARKER):
        notes.add(SIGNED)
    if bits < allocated or allocated <= 8:
        depth = bits - dataset.PixelRepresentation
    elif max(high, -low if is_signed else 0) >= 2**16:
        notes.add(OWN_RANGE)
        return (low if is_signed else 0.0), high
    elif bit_depth:
        depth = bit_depth - is_signed
    else:
        # Of 16 bits with a sign, 15 hold what is not negative.
        positive = np.abs(film.astype(np.int64)) if is_signed else np.clip(film, 0, None)
        depth = min(grey.find_bit_depth(positive), allocated - dataset.PixelRepresentation)
        notes.add(depth + is_signed)
    return (-(2.0**depth) if is_signed else 0.0), 2.0**depth - 1


def _read_numbers(dataset: Any, name: str) -> list[float]:
    """Returns the values of an element, NaN for those that are not numbers."""
    try:
        value = dataset.get(name)
    except Exception:  # of pydicom, for a text that is not a number
        return []
    items = value if isinstance(value, list | tuple) or hasattr(value, "append") else [value]
    numbers = []
    for item in items:
        try:
            number = float(item)
        except (TypeError, ValueError):
            number = math.nan
        numbers.append(number if math.isfinite(number) else math.nan)
    return numbers


def _read_number(dataset: Any, name: str, default: Any) -> Any:
    """Returns the first value of an element, an int if it is whole, or a default without one."""
    number = next(iter(_read_numbers(dataset, name)), math.nan)
    if math.isnan(number):
        return default
    return int(number) if number == int(number) else number
