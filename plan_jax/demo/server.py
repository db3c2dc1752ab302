"""The server of the page, which only this machine can reach.

It asks no other machine for anything, and has no public link, no programming interface and no file
to offer. Its folder of uploads is its own and goes with it.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plan_jax import command, parallel
from plan_jax.demo import render
from plan_jax.demo.service import Service
from plan_jax.types import UserError

HOST = "127.0.0.1"
FIRST_PORT = 7860
# More is not even received; what is less and still too large gets a sentence.
MAX_RECEIVED = "256mb"
# Nothing is kept of a run, on the disk or in the browser, and nothing is reported.
SETTINGS = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
MAX_SESSIONS = 64  # browser tabs of which gradio keeps what they show
PROGRAMS = "~/.cache/plan_jax/programs"  # compiled ones: the next start takes seconds


def launch(
    source: str,
    films: Sequence[str] = (),
    *,
    port: int = 0,
    height: int = 900,
    inline: bool = False,
    index_folder: Path | None = None,
) -> Any:
    """Starts the server in threads of its own and returns gradio's `Blocks`.

    Args:
      source: what `plan_jax.load` takes.
      films: folders and tables of films, for retrieval.
      port: of the server; 0 is the first free one from 7860.
      height: of the page below a cell, in pixels.
      inline: whether a notebook shows it below the cell.
      index_folder: where indices are kept; None is the user's cache.

    Raises:
      UserError: gradio is not installed, there is no such model or film, or the port is in use.
    """
    folder = _make_folder()
    page = _import_page(folder)
    if command.owns_process():  # a notebook may have set the folder of its programs
        parallel.configure_backend(1, PROGRAMS)
    blocks = page.build(Service(source, films, index_folder), folder)
    try:
        blocks.launch(
            server_name=HOST,
            server_port=port or None,
            share=False,
            inbrowser=False,
            inline=inline,
            height=height,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            allowed_paths=[],
            max_file_size=MAX_RECEIVED,
            state_session_capacity=MAX_SESSIONS,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            css=render.read_style(),
            theme=page.make_theme(),
        )
    except OSError:
        raise UserError(
            f"port {port or FIRST_PORT} is in use; pass another one as --port"
        ) from None
    return blocks


def _make_folder() -> Path:
    """Returns a new folder for uploads, which is deleted when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="plan_jax_page_")).resolve()

    def clean() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(clean)
    command.call_at_end(clean)
    return folder


def _import_page(folder: Path) -> Any:
    """Returns the module of the page; gradio reads its settings when it is imported.

    Raises:
      UserError: gradio is not installed.
    """
    before = dict(os.environ)
    # Variables of gradio can make a page public, or offer folders.
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= SETTINGS | {"GRADIO_TEMP_DIR": str(folder)}
    # It asks its own server whether it has started, for which no proxy must be used.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name, ""), HOST]))
    try:
        from plan_jax.demo import page
    except ModuleNotFoundError as error:
        os.environ.clear()
        os.environ.update(before)
        if error.name != "gradio":
            raise
        raise UserError(
            "the page needs gradio, which is not installed; pip install 'plan-jax[demo]'"
        ) from None
    return page
