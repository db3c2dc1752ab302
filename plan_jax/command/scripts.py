"""The console scripts: they handle signals before the imports, which take seconds."""

import sys
from typing import NoReturn

from plan_jax import command


def run_main() -> NoReturn:
    """Runs `plan-jax`, which trains or evaluates, and ends the process."""
    command.end_on_signals(sys._getframe(1))
    from plan_jax.main import run_process

    run_process(sys.argv[1:])


def run_predict() -> NoReturn:
    """Runs `plan-jax-predict` and ends the process."""
    command.end_on_signals(sys._getframe(1))
    from plan_jax.predict import run

    sys.exit(run(sys.argv[1:]))


def run_export() -> NoReturn:
    """Runs `plan-jax-export` and ends the process."""
    command.end_on_signals(sys._getframe(1))
    from plan_jax.export.__main__ import run

    sys.exit(run(sys.argv[1:]))


def run_prepare() -> NoReturn:
    """Runs `plan-jax-prepare` and ends the process."""
    command.end_on_signals(sys._getframe(1))
    from plan_jax.prepare import run

    sys.exit(run(sys.argv[1:]))


def run_demo() -> NoReturn:
    """Runs `plan-jax-demo` and ends the process."""
    command.end_on_signals(sys._getframe(1))
    from plan_jax.demo.__main__ import run

    sys.exit(run(sys.argv[1:]))
