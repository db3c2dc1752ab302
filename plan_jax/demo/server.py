"""The server of the page, which only this machine can reach.

It asks no other machine for anything, and has no public link, no programming interface and no file
to offer. Its folder of uploads is its own and goes with it.
"""

import atexit
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from plan_jax import command, parallel
from plan_jax.demo import render, uploads
from plan_jax.demo.service import Service
from plan_jax.types import UserError

HOST = "127.0.0.1"
FIRST_PORT = 7860
# More is not even received; what is less and still too large gets a sentence.
MAX_RECEIVED = "256mb"
# Nothing is kept of a run, on the disk or in the browser, and nothing is reported.
SETTINGS = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
MAX_SESSIONS = 64  # browser tabs of which gradio keeps what they show
# Routes of gradio that fetch from other machines, or write what a tab shows into a file.
CLOSED_ROUTES = ("/file=", "/file/", "/proxy=", "/deep_link")
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
            app_kwargs={"middleware": [(CloseRoutes, (), {})]},
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


class CloseRoutes:
    """Answers requests for `CLOSED_ROUTES` as if there were none; an ASGI middleware."""

    def __init__(self, app: Any) -> None:
        """Keeps the application that answers all other requests."""
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answers a request."""
        if not any(route in scope.get("path", "") for route in CLOSED_ROUTES):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@cache
def _make_folder() -> Path:
    """Returns the folder of this process for uploads, which is deleted when it ends.

    All pages of a notebook have it: gradio takes the uploads of one folder at a time.
    """
    folder = Path(tempfile.mkdtemp(prefix="plan_jax_page_")).resolve()

    def clean() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(clean)
    command.call_at_end(clean)

    # An upload that was broken off is a file of which gradio knows nothing any more.
    def sweep() -> None:
        while True:
            time.sleep(uploads.SWEEP_SECONDS)
            uploads.delete_old(folder, uploads.SWEEP_SECONDS)

    threading.Thread(target=sweep, name="sweep", daemon=True).start()
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
