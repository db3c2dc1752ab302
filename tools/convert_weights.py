"""Look into published weights, or convert them once into our own layout, which needs no torch.

    python tools/convert_weights.py resnet50.pth --list
    python tools/convert_weights.py mgca.ckpt vision.safetensors --tower vision --name vit_b16
    python tools/convert_weights.py bert_folder text.safetensors --tower text --name bert_base_6

SOURCE is whatever `plan_jax.weights.read_state` reads. The file has flat names such as
`params/layer1_0/conv1/kernel` and is loaded like any other weights.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes are all that is computed
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import traverse_util  # noqa: E402
from jaxtyping import PyTree  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from plan_jax.encoders.bert import BERTS, make_text_tower  # noqa: E402
from plan_jax.encoders.vision import make_image_tower  # noqa: E402
from plan_jax.types import UserError  # noqa: E402
from plan_jax.weights import load_tower, read_state  # noqa: E402
from plan_jax.weights.convert import renamed  # noqa: E402
from plan_jax.weights.layouts import recognise  # noqa: E402


def listed(source: str) -> list[str]:
    """Give a line for each array of `source`, and one for each tower that it holds."""
    state = read_state(source)
    lines = [f"{key}  {tuple(value.shape)}  {value.dtype}" for key, value in sorted(state.items())]
    for tower in ("vision", "text"):
        layout = recognise(state, tower)
        lines.append(f"{tower} tower: {layout or 'none of a known layout'}")
        if layout is not None:
            found, _, left = renamed(state, layout)
            lines.append(f"  {len(found)} arrays for it, {len(left)} that nothing is known of")
    return lines


def shapes_of(args: argparse.Namespace, changes: dict[str, Any]) -> PyTree:
    """Give the shapes of the tower's trees, {"params": ..., "batch_stats": ...}.

    Raises:
      UserError: if there is no such tower.
    """
    try:
        if args.tower == "text":
            module = make_text_tower(args.name, vocabulary(args), jnp.float32, **changes)
            token = jax.ShapeDtypeStruct((1, 8), jnp.int32)
            inputs = (token, token, token)
        else:
            module = make_image_tower(args.name, None, jnp.float32, **changes)
            inputs = (jax.ShapeDtypeStruct((1, args.size, args.size, args.channels), jnp.float32),)
        return jax.eval_shape(module.init, jax.random.key(0), *inputs)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--name {args.name} with {args.change or 'no --change'} makes no {args.tower} tower "
            f"({type(error).__name__}: {error}); see the sizes in plan_jax/encoders"
        ) from None


def vocabulary(args: argparse.Namespace) -> int:
    """Count the pieces that the weights know, or take --vocab.

    Raises:
      UserError: if the weights hold no text tower.
    """
    if args.vocab:
        return args.vocab
    state = read_state(args.source)
    layout = recognise(state, "text")
    if layout is None:
        raise UserError(f"weights {args.source} hold no text tower of a known layout; try --list")
    found, _, _ = renamed(state, layout)
    return len(found["params/token/embedding"])


def convert(args: argparse.Namespace, changes: dict[str, Any]) -> int:
    """Write the tower to `args.out`, whole or not at all; give the number of arrays.

    Raises:
      UserError: if the weights do not fit the tower, or there is no such place.
    """
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors; that is what is written")
    if not out.parent.is_dir():
        raise UserError(f"folder {out.parent} does not exist; make it first")
    held = shapes_of(args, changes)
    heads = changes.get("heads", BERTS[args.name]["heads"]) if args.tower == "text" else None
    trees = load_tower(args.tower, args.source, held, say=print, heads=heads)
    arrays = traverse_util.flatten_dict(trees, sep="/")
    handle, name = tempfile.mkstemp(suffix=".part", prefix=out.name, dir=out.parent)
    os.close(handle)
    try:
        save_file(arrays, name, metadata={"tower": args.tower, "name": args.name})
        os.replace(name, out)
    finally:
        Path(name).unlink(missing_ok=True)
    return len(arrays)


def main(argv: list[str] | None = None) -> None:
    """Read the command line, and list or convert."""
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(allow_abbrev=False, **about)
    parser.add_argument("source", help="a folder, a file, a hub id or package:NAME")
    parser.add_argument("out", nargs="?", help="the .safetensors file to write")
    parser.add_argument("--list", action="store_true", help="print the arrays and the layout")
    parser.add_argument("--tower", choices=("vision", "text"))
    parser.add_argument("--name", help="the tower's size, e.g. resnet50, vit_b16, bert_base")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--channels", type=int, default=3, help="channels of an image")
    parser.add_argument("--vocab", type=int, default=0, help="pieces (0: as the weights have)")
    parser.add_argument("--change", action="append", default=[], metavar="KEY=NUMBER")
    args = parser.parse_args(argv)
    if not args.list and not (args.out and args.tower and args.name):
        parser.error("give --list, or OUT.safetensors with --tower and --name")
    try:
        changes = {key: int(value) for key, value in (c.split("=", 1) for c in args.change)}
    except ValueError:
        parser.error(f"--change {' '.join(args.change)} is not KEY=NUMBER")
    try:
        if args.list:
            print("\n".join(listed(args.source)))
            return
        count = convert(args, changes)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: {count} arrays of {args.tower} tower {args.name}")


if __name__ == "__main__":
    main()
