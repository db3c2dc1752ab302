"""The heat map of a phrase in an image, on the command line.

    python -m plan_jax.predict --checkpoint runs/demo --image chest.png \\
        --text "consolidation in the left lower zone" --out heat.png

No network is needed. Left and right are the patient's, as in a report.
"""

from plan_jax import command

if __name__ == "__main__":
    command.end_on_signals()  # before the imports, which take seconds

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from jaxtyping import Float, UInt8

from plan_jax.types import Model, UserError

MAX_SIDE = 1024  # pixels of the longer side of the picture: more does not fit a screen
SUFFIXES = (".png", ".jpg", ".jpeg")


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises its complaint as a UserError."""

    def error(self, message: str) -> NoReturn:
        """Raises the complaint."""
        raise UserError(f"{message}; --help shows the usage")


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns the exit code, as `command.run` defines it."""
    return command.run(lambda: run_command(argv))


def run_command(argv: Sequence[str]) -> None:
    """Parses the arguments, writes the heat map, and prints where it is highest.

    Raises:
      UserError: for a mistake of the user.
    """
    parser = ArgumentParser(
        "plan_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a run, or one of its steps")
    parser.add_argument("--image", required=True, help="a frontal chest radiograph: PNG, JPEG ...")
    parser.add_argument("--text", required=True, help="a phrase, or a whole report")
    parser.add_argument("--out", default="heat.png", help="the picture to write: PNG or JPEG")
    parser.add_argument("--rounds", type=int, help="of refinement; by default as trained")
    options = parser.parse_args(argv)
    print(
        write_heat_map(options.checkpoint, options.image, options.text, options.out, options.rounds)
    )


def write_heat_map(
    checkpoint: str, image: str, text: str, out: str, rounds: int | None = None
) -> str:
    """Writes the heat map of a text over an image; returns a sentence on where it is highest.

    Raises:
      UserError: the image or the checkpoint cannot be read, the text has no word, the method has no
        rounds, or the picture cannot be written.
    """
    path = Path(out)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out} is not a PNG or JPEG; use one of {', '.join(SUFFIXES)}")
    if not os.path.isdir(path.absolute().parent):  # unlike Path, it raises nothing
        raise UserError(f"--out {out} is in a folder that does not exist; create it first")
    if any(map(_is_surrogate, text)):
        raise UserError("--text has bytes that are not UTF-8; pass the phrase as UTF-8")
    if not any(map(str.isalnum, text)):
        raise UserError(f"--text {text!r} has no word; pass a phrase")
    if rounds is not None and rounds < 0:
        raise UserError(f"--rounds is {rounds}; use 0 or more")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Imported once the arguments are known to be sensible: JAX takes seconds.
    from plan_jax import model as models
    from plan_jax import parallel
    from plan_jax.page import figures

    parallel.list_devices()
    pixels = read_image(image)
    model = models.load(checkpoint)
    if bit_depth := model.config and model.config.data.builder.get("bit_depth"):
        pixels = read_image(image, bit_depth)  # as the images that the model was trained on
    heat = compute_heat_map(model, pixels, text, rounds)
    try:
        kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
        path.write_bytes(figures.encode_picture(figures.overlay_heat_map(pixels, heat), kind))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror})") from None
    y, x = np.unravel_index(int(heat.argmax()), heat.shape)
    # The patient faces the viewer: the left half of the image is the patient's right.
    side = "right" if x < heat.shape[1] / 2 else "left"
    return f"{out}: highest at x {x}, y {y} of {heat.shape[1]} x {heat.shape[0]}, patient's {side}"


def _is_surrogate(character: str) -> bool:
    """Returns whether a character stands for a byte that Python could not decode."""
    return "\ud800" <= character <= "\udfff"


def read_image(image: str, bit_depth: int = 0) -> UInt8[np.ndarray, "Y X 1"]:
    """Reads an image as 8-bit grey, upright, scaled down if it is larger than MAX_SIDE.

    `bit_depth` is that of images of more than 8 bits that do not say it (0: guessed).

    Raises:
      UserError: the file is missing, or is not an image.
    """
    from plan_jax.data import images

    try:
        pixels, shape = images.read_image(Path(image), MAX_SIDE, bit_depth)
        if max(shape) < MAX_SIDE:  # never scaled up: read it again at its own size
            pixels, _ = images.read_image(Path(image), max(shape), bit_depth)
    except OSError as error:
        raise UserError(f"--image {image} cannot be read ({error.strerror})") from None
    except ValueError as error:
        remedy = "" if ";" in str(error) else "; pass a PNG, JPEG or DICOM file"
        raise UserError(f"--image {image} {error}{remedy}") from None
    return pixels[..., None]


def compute_heat_map(
    model: Model, image: UInt8[np.ndarray, "Y X 1"], text: str, rounds: int | None = None
) -> Float[np.ndarray, "Y X"]:
    """Computes the heat map of a text: the weighted mean of its words' maps, at image size.

    The model sees the image padded to a square; the map of the square is cut back to the image.
    """
    from PIL import Image

    from plan_jax.data import transforms

    square = transforms.fit_image(image, model.size)[None]
    maps, weights = model.heatmap(
        model.encode_image(square), model.encode_text([text]), rounds=rounds
    )
    map_WP, weight_W = np.asarray(maps[0], np.float32), np.asarray(weights[0], np.float32)
    heat = (weight_W @ map_WP / max(float(weight_W.sum()), 1e-9)).reshape(model.grid)
    side = max(image.shape[:2])
    enlarged = np.asarray(Image.fromarray(heat).resize((side, side), Image.Resampling.BILINEAR))
    top, left = ((side - length) // 2 for length in image.shape[:2])
    return enlarged[top : top + image.shape[0], left : left + image.shape[1]]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
