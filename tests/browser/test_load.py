"""Many uploads at once and many phrases in a row: no crash, and no growth of memory."""

import io
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from conftest import serve, take_screenshot
from PIL import Image

from plan_jax.data import phantom

NUM_UPLOADS = 20
NUM_PHRASES = 200
MAX_GROWTH = 1.1
WORDS = ("effusion", "nodule", "consolidation", "pneumothorax", "atelectasis", "pacemaker")
PLACES = ("left lower zone", "right lower zone", "left upper zone", "right upper zone", "left lung")


@pytest.fixture(scope="module")
def own_server():
    """Serves the page for these tests alone, so that its memory is theirs."""
    with TemporaryDirectory(prefix="browser_test_") as folder, serve(Path(folder)) as running:
        yield running


def encode(index, size):
    stream = io.BytesIO()
    Image.fromarray(phantom.draw_study(1, index, size).image[..., 0]).save(stream, "PNG")
    return stream.getvalue()


def upload_all(pages, size):
    """Sends one film from each page without waiting in between, and waits for all answers."""
    for number, page in enumerate(pages):
        name = f"film {number} of {size}.png"
        page.locator("#upload input[type=file]").set_input_files(
            {"name": name, "mimeType": "image/png", "buffer": encode(number, size)}
        )
    for number, page in enumerate(pages):
        page.get_by_text(f"film {number} of {size}.png").first.wait_for(timeout=120_000)


def test_twenty_uploads_at_once(own_server, open_page):
    pages = [open_page(url=own_server.url) for _ in range(NUM_UPLOADS)]
    upload_all(pages, 700)
    memory = own_server.memory
    for size in (710, 720, 730):
        upload_all(pages, size)
    growth = own_server.memory / memory
    print(f"memory {memory / 2**20:.0f} MB, after 60 more uploads {growth:.3f} times that")
    assert growth < MAX_GROWTH
    assert own_server.list_files() == []
    for page in pages:
        assert page.locator(".pj-message").count() == 0
    take_screenshot(pages[-1], "twenty")


def test_two_hundred_phrases_in_a_row(own_server, open_page):
    page = open_page(url=own_server.url)

    def ask(number):
        phrase = f"{WORDS[number % 6]} in the {PLACES[number % 5]}, number {number}"
        page.locator("#phrases textarea").fill(phrase)
        page.locator("#locate").click()
        page.get_by_role("heading", name=phrase).wait_for()

    for number in range(20):
        ask(number)
    memory = own_server.memory
    for number in range(20, 20 + NUM_PHRASES):
        ask(number)
    growth = own_server.memory / memory
    print(f"memory {memory / 2**20:.0f} MB, after {NUM_PHRASES} phrases {growth:.3f} times that")
    assert growth < MAX_GROWTH and np.isfinite(growth)
