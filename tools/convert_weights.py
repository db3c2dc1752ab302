"""Lists the arrays of published weights, or converts them to our own names and axes.

    python tools/convert_weights.py resnet50.pth --list
    python tools/convert_weights.py mgca.ckpt vision.safetensors --tower vision --name vit_b16
    python tools/convert_weights.py bert_folder text.safetensors --tower text --name bert_base_6

SOURCE is whatever `plan_jax.weights.read_arrays` reads. The converted file has flat names such as
`params/layer1_0/conv1/kernel`, is loaded like any other weights, and needs no torch.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # only shapes are computed
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import traverse_util  # noqa: E402
from jaxtyping import PyTree  # noqa: E402
from safetensors import numpy as safetensors  # noqa: E402

from plan_jax.command.arguments import local_path  # noqa: E402
from plan_jax.encoders.bert import BERTS  # noqa: E402
from plan_jax.encoders.dual_encoder import make_image_tower, make_text_tower  # noqa: E402
from plan_jax.encoders.vit import VITS  # noqa: E402
from plan_jax.logger import write_atomically  # noqa: E402
from plan_jax.types import UserError  # noqa: E402
from plan_jax.weights import load_tower, read_arrays  # noqa: E402
from plan_jax.weights.convert import rename_arrays  # noqa: E402
from plan_jax.weights.layouts import recognise_layout  # noqa: E402


def list_arrays(source: str) -> list[str]:
    """Returns a line for each array of `source`, and lines about the towers that it holds."""
    arrays = read_arrays(source)
    lines = [f"{key}  {tuple(value.shape)}  {value.dtype}" for key, value in sorted(arrays.items())]
    for tower in ("vision", "text"):
        layout = recognise_layout(arrays, tower)
        lines.append(f"{tower} tower: {layout or 'none of a known layout'}")
        if layout is not None:
            conversion = rename_arrays(arrays, layout)
            lines.append(
                f"  {len(conversion.arrays)} arrays of it, {len(conversion.unknown)} unknown"
            )
    return lines


def tower_shapes(args: argparse.Namespace, options: dict[str, int]) -> PyTree:
    """Returns the shapes of the tower's arrays, {"params": ..., "batch_stats": ...}.

    Raises:
      UserError: there is no such tower.
    """
    try:
        if args.tower == "text":
            vocabulary = args.vocab or read_vocabulary_size(args.source)
            module = make_text_tower(args.name, vocabulary, jnp.float32, **options)
            tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
            inputs = (tokens, tokens, tokens)  # tokens, word_index and sentence
        else:
            module = make_image_tower(args.name, None, jnp.float32, **options)
            inputs = (jax.ShapeDtypeStruct((1, args.size, args.size, args.channels), jnp.float32),)
        return jax.eval_shape(module.init, jax.random.key(0), *inputs)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--name {args.name} with {args.change or 'no --change'} is not a {args.tower} tower "
            f"({type(error).__name__}: {error}); see the sizes in plan_jax/encoders"
        ) from None


def read_vocabulary_size(source: str) -> int:
    """Returns the number of word pieces that the weights have embeddings of.

    Raises:
      UserError: the weights hold no text tower.
    """
    arrays = read_arrays(source)
    layout = recognise_layout(arrays, "text")
    if layout is None:
        raise UserError(f"weights {source} hold no text tower of a known layout; try --list")
    return len(rename_arrays(arrays, layout).arrays["params/token/embedding"])


def convert(args: argparse.Namespace, options: dict[str, int]) -> int:
    """Writes the tower to `args.out`, completely or not at all; returns the number of arrays.

    Raises:
      UserError: the weights do not fit the tower, or the folder of `args.out` does not exist.
    """
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors, the format that is written")
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} does not exist; create it first")
    template = tower_shapes(args, options)
    sizes = {**(BERTS if args.tower == "text" else VITS).get(args.name, {}), **options}
    num_heads = sizes.get("heads")
    trees = load_tower(args.tower, args.source, template, log=print, num_heads=num_heads)
    arrays = traverse_util.flatten_dict(trees, sep="/")
    metadata = {"tower": args.tower, "name": args.name}
    write_atomically(out, safetensors.save(arrays, metadata))
    return len(arrays)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line, and lists or converts."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a folder, a file, a hub id or package:NAME")
    parser.add_argument("out", nargs="?", type=local_path, help="the .safetensors file to write")
    parser.add_argument("--list", action="store_true", help="print the arrays and the layout")
    parser.add_argument("--tower", choices=("vision", "text"))
    parser.add_argument("--name", help="the tower's size, e.g. resnet50, vit_b16, bert_base")
    parser.add_argument("--size", type=int, default=224, help="side of an image in pixels")
    parser.add_argument("--channels", type=int, default=3, help="channels of an image")
    parser.add_argument("--vocab", type=int, default=0, help="word pieces (0: as in the weights)")
    parser.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="KEY=NUMBER",
        help="an option of the tower, e.g. depth=6; may be repeated",
    )
    args = parser.parse_args(argv)
    if not args.list and not (args.out and args.tower and args.name):
        parser.error("pass --list, or OUT.safetensors with --tower and --name")
    try:
        pairs = [change.split("=", 1) for change in args.change]
        options = {key: int(value) for key, value in pairs}
    except ValueError:
        parser.error(f"--change {' '.join(args.change)} is not KEY=NUMBER")
    try:
        if args.list:
            print("\n".join(list_arrays(args.source)))
            return
        count = convert(args, options)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: {count} arrays of {args.tower} tower {args.name}")


if __name__ == "__main__":
    main()
