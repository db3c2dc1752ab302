"""A page in the browser: where phrases are in a film, and which films and reports are alike.

    python -m plan_jax.demo
    python -m plan_jax.demo --model runs/mine --films films/ --port 7861
    python -m plan_jax.demo --model runs/mine --films pairs.csv

Only this machine can reach the page, and it asks nothing of any other. Uploads are deleted as soon
as they have been read. Ctrl-C ends it. It needs `pip install 'plan-jax[demo]'`;
docs/grounding_page.md explains what it shows. For research only, not for diagnosis.
"""

from plan_jax import command

if __name__ == "__main__":
    command.end_on_signals()  # before the imports, which take seconds

import contextlib
import ctypes
import sys
import threading
from collections.abc import Sequence

from plan_jax.command.arguments import ArgumentParser, local_path
from plan_jax.types import UserError

MAX_PORT = 65535
# Of glibc's mallopt: M_ARENA_MAX and M_MMAP_THRESHOLD, and their values.
MEMORY_OPTIONS = ((-8, 2), (-3, 2**18))


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns the exit code, as `command.run` defines it."""
    return command.run(lambda: run_command(argv))


def run_command(argv: Sequence[str]) -> None:
    """Parses the arguments and serves the page until a signal ends the process.

    Raises:
      UserError: for a mistake of the user.
    """
    parser = ArgumentParser("plan_jax.demo", __doc__)
    parser.add_argument(
        "--model",
        default="phantom-plan",
        help="a run, one of its steps, a saved model, or a name; by default the model in the box",
    )
    parser.add_argument(
        "--port", type=int, default=0, help="of the server; by default the first free from 7860"
    )
    parser.add_argument(
        "--films",
        nargs="+",
        default=[],
        type=local_path,
        help="folders of films with reports beside them (film.png, film.txt), or tables with the "
        "columns image and text; by default phantoms",
    )
    options = parser.parse_args(argv)
    if not 0 <= options.port <= MAX_PORT:
        raise UserError(f"--port is {options.port}; use 1 to {MAX_PORT}, or leave it out")
    # Each of the server's forty threads would have an arena of its own, which keeps what is freed.
    # So would films and answers of some megabytes leave gaps, unless each has pages of its own.
    with contextlib.suppress(OSError, AttributeError):  # another library of C
        for option in MEMORY_OPTIONS:
            ctypes.CDLL("libc.so.6").mallopt(*option)
    # Imported once the arguments are known to be sensible: JAX takes seconds.
    from plan_jax.demo import server

    blocks = server.launch(options.model, options.films, port=options.port)
    print(f"{blocks.local_url} shows the page; press Ctrl-C to end it", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
