"""Lints and tests plan_jax with the lowest and the highest versions that pyproject.toml allows.

    python tools/check_versions.py [--python 3.11 3.13] [--versions lowest] [--tests ...]

For each Python that is found, uv resolves both sets: the floor of every requirement, or the next
version that has a wheel for this Python, and the newest of everything. Each set is installed into
`.venv-matrix`, once for as long as it stays the same. In each environment ruff and mypy run, then
the doctests and the quick tests, which are all that have no mark `slow`. A failure does not stop
the others; the exit code is 1 if there was one. `.venv-matrix/3.11-lowest.txt` lists the versions,
and `3.11-lowest.log` has the output.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-matrix"
RESOLUTIONS = {"lowest": "lowest-direct", "highest": "highest"}
# Wheels alone: an old version may not compile with this Python. Two are published as sources only.
WHEELS = ("--only-binary", ":all:", "--no-binary", "promise", "--no-binary", "rouge-score")
PACKAGES = ("jax", "flax", "numpy")  # the columns of the table
TAIL = 15  # lines of the log of a failure that are printed
# numpy's annotations of `shape` before 2.3 are wrong; what remains finds names that do not exist.
NUMPY_CODES = ("arg-type", "assignment", "misc", "return-value")


class Row(NamedTuple):
    """The result of one environment."""

    python: str
    versions: str
    packages: dict[str, str]  # name -> version
    result: str
    seconds: float


def list_pythons() -> list[str]:
    """Returns the versions of Python that pyproject.toml names, as 3.11."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line]
    return names


def find_python(version: str) -> str:
    """Returns the path of a Python: PYTHON311's for 3.11, pyenv's or the path's; "" without one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [
        os.environ.get(f"PYTHON{version.replace('.', '')}"),
        *sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")), reverse=True),
        shutil.which(f"python{version}"),
    ]
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in filter(None, candidates):
        result = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if result.stdout.strip() == version:
            return path
    return ""


def read_versions(text: str) -> dict[str, str]:
    """Returns the version of each package of a list of lines `name==version`."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.M))


def resolve(uv: str, python: str, versions: str) -> str:
    """Returns the lines `name==version` that uv selects for a Python.

    Raises:
      subprocess.CalledProcessError: no set of versions meets the requirements.
    """
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python", python]
    command += ["--resolution", RESOLUTIONS[versions], *WHEELS, "--extra", "test", "pyproject.toml"]
    return subprocess.run(
        command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout


def list_steps(folder: Path, versions: str, tests: Sequence[str]) -> dict[str, list[list[str]]]:
    """Returns the commands of each step in an environment."""
    program = str(folder / "bin")
    mypy = [f"{program}/mypy", "--cache-dir", str(folder / "mypy")]
    if versions == "lowest":
        mypy += [f"--disable-error-code={code}" for code in NUMPY_CODES]
    ruff = f"{program}/ruff"
    return {
        "lint": [[ruff, "format", "--check", "."], [ruff, "check", "."], mypy],
        "tests": [[f"{program}/python", "-m", "pytest", "-p", "no:cacheprovider", *tests]],
    }


def check_environment(uv: str, python: str, name: str, versions: str, tests: Sequence[str]) -> Row:
    """Installs one set of versions, if it is not yet, and tests plan_jax with it."""
    start = time.monotonic()
    folder, log = FOLDER / f"{name}-{versions}", FOLDER / f"{name}-{versions}.log"
    listing = FOLDER / f"{name}-{versions}.txt"

    def finish(result: str, packages: str = "") -> Row:
        return Row(name, versions, read_versions(packages), result, time.monotonic() - start)

    with log.open("w") as output:

        def run(command: Sequence[str]) -> bool:
            print("$", *command, file=output, flush=True)
            return not subprocess.run(command, cwd=ROOT, stdout=output, stderr=output).returncode

        try:
            lines = resolve(uv, python, versions)
        except subprocess.CalledProcessError as error:
            output.write(error.stdout)
            return finish("not resolved")
        # The list is written last, so an interrupted installation is repeated.
        if not listing.exists() or listing.read_text() != lines:
            listing.unlink(missing_ok=True)
            temporary = FOLDER / f"{name}-{versions}.new"
            temporary.write_text(lines)
            install = [uv, "pip", "install", "--quiet", "--python", str(folder / "bin/python")]
            install += ["--no-deps"]
            steps = [
                [uv, "venv", "--quiet", "--clear", "--python", python, str(folder)],
                [*install, *WHEELS, "--requirement", str(temporary)],
                [*install, "--editable", "."],
            ]
            if not all(map(run, steps)):
                return finish("not installed", lines)
            temporary.rename(listing)
        failed = [
            step
            for step, commands in list_steps(folder, versions, tests).items()
            if not all([run(command) for command in commands])
        ]
    return finish(f"{' and '.join(failed)} failed" if failed else "passed", lines)


def format_table(rows: Sequence[Row]) -> str:
    """Returns a table in Markdown, one line for each environment.

    >>> print(format_table([Row("3.11", "lowest", {"jax": "0.7.2"}, "passed", 61.4)]))
    | Python | versions | jax | flax | numpy | result | seconds |
    |---|---|---|---|---|---|---|
    | 3.11 | lowest | 0.7.2 | - | - | passed | 61 |
    """
    cells = [["Python", "versions", *PACKAGES, "result", "seconds"]]
    cells += [["---"] * len(cells[0])]
    for row in rows:
        packages = [row.packages.get(name, "-") for name in PACKAGES]
        cells.append([row.python, row.versions, *packages, row.result, f"{row.seconds:.0f}"])
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([lines[0], lines[1].replace(" ", ""), *lines[2:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Tests all environments and prints the table; returns 1 if one failed, 2 if none ran."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = list_pythons()
    parser.add_argument("--python", nargs="+", choices=names, help="all that are found by default")
    parser.add_argument("--versions", nargs="+", choices=RESOLUTIONS, default=list(RESOLUTIONS))
    parser.add_argument(
        "--tests", nargs=argparse.REMAINDER, help="arguments of pytest in place of the quick tests"
    )
    options = parser.parse_args(arguments)
    tests = options.tests or ["-q", "-n", "2", "--dist", "worksteal", "-m", "not slow"]
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not uv:
        print("uv is not installed; use `make matrix`, or pip install uv", file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    rows = []
    for name in options.python or names:
        python = find_python(name)
        if not python:
            print(f"Python {name} is not found; install it, or set PYTHON{name.replace('.', '')}")
            rows += [Row(name, "", {}, "failed: not found", 0)] if options.python else []
            continue
        for versions in options.versions:
            rows.append(check_environment(uv, python, name, versions, tests))
            row = rows[-1]
            print(f"Python {name}, {versions} versions: {row.result} in {row.seconds:.0f} s")
            if row.result != "passed":
                log = FOLDER / f"{name}-{versions}.log"
                print(*log.read_text().splitlines()[-TAIL:], f"see {log}", sep="\n")
            sys.stdout.flush()
    print(format_table(rows))
    if not rows:
        return 2
    return int(any(row.result != "passed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
