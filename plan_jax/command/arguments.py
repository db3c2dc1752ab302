"""The parser of command lines whose complaints are one sentence."""

import argparse
from typing import NoReturn

from plan_jax.types import UserError, check_local


class ArgumentParser(argparse.ArgumentParser):
    """A parser that raises its complaint as a UserError, and shows docstrings as they are."""

    def __init__(self, name: str, description: str | None):
        """Initialises the parser of the module `name`, without arguments."""
        super().__init__(
            name,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Raises the complaint."""
        raise UserError(f"{message}; --help shows the usage")


def local_path(path: str) -> str:
    """Returns the path that an argument names; the `type` of arguments that are paths.

    Raises:
      argparse.ArgumentTypeError: it is an address, as gs://bucket/run.
    """
    try:
        check_local("path", path)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path
