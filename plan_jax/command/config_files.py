"""Config files: found by path or by name, and loaded.

`demo`, `gloria:phantom` and `eval/all_phantom` name files of `configs/`, which belongs to the
package wherever it is installed. A file that exists has precedence over a name.
"""

import contextlib
import difflib
import os
import sys
import traceback
import types
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from plan_jax.types import UserError

_PACKAGE = Path(__file__).resolve().parent.parent
# The wheel holds the folder inside the package. A checkout has it beside the package.
FOLDER = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()),
    _PACKAGE / "configs",
)
_IMPORT_NAME = "configs"  # by which config files import each other


def list_names() -> list[str]:
    """Returns the names of the package's configs, sorted: those of subfolders are `eval/NAME`."""
    paths = [path for path in FOLDER.rglob("*.py") if "def get_config(" in path.read_text("utf-8")]
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in paths)


def locate(name: str) -> Path:
    """Returns the path of a config file, given its path or a name from `list_names`.

    A name may be written as in a checkout too: `configs/demo.py` is `demo`.

    Raises:
      UserError: there is neither such a file nor such a name.
    """
    # Unlike Path.is_file, os.path.isfile raises nothing for a name that is too long.
    if os.path.isfile(name):
        return Path(name)
    names = list_names()
    short_name = name.replace("\\", "/").removeprefix("./").removesuffix(".py")
    short_name = short_name.removeprefix("configs/")
    if short_name in names:
        return FOLDER / f"{short_name}.py"
    raise UserError(f"config file {name} does not exist; {_suggest(name, short_name, names)}")


def _suggest(name: str, short_name: str, names: list[str]) -> str:
    """Returns the remedy for a config that does not exist: what resembles it, or what there is."""
    by_stem = {key.rpartition("/")[2]: key for key in names}
    stems = difflib.get_close_matches(short_name.rpartition("/")[2], by_stem, 3)
    similar = difflib.get_close_matches(short_name, names, 3) + [by_stem[stem] for stem in stems]
    with contextlib.suppress(OSError, ValueError):  # no path can have such a name
        files = [path.name for path in sorted(Path(name).absolute().parent.glob("*.py"))]
        matches = difflib.get_close_matches(Path(name).name, files, 3)
        similar += [str(Path(name).parent / match) for match in matches]
    if similar:
        return f"did you mean {' or '.join(list(dict.fromkeys(similar))[:3])}?"
    folder = short_name.rpartition("/")[0]
    siblings = [key for key in names if key.rpartition("/")[0] == folder]
    siblings = siblings or [key for key in names if "/" not in key]
    return f"there are {', '.join(siblings)}; or pass the path of a file"


def load_config_file(config: str) -> dict[str, Any]:
    """Loads a config, `file.py`, `file.py:argument`, `name` or `name:argument`, as nested dicts.

    Raises:
      UserError: it does not exist, or an error is in it.
    """
    name, colon, argument = config.partition(":")
    path = locate(name)
    try:
        with _importable_configs(path):
            module = _import_file(path)
            if not hasattr(module, "get_config"):
                raise UserError(f"config file {name} has no function get_config(); add one")
            content = module.get_config(*([argument] if colon else []))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's file can raise anything
        line = getattr(error, "lineno", None) or _error_line(error, path)
        kind = type(error).__name__
        message = (str(error).strip().splitlines() or [""])[-1]
        place = f"{name} line {line}" if line else name
        raise UserError(f"config file {place} raises {kind}: {message}; correct it") from None
    if not hasattr(content, "to_dict"):
        raise UserError(
            f"config file {name} returns {content!r}; get_config() must return a ConfigDict"
        )
    return content.to_dict()


def _import_file(path: Path) -> types.ModuleType:
    """Returns the module of a config file.

    The parser of ml_collections would keep the names of a file for the next one of the same name.
    """
    # Inside `configs`, so that it does not outlive `_importable_configs`.
    module = types.ModuleType(f"{_IMPORT_NAME}.__main__")
    module.__file__, module.__package__ = str(path), _IMPORT_NAME
    sys.modules[module.__name__] = module
    SourceFileLoader(module.__name__, str(path)).exec_module(module)
    return module


@contextlib.contextmanager
def _importable_configs(path: Path) -> Iterator[None]:
    """Lets the config file of that path import from `configs`, and restores what that was before.

    A file of the package finds the package's configs. The file of a user finds first those of a
    folder `configs` around it and in the working directory, then the package's, then what the
    import system finds. Nothing is added to sys.path: modules in the folder of an installed
    plan_jax, such as types.py, would replace those of the standard library.
    """
    path = path.resolve()
    folders = [FOLDER]
    if FOLDER not in path.parents:
        own = [parent for parent in path.parents if parent.name == _IMPORT_NAME]
        folders = [*own[:1], Path.cwd() / _IMPORT_NAME, FOLDER]
        folders += [Path(entry) / _IMPORT_NAME for entry in sys.path]
    previous = _pop_modules()
    package = types.ModuleType(_IMPORT_NAME)
    package.__path__ = [str(folder) for folder in folders if os.path.isdir(folder)]
    sys.modules[_IMPORT_NAME] = package
    try:
        yield
    finally:
        _pop_modules()
        sys.modules.update(previous)


def _pop_modules() -> dict[str, types.ModuleType]:
    """Removes `configs` and what is in it from the imported modules, and returns them."""
    names = [name for name in sys.modules if name.partition(".")[0] == _IMPORT_NAME]
    return {name: sys.modules.pop(name) for name in names}


def _error_line(error: BaseException, path: Path) -> int | None:
    """Returns the last line of the file in the error's traceback."""
    path = path.resolve()
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == path
    ]
    return lines[-1] if lines else None
