"""A server of the page, and a browser that fails a test on whatever leaves this machine."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build" / "browser"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
START_SECONDS = 240
sys.path.append(str(ROOT / "tests"))  # for the makers of files

# Runs in the server before anything else, and notes every address that is not of this machine.
WATCH = """
import ipaddress, os, sys
def watch(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and not ipaddress.ip_address(address[0]).is_loopback:
            with open(os.environ["WATCHED"], "a") as file:
                file.write(f"{address}\\n")
    elif event == "socket.getaddrinfo" and arguments[0] not in (
        None, "", "localhost", "127.0.0.1", b"127.0.0.1", "0.0.0.0"
    ):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{arguments[0]!r}\\n")
sys.addaudithook(watch)
"""


@dataclass
class Server:
    """The process of the page.

    Attributes:
      url: of the page.
      process: the process.
      temporary: the folder of all its temporary files.
      outside: a file of the addresses that it has asked for.
      log: a file of all that it prints.
    """

    url: str
    process: subprocess.Popen
    temporary: Path
    outside: Path
    log: Path

    @property
    def memory(self) -> int:
        """Returns the bytes of memory that the process holds."""
        return psutil.Process(self.process.pid).memory_info().rss

    def list_files(self) -> list[str]:
        """Returns the temporary files, of uploads and others."""
        return sorted(str(path) for path in self.temporary.rglob("*") if path.is_file())


def find_port() -> int:
    """Returns a port that is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serve(folder: Path, *arguments: str):
    """Starts the page, waits until it answers, and ends it as Ctrl-C does."""
    home, temporary = folder / "home", folder / "temporary"
    for path in (home, temporary, folder / "watch"):
        path.mkdir(parents=True)
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    outside, log = folder / "outside.txt", folder / "log.txt"
    environment = {
        **os.environ,
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "WATCHED": str(outside),
        "PYTHONPATH": os.pathsep.join([str(folder / "watch"), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "GRADIO_SHARE": "True",  # of another program of the user: the page is not shared
    }
    command = [sys.executable, "-m", "plan_jax.demo", "--port", str(find_port()), *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        url = _wait(process, log)
        yield Server(url, process, temporary, outside, log)
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen, log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if match := re.search(r"(http://127\.0\.0\.1:\d+/?) shows the page", log.read_text()):
            return match[1]
        time.sleep(0.2)
    raise AssertionError(f"the page did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def server():
    """Serves the model in the box; afterwards nothing may be left of it."""
    with tempfile.TemporaryDirectory(prefix="browser_test_") as folder:
        with serve(Path(folder)) as running:
            yield running
            asked = running.outside.read_text() if running.outside.exists() else ""
            assert asked == "", f"the server asked for {asked}"
        assert running.process.returncode == 143
        assert not list(running.temporary.glob("plan_jax_*"))
        assert "Traceback" not in running.log.read_text(), running.log.read_text()


@pytest.fixture(scope="session")
def chromium():
    """Starts the browser of the system."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page, and what it has done that it must not do."""

    page: Any
    faults: list[str] = field(default_factory=list)


def watch(page: Any, url: str) -> Watched:
    """Notes requests beyond the server, errors of the console, and dialogs."""
    watched = Watched(page)

    def check_request(request: Any) -> None:
        if not request.url.startswith((url.rstrip("/"), "data:", "blob:")):
            watched.faults.append(f"request {request.url[:200]}")

    def check_console(message: Any) -> None:
        if message.type == "error":
            watched.faults.append(f"console {message.text[:300]} {message.location}")

    def check_response(response: Any) -> None:
        if response.status >= 400:
            watched.faults.append(f"status {response.status} of {response.url[:200]}")

    def check_dialog(dialog: Any) -> None:
        watched.faults.append(f"dialog {dialog.message}")
        dialog.dismiss()

    page.on("request", check_request)
    page.on("console", check_console)
    page.on("response", check_response)
    page.on("dialog", check_dialog)
    page.on("pageerror", lambda error: watched.faults.append(f"script {error}"))
    return watched


@pytest.fixture
def open_page(server, chromium):
    """Returns a function that opens the page in a window of its own; checks it at the end."""
    opened = []

    def open_window(width: int = 1440, height: int = 1000, *, url: str = "") -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": height}, accept_downloads=True
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        opened.append((context, watch(page, url or server.url)))
        page.goto(url or server.url)
        page.wait_for_selector(".pj-card")
        return page

    yield open_window
    faults = [fault for _, watched in opened for fault in watched.faults]
    for context, _ in opened:
        context.close()
    assert faults == []


@pytest.fixture
def page(open_page):
    """Opens the page, which begins with a phantom and its phrases."""
    return open_page()


def take_screenshot(page: Any, name: str, **options: Any) -> Path:
    """Saves what the page shows in build/browser, for people to look at."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    page.screenshot(path=path, full_page=True, **options)
    return path
