"""The browser's side of a notebook, which a test does not have."""


def eval_js(script: str, ignore_result: bool = False, timeout_sec: float | None = None) -> None:
    """Fails: a notebook of this project that needs a browser could not be tested."""
    raise AssertionError(f"a notebook calls JavaScript: {script[:80]}")


def register_callback(function_name: str, callback: object) -> None:
    """Accepts a callback that no browser will call."""


def clear(wait: bool = False, output_tags: tuple = ()) -> None:
    """Does nothing: the output stays, for the test to read."""
