"""Ground one phrase in one image: where does the model see what the words say?

    python -m plan_jax.predict --checkpoint runs/demo --image chest.png \\
        --text "consolidation in the left lower zone" --out heat.png

Needs no network. Left and right are the patient's, as in a report.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float, UInt8

from plan_jax.types import Model, UserError

LARGEST = 1024  # pixels of the longer side of the picture
KINDS = (".png", ".jpg", ".jpeg")


class Arguments(argparse.ArgumentParser):
    """A parser whose complaint is one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint."""
        raise UserError(f"{message}; --help shows how it is called")


def run(argv: Sequence[str]) -> int:
    """Do what the arguments say and return the exit code: 0, or 2 for a user's mistake."""
    parser = Arguments(
        "plan_jax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="folder of a run, or one of its steps")
    parser.add_argument("--image", required=True, help="a frontal chest radiograph: PNG, JPEG ...")
    parser.add_argument("--text", required=True, help="a phrase, or a whole report")
    parser.add_argument("--out", default="heat.png", help="the picture to write: PNG or JPEG")
    parser.add_argument("--rounds", type=int, help="of refinement; by default as trained")
    try:
        given = parser.parse_args(argv)
        print(ground(given.checkpoint, given.image, given.text, given.out, given.rounds))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def ground(checkpoint: str, image: str, text: str, out: str, rounds: int | None = None) -> str:
    """Write the heat map of a text over an image, and say in a sentence where it is highest.

    Raises:
      UserError: for an image or checkpoint that cannot be read, an empty text, a picture that
        cannot be written.
    """
    target = Path(out)
    if target.suffix.lower() not in KINDS:
        raise UserError(f"--out {out} is no picture's name; end it with {' or '.join(KINDS)}")
    if not target.absolute().parent.is_dir():
        raise UserError(f"--out {out} lies in a folder that is not there; make it first")
    if not any(map(str.isalnum, text)):
        raise UserError(f"--text {text!r} has no word; write a phrase")
    if rounds is not None and rounds < 0:
        raise UserError(f"--rounds is {rounds}; use 0 or more")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from plan_jax import model as assembly  # after the arguments are read: imports take seconds
    from plan_jax.page import figures

    pixels = read(image)
    model = assembly.load(checkpoint)
    heat = heat_map(model, pixels, text, rounds)
    try:
        kind = "PNG" if target.suffix.lower() == ".png" else "JPEG"
        target.write_bytes(figures.encode_picture(figures.overlay_heat_map(pixels, heat), kind))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror})") from None
    y, x = np.unravel_index(int(heat.argmax()), heat.shape)
    side = "right" if x < heat.shape[1] / 2 else "left"
    return f"{out}: highest at x {x}, y {y} of {heat.shape[1]} x {heat.shape[0]}, patient's {side}"


def read(image: str) -> UInt8[np.ndarray, "Y X 1"]:
    """Read an image as 8-bit grey [Y X 1], made smaller if it is larger than a screen.

    Raises:
      UserError: the file is missing, or is no image.
    """
    from plan_jax.data import images

    try:
        pixels, shape = images.read_image(Path(image), LARGEST)
        if max(shape) < LARGEST:
            pixels, _ = images.read_image(Path(image), max(shape))
    except OSError as error:
        raise UserError(f"--image {image} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--image {image} {error}; give a PNG, JPEG or DICOM file") from None
    return pixels[..., None]


def heat_map(
    model: Model, image: UInt8[np.ndarray, "Y X 1"], text: str, rounds: int | None = None
) -> Float[np.ndarray, "Y X"]:
    """Give the text's heat on every pixel of the image: its words' maps, weighted, enlarged.

    The model sees the image fitted to its square; the map of that square is cut back to the image.
    """
    from PIL import Image

    from plan_jax.data import transforms

    seen: Any = model.encode_image(transforms.fit_image(image, model.size)[None])
    similarity, weight = (
        np.asarray(x[0], np.float32)
        for x in model.heatmap(seen, model.encode_text([text]), rounds=rounds)
    )
    heat = (weight @ similarity / max(float(weight.sum()), 1e-9)).reshape(model.grid)
    longest = max(image.shape[:2])
    square = Image.fromarray(heat).resize((longest, longest), Image.Resampling.BILINEAR)
    top, left = ((longest - side) // 2 for side in image.shape[:2])
    return np.asarray(square)[top : top + image.shape[0], left : left + image.shape[1]]


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
