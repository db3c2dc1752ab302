"""Reading of the images in which phrases are located, and checks that they are frontal films.

The limits of the checks were measured by `tools/measure_prediction.py`; docs/predict.md has the
figures.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from plan_jax.data import dicom, images, transforms
from plan_jax.data.grey import ImageError
from plan_jax.types import UserError, check_local

# Kinds of DICOM that show a projection; OT and SC are scanned films, "" says nothing.
FILM_MODALITIES = ("CR", "DX", "RG", "RF", "XA", "OT", "SC", "")
CHEST_WORDS = ("CHEST", "THORAX", "LUNG")
MAX_HUE_SPREAD = 2.0  # of a film, also a tinted one with marks in colour
MIN_SYMMETRY = 0.45  # of a frontal film
MIN_RANGE = 8  # grey levels of 255 between the darkest and the brightest pixel
LATERAL = "is a lateral view"
MIRRORED = "is mirrored"
SYMMETRY_SIDE = 16  # cells of the sides on which the symmetry is computed
MAX_AXIS_SHIFT = 2  # cells that the body's axis may lie beside the centre of a film
PICTURE_SIDE = 1024  # pixels of the longer side of a picture: more does not fit a screen


@dataclass(frozen=True, eq=False)
class Film:
    """An image as the model reads it.

    Attributes:
      name: its path, or `the array`.
      shape: its rows and columns, upright.
      stored_shape: rows and columns from which it was fitted to the square.
      square: the model's input.
      picture: the image for figures, scaled down to `PICTURE_SIDE`; None if it was not asked for.
      fault: what says that it is not a frontal film, as the end of a sentence; "" if nothing does.
      notes: sentences on what makes a heat map doubtful.
    """

    name: str
    shape: tuple[int, int]
    stored_shape: tuple[int, int]
    square: UInt8[np.ndarray, "size size 1"]
    picture: UInt8[np.ndarray, "V U 1"] | None = None
    fault: str = ""
    notes: tuple[str, ...] = ()


def read_film(
    source: str | Path | Shaped[np.ndarray, "*shape"],
    size: int,
    *,
    stored_size: int = 0,
    bit_depth: int = 0,
    min_side: int = 1,
    check: bool = True,
    with_picture: bool = False,
    name: str = "",
    window: tuple[float, float] | None = None,
) -> Film:
    """Reads a film from a file, or from an array UInt8[Y X] or UInt8[Y X 1] of grey values.

    Args:
      source: the file: PNG, JPEG, DICOM ...; or the array.
      size: side of the model's input.
      stored_size: longer side at which the dataset of the model stored its images, so that the
        model sees the pixels that it was trained on; 0 is `size`.
      bit_depth: that of `images.read_image`.
      min_side: the fewest pixels of the longer side that make sense.
      check: whether to refuse what is not a frontal film; otherwise a note says what it is.
      with_picture: whether the picture for figures is needed.
      name: name of the image in messages; by default its path, or `the array`.
      window: of DICOM, see `dicom.decode_dicom`.

    Raises:
      UserError: the image cannot be read, has no contrast or too few pixels, or is refused.
    """
    notes: list[str] = []
    fault = ""
    if isinstance(source, np.ndarray):
        name, pixels = name or "the array", _check_array(source)
        shape = pixels.shape
        stored = transforms.resize_image(
            pixels, *transforms.scale_shape(shape, stored_size or size)
        )
    else:
        path = _check_path(source)
        name = name or str(source)
        try:
            fault, notes = _read_tags(path)
            if not (fault and check):
                stored, shape = images.read_image(
                    path, stored_size or size, bit_depth, window=window
                )
                fault = fault or _find_colour(path)
        except OSError as error:
            raise _name_unreadable(path, name, error) from None
        except ValueError as error:
            remedy = "" if ";" in str(error) else "; pass a PNG, JPEG or DICOM file"
            raise UserError(f"{name} {error}{remedy}") from None
    if fault and check:
        raise UserError(
            f"{name} {fault}, not a frontal chest radiograph; leave it out, or pass --no-check "
            "(check=False)"
        )
    notes = [fault, *notes] if fault else notes
    if max(shape) < min_side:
        raise UserError(
            f"{name} has {shape[0]} x {shape[1]} pixels, fewer than the {min_side} cells of the "
            "model's map; use a larger image"
        )
    if (contrast := int(np.ptp(stored))) < MIN_RANGE:
        raise UserError(
            f"{name} is blank: its pixels differ by {contrast} of 255 grey levels; use a film with "
            "contrast"
        )
    if max(shape) < size:
        notes.append(f"was enlarged from {shape[0]} x {shape[1]} pixels to the model's {size}")
    square = transforms.fit_image(stored[..., None], size)
    if not fault and min(stored.shape) >= SYMMETRY_SIDE:
        symmetry = measure_symmetry(stored)
        if symmetry < MIN_SYMMETRY:
            notes.append(
                f"may be a lateral view or turned: its symmetry is {symmetry:.2f}, below "
                f"{MIN_SYMMETRY}"
            )
    film = Film(name, shape, stored.shape, square, fault=fault, notes=tuple(notes))
    if not with_picture:
        return film
    return replace(film, picture=_read_picture(source, shape, bit_depth, window))


def measure_symmetry(pixels: UInt8[np.ndarray, "Y X"]) -> float:
    """Computes how similar a film is to its mirror image: a correlation from -1 to 1.

    The film is reduced to 16 x 16 cells, and each cell replaced by the share of cells that are not
    brighter. The correlation is that of the columns that both have, at the axis, up to two cells
    beside the centre, where it is largest.
    """
    small = transforms.resize_image(pixels, SYMMETRY_SIDE, SYMMETRY_SIDE)
    order = np.sort(small, axis=None)
    ranks = np.searchsorted(order, small, side="right") / small.size
    correlations = []
    for shift in range(-MAX_AXIS_SHIFT, MAX_AXIS_SHIFT + 1):
        part = ranks[:, max(shift, 0) : SYMMETRY_SIDE + min(shift, 0)]
        correlations.append(_correlate(part, part[:, ::-1]))
    return max(correlations)


def _correlate(first: Float[np.ndarray, "Y X"], second: Float[np.ndarray, "Y X"]) -> float:
    first, second = first - first.mean(), second - second.mean()
    norm = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / norm) if norm > 0 else 1.0


def _check_path(source: object) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"the image is of type {type(source).__name__}; pass a path, or grey values as a numpy "
            "array of uint8 [Y X]"
        )
    if not str(source):
        raise UserError("the image has an empty path; pass the path of a file")
    check_local("image", source)
    return Path(source)


def _check_array(array: Shaped[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "Y X"]:
    is_grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if array.dtype != np.uint8 or not is_grey or not array.size:
        raise UserError(
            f"the array is {array.dtype}{list(array.shape)}; pass grey values as uint8 [Y X]"
        )
    return array if array.ndim == 2 else array[..., 0]


def _read_tags(path: Path) -> tuple[str, list[str]]:
    """Returns why a DICOM file is not a frontal film, or "", and notes; both end a sentence.

    Raises:
      OSError, ValueError: if the file is missing, or a pipe.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # to open a pipe would wait
        raise ImageError("is not a file")
    with path.open("rb") as file:
        if not dicom.is_dicom(file.read(132)):
            return "", []
    tags = dicom.read_tags(path.read_bytes(), path)
    modality, view, direction = (
        tags[name] for name in ("Modality", "ViewPosition", "PatientOrientation")
    )
    part = tags["BodyPartExamined"]
    is_chest = not part or any(word in part for word in CHEST_WORDS)
    notes = [] if is_chest else [f"shows {part}, by its BodyPartExamined"]
    if modality not in FILM_MODALITIES:
        return f"is DICOM of modality {modality}", notes
    # The rows of a frontal film run between the patient's left and right.
    if view in ("LL", "RL") or "LAT" in view:
        return f"{LATERAL} (ViewPosition {view})", notes
    if direction[:1] in ("A", "P"):
        return f"{LATERAL} (PatientOrientation {direction})", notes
    if direction[:1] == "R":  # towards which the rows run; in a frontal film it is the left
        notes.append(
            f"{MIRRORED} (PatientOrientation {direction}), so that its left half is the patient's "
            "left, and the model takes it for the right"
        )
    return "", notes


def _find_colour(path: Path) -> str:
    """Returns that a file is in colour as a photograph is, or ""."""
    with path.open("rb") as file:
        if dicom.is_dicom(file.read(132)):
            return ""
    spread = images.measure_hue_spread(path)
    if spread <= MAX_HUE_SPREAD:
        return ""
    return f"is in colour (its hues spread by {spread:.1f}, those of films by {MAX_HUE_SPREAD:g})"


def _name_unreadable(path: Path, name: str, error: OSError) -> UserError:
    if os.path.isdir(path):  # unlike Path, it raises nothing
        return UserError(f"{name} is a folder; pass the images in it, as {path}/*.png")
    return UserError(f"{name} cannot be read ({error.strerror or error}); correct the path")


def _read_picture(
    source: str | Path | Shaped[np.ndarray, "*shape"],
    shape: tuple[int, int],
    bit_depth: int,
    window: tuple[float, float] | None,
) -> UInt8[np.ndarray, "V U 1"]:
    side = min(max(shape), PICTURE_SIDE)  # never scaled up
    if isinstance(source, np.ndarray):
        rows_and_columns = transforms.scale_shape(shape, side)
        return transforms.resize_image(_check_array(source), *rows_and_columns)[..., None]
    return images.read_image(Path(source), side, bit_depth, window=window)[0][..., None]
