"""The command line that prepares a public dataset: from the downloaded folder to records.

    plan-jax-prepare --list
    plan-jax-prepare nih_cxr14 --source downloads/nih --check
    plan-jax-prepare nih_cxr14 --source downloads/nih --size 256
    plan-jax --config convirt --config.data.name=nih_cxr14 --config.data.dir=data

`python -m plan_jax.prepare` is the same command. It reads the tables, divides the patients, reads
the images with all cores, and prints a summary, which is also in `summary.json` beside the records.
Re-run the same command to go on with a preparation that was interrupted. `--check` reads all but
the images. docs/data.md lists the datasets. A mistake is one sentence on stderr and exit code 2.
"""

from plan_jax import command

if __name__ == "__main__":
    command.end_on_signals()  # before the imports, which take seconds

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from plan_jax.command.arguments import ArgumentParser, local_path
from plan_jax.types import UserError


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns the exit code, as `command.run` defines it."""
    return command.run(lambda: run_command(argv))


def run_command(argv: Sequence[str]) -> None:
    """Parses the arguments, and lists, checks or prepares.

    Raises:
      UserError: for a mistake of the user.
    """
    parser = ArgumentParser("plan_jax.prepare", __doc__)
    parser.add_argument("name", nargs="?", help="the dataset, as nih_cxr14")
    parser.add_argument("--list", action="store_true", help="list the datasets")
    parser.add_argument("--document", action="store_true", help="print docs/datasets.md")
    parser.add_argument(
        "--source", default="", type=local_path, help="folder of the dataset as downloaded"
    )
    parser.add_argument(
        "--data_dir", default="data", help="folder of prepared datasets, or its address"
    )
    parser.add_argument("--check", action="store_true", help="read all but the images")
    parser.add_argument("--size", type=int, help="longer side of a stored image, in pixels")
    parser.add_argument("--workers", type=int, help="processes that read images; 0: all cores")
    parser.add_argument("--split", help="rule of the splits; docs/data.md lists them")
    parser.add_argument("--views", help="frontal or all")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another field of the dataset's builder, as max_bad=0.5",
    )
    options = parser.parse_args(argv)
    # Imported once the arguments are known to be sensible: TFDS takes seconds.
    from plan_jax.data import preparation
    from plan_jax.data.public.document import describe_datasets

    if options.list:
        for facts in preparation.list_facts():
            print(f"{facts.name:<20} {facts.title}: {facts.content}; {facts.page}")
        return
    if options.document:
        print(describe_datasets(preparation.list_facts()), end="")
        return
    if not options.name:
        raise UserError("no dataset is named; --list shows them")
    fields: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("source", "size", "workers", "split", "views")
        if getattr(options, name) is not None
    }
    fields |= preparation.parse_fields(options.name, options.set)
    if options.check:
        print("\n".join(preparation.check_dataset(options.name, fields)))
        return
    _prepare(options.name, options.data_dir, fields)


def _prepare(name: str, data_dir: str, fields: Mapping[str, Any]) -> None:
    from plan_jax.data import preparation

    preparation.expect_public(name)
    command.describe_interruption("the same command goes on where it was")
    builder, fingerprint = preparation.prepare_dataset(name, data_dir, fields)
    print(f"{builder.data_dir}: records, summary.json, dropped.txt; fingerprint {fingerprint}")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
