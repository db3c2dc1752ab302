"""Writes one page that compares several runs, or evaluations of runs.

    python -m plan_jax.page runs/convirt runs/plan
    python -m plan_jax.page runs/*/eval/test --out comparison.html

The first run is the reference: the page shows how far the others are from it, with the 95 %
interval of a paired bootstrap where both have stored the scores of the same examples. It has the
curves of all runs, their metrics, and the same phrases side by side. No model computes anything
again.
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
    """Parses the arguments, writes the page, and prints where it is.

    Raises:
      UserError: for a mistake of the user.
    """
    parser = ArgumentParser("plan_jax.page", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=local_path, help="folder of a run")
    parser.add_argument(
        "--out", default="comparison.html", type=local_path, help="the page to write"
    )
    options = parser.parse_args(argv)
    # Imported once the arguments are known to be sensible: the tasks take seconds.
    from plan_jax import page
    from plan_jax.logger import write_atomically
    from plan_jax.page.runs import read_runs
    from plan_jax.tasks import CATALOGUE, TITLES

    out = Path(options.out)
    if out.is_dir():
        raise UserError(f"{out} is a folder; pass the path of a file as --out")
    runs = read_runs(options.runs)
    html = page.render_runs(runs, CATALOGUE, TITLES, folder=out.absolute().parent)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent} cannot be created ({error.strerror})") from None
    write_atomically(out, html)
    print(f"comparison of {len(runs)} runs: {out}")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
