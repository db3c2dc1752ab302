"""Runs the exported programs of a model: what a phrase describes, and where it is in a radiograph.

    python programs/reader.py film.png "small left effusion" heat.png

It needs jax, flatbuffers, numpy, pillow, safetensors and tokenizers; neither plan_jax nor flax. The
model's folder is the one that holds `programs`. Not for clinical use.
"""

import argparse
import json
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import Tokenizer

Texts = dict[str, np.ndarray]


class Reader:
    """A model folder with programs; `encode_image`, `encode_text` and `heatmap` run them.

    `signature.json` describes their arguments and outputs. Any number of images or texts is
    compiled once and then fast.
    """

    def __init__(self, folder: str | Path) -> None:
        """Loads the programs and puts the weights on the device.

        Raises:
          ValueError: this version of JAX does not read the programs, or has another platform.
        """
        folder = Path(folder)
        self.signature = json.loads((folder / "programs/signature.json").read_text("utf-8"))
        check_jax(self.signature)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.weights = jax.device_put(load_file(folder / self.signature["weights"]))
        programs = {
            name: export.deserialize(bytearray((folder / "programs" / entry["file"]).read_bytes()))
            for name, entry in self.signature["programs"].items()
        }
        self._programs = {name: jax.jit(program.call) for name, program in programs.items()}

    def encode_image(self, images: np.ndarray) -> dict[str, jax.Array]:
        """Returns the features of UInt8[N size size 1] images."""
        return self._programs["encode_image"](self.weights, images)

    def encode_text(self, texts: Texts) -> dict[str, jax.Array]:
        """Returns the features of texts that `tokenize` returned."""
        return self._programs["encode_text"](self.weights, texts)

    def heatmap(self, images: dict, texts: dict) -> tuple[jax.Array, jax.Array]:
        """Returns the map of each word of text n over image n, [N W P], and its weight, [N W]."""
        return self._programs["heatmap"](self.weights, images, texts)

    def tokenize(self, sentences: list[list[str]]) -> Texts:
        """Returns texts, each a list of sentences, as the arrays that `encode_text` takes.

        Pieces and words beyond the limits of the signature are cut off, with a warning.

        Raises:
          ValueError: a text has no word.
        """
        rows = [self._tokenize_text(text) for text in sentences]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _tokenize_text(self, sentences: list[str]) -> Texts:
        limits = self.signature
        max_tokens, max_words = limits["max_tokens"], limits["max_words"]
        pieces: list[int] = []
        word_index: list[int] = []
        word_id: list[int] = []
        sentence_number: list[int] = []
        for number, sentence in enumerate(sentences):
            encoding = self.tokenizer.encode(sentence, add_special_tokens=False)
            words: dict[int | None, list[int]] = {}
            for piece, word, (start, end) in zip(
                encoding.ids, encoding.word_ids, encoding.offsets, strict=True
            ):
                # A word has a letter or a digit; other pieces belong to no word.
                if word in words or any(map(str.isalnum, sentence[start:end])):
                    words.setdefault(word, []).append(piece)
            slots = {word: len(word_id) + slot for slot, word in enumerate(words)}
            pieces += encoding.ids
            word_index += [slots.get(word, -1) for word in encoding.word_ids]
            for ids in words.values():
                # A word of several pieces is named by a hash of them.
                code = zlib.crc32(np.asarray(ids, "<i4").tobytes()) % limits["word_hashes"]
                word_id.append(ids[0] if len(ids) == 1 else limits["vocab_size"] + code)
            sentence_number += [number] * len(words)
        if not word_id:
            raise ValueError(f"text {sentences} has no word; pass a phrase")
        if len(pieces) > max_tokens - 2 or len(word_id) > max_words:
            warnings.warn(
                f"a text has {len(word_id)} words of {len(pieces)} pieces; the model reads the"
                f" first {max_words} words and {max_tokens - 2} pieces",
                stacklevel=3,
            )
        pieces, word_index = pieces[: max_tokens - 2], word_index[: max_tokens - 2]
        num_words = min(max_words, 1 + max(word_index))
        texts = {
            "tokens": np.zeros(max_tokens, np.int32),
            "word_index": np.full(max_tokens, -1, np.int32),
            "word_id": np.zeros(max_words, np.int32),
            "sentence": np.full(max_words, -1, np.int32),
        }
        texts["tokens"][: len(pieces) + 2] = [limits["cls_id"], *pieces, limits["sep_id"]]
        texts["word_index"][1 : len(pieces) + 1] = [
            index if index < num_words else -1 for index in word_index
        ]
        texts["word_id"][:num_words] = word_id[:num_words]
        texts["sentence"][:num_words] = sentence_number[:num_words]
        return texts

    def ground(self, image: Image.Image, phrase: str) -> np.ndarray:
        """Returns the heat map of a phrase over an image of 8 bits, Float32[Y X] of its pixels."""
        images = self.encode_image(fit_image(image, self.signature["size"])[None])
        maps, weights = self.heatmap(images, self.encode_text(self.tokenize([[phrase]])))
        heat = weights[0] @ maps[0] / max(float(weights[0].sum()), 1e-9)
        grid = np.asarray(heat, np.float32).reshape(self.signature["grid"])
        return enlarge_map(grid, image.size, self.signature["size"])


def check_jax(signature: dict[str, Any]) -> None:
    """Raises ValueError if this version of JAX may not read the programs, or has no platform.

    JAX promises that programs run where JAX is up to six months newer, or three weeks older, than
    the version that wrote them.
    """
    version, platform = signature["calling_convention_version"], export.default_export_platform()
    oldest = export.minimum_supported_calling_convention_version
    newest = export.maximum_supported_calling_convention_version
    writer, reader = (
        tuple(map(int, text.split(".")[:2])) for text in (signature["jax"], jax.__version__)
    )
    if reader < writer or not oldest <= version <= newest:
        remedy = "export the model again" if version < oldest else "install a newer jax"
        raise ValueError(
            f"programs were written by jax {signature['jax']} with calling convention {version},"
            f" and this is jax {jax.__version__}, which reads {oldest} to {newest}; {remedy}"
        )
    if platform not in signature["platforms"]:
        raise ValueError(
            f"programs are for {', '.join(signature['platforms'])} and this is {platform}; set"
            " JAX_PLATFORMS=cpu, or export them for it"
        )


def fit_image(image: Image.Image, size: int) -> np.ndarray:
    """Scales the longer side to `size` and centres on a black square, UInt8[size size 1].

    Raises:
      ValueError: the image has more than 8 bits, of which all but the lowest values would be white.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"image has pixels of mode {image.mode}; scale it to 8 bits first")
    width, height, left, top = content_area(image.size, size)
    grey = image.convert("L").resize((width, height), Image.Resampling.BILINEAR)
    square = Image.new("L", (size, size))
    square.paste(grey, (left, top))
    return np.asarray(square)[..., None]


def content_area(shape: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    """Returns width, height, left and top of an image inside its square."""
    width, height = (max(1, round(length * size / max(shape))) for length in shape)
    return width, height, (size - width) // 2, (size - height) // 2


def enlarge_map(heat: np.ndarray, shape: tuple[int, int], size: int) -> np.ndarray:
    """Returns a map of the square, Float32[y x], in the pixels of an image, Float32[Y X].

    It is interpolated linearly between the centres of cells and constant beyond the outer ones.
    `shape` is the image's width and height.
    """
    width, height, left, top = content_area(shape, size)
    for axis, (count, length, offset) in enumerate(
        [(shape[1], height, top), (shape[0], width, left)]
    ):
        cells = np.arange(heat.shape[axis])
        pixels = ((np.arange(count) + 0.5) * length / count + offset) / size
        positions = pixels * len(cells) - 0.5
        lines = [np.interp(positions, cells, line) for line in np.moveaxis(heat, axis, -1)]
        heat = np.moveaxis(np.stack(lines), -1, axis)
    return heat.astype(np.float32)


def main(arguments: list[str]) -> int:
    """Writes a heat map as a grey picture and prints where it is highest; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", help="a frontal chest radiograph of 8 bits")
    parser.add_argument("phrase", help="one sentence")
    parser.add_argument("out", help="the picture to write: PNG")
    options = parser.parse_args(arguments)
    try:
        if Path(options.out).resolve() == Path(options.image).resolve():
            raise ValueError(f"{options.out} is the image itself; write the picture elsewhere")
        with Image.open(options.image) as file:
            heat = Reader(Path(__file__).resolve().parent.parent).ground(file, options.phrase)
        low, high = float(heat.min()), float(heat.max())
        grey = 255 * (heat - low) / max(high - low, 1e-9)
        Image.fromarray(np.rint(grey).astype(np.uint8)).save(options.out)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    y, x = np.unravel_index(int(heat.argmax()), heat.shape)
    print(f"{options.out}: highest at x {x}, y {y} of {heat.shape[1]} x {heat.shape[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
