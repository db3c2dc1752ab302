"""Silence for orbax, whose failures are reported to the user as one sentence.

A save or a read that fails leaves threads and coroutines behind. They write up to 2,000 lines of
tracebacks, some of them only when the interpreter exits.
"""

import functools
import logging
import re
import sys
import traceback
import warnings
from typing import Any


def silence_orbax() -> None:
    """Hides what orbax logs, and the tracebacks of what it abandons after a failure."""
    # Each time: whoever catches warnings around a run restores the filters at its end.
    warnings.filterwarnings("ignore", r"coroutine '(run_sync|\w*Handler)\..*never awaited")
    _install_filters()


@functools.cache  # installed once and for good, since nobody knows when the last line comes
def _install_filters() -> None:
    logging.getLogger("absl").addFilter(lambda row: "orbax" not in row.pathname)
    logging.getLogger("asyncio").addFilter(lambda row: "never retrieved" not in row.getMessage())
    report_uncaught, report_unraisable = sys.excepthook, sys.unraisablehook

    def report_uncaught_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        # Threads of tensorstore call back into event loops that orbax has closed.
        frames = traceback.extract_tb(trace)
        if not frames or frames[0].name != "call_soon_threadsafe":
            report_uncaught(kind, error, trace)

    def report_unraisable_error(event: Any) -> None:
        # Coroutines that were never awaited, or whose loop is closed or could not be opened.
        code = getattr(event.object, "cr_code", getattr(event.object, "__code__", None))
        is_abandoned = code is not None and re.search("orbax|asyncio", code.co_filename)
        if not is_abandoned and "Event loop is closed" not in str(event.exc_value):
            report_unraisable(event)

    sys.excepthook, sys.unraisablehook = report_uncaught_error, report_unraisable_error
