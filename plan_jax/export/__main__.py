"""Saves a trained model as a folder of plain files, and pushes it to the Hugging Face Hub.

    python -m plan_jax.export runs/demo --out models/my-model
    python -m plan_jax.export runs/demo --out models/small --dtype float16
    python -m plan_jax.export runs/mine --out models/mine --data-name "Ward 7, 2019 to 2023" \\
        --data-licence "internal use only" --push owner/name
    python -m plan_jax.export runs/demo --out models/everywhere --programs --torch

`plan_jax.load` reads the folder, and `owner/name` from the hub. A pushed model is private unless
--public is given. --programs adds programs that run without plan_jax, and --torch the image encoder
for PyTorch.
"""

from plan_jax import command

if __name__ == "__main__":
    command.end_on_signals()  # before the imports, which take seconds

import sys
from collections.abc import Sequence
from pathlib import Path

from plan_jax.command.arguments import ArgumentParser, local_path
from plan_jax.types import UserError


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns the exit code, as `command.run` defines it."""
    return command.run(lambda: run_command(argv))


def run_command(argv: Sequence[str]) -> None:
    """Parses the arguments, saves the model, and prints where it is.

    Raises:
      UserError: for a mistake of the user.
    """
    parser = ArgumentParser("plan_jax.export", __doc__)
    parser.add_argument("source", metavar="RUN", help="a run, one of its steps, or a saved model")
    parser.add_argument(
        "--out",
        required=True,
        type=local_path,
        help="the folder to write; a model is replaced",
    )
    parser.add_argument("--dtype", default="float32", help="float32, or float16 for half the size")
    parser.add_argument("--data-name", default="", help="what the model was trained on")
    parser.add_argument("--data-licence", default="", help="licence of these data")
    parser.add_argument("--licence", default="", help="licence of the weights, as apache-2.0")
    parser.add_argument("--note", default="", help="one more sentence for the card")
    parser.add_argument(
        "--programs",
        nargs="?",
        const="cpu,cuda,tpu",
        default="",
        metavar="PLATFORMS",
        help="add programs of jax.export, for cpu,cuda,tpu or those that are named",
    )
    parser.add_argument("--torch", action="store_true", help="add the image encoder for PyTorch")
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload it to the hub, privately")
    parser.add_argument("--public", action="store_true", help="let everybody have what is pushed")
    options = parser.parse_args(argv)
    if options.public and not options.push:
        raise UserError("--public is for a model that is pushed; add --push owner/name")
    # Imported once the arguments are known to be sensible: JAX takes seconds.
    from plan_jax import model as models
    from plan_jax.export import folder as folders
    from plan_jax.export import hub, image_tower, programs

    # Both before the weights are read.
    folders.check_replaceable(Path(options.out).absolute())
    if options.push:
        hub.check_repository(options.push)
    platforms = [name.strip() for name in options.programs.split(",") if name.strip()]
    if platforms:
        programs.check_platforms(platforms)
    about = {
        "data_name": options.data_name,
        "data_licence": options.data_licence,
        "licence": options.licence,
        "note": options.note,
    }
    model = models.load(options.source)
    # What may be refused comes before the folder is written.
    files = image_tower.encode_image_tower(model) if options.torch else {}
    folder = model.save_pretrained(options.out, dtype=options.dtype, **about)
    if files:
        folders.add_files(folder, files)
    if platforms:
        programs.add_programs(folder, platforms)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 1e6:.1f} MB; plan_jax.load({options.out!r}) reads it")
    if options.push:
        private = not options.public
        address = model.push_to_hub(options.push, private=private, saved=folder, **about)
        print(f"{address}: plan_jax.load({options.push!r}) reads it")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
