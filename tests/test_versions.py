"""The tool that tests other versions, and the workflow of a public host that calls it."""

import re
import sys
from pathlib import Path

import conftest
import pytest
import yaml

from tools import check_versions

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
JOBS = WORKFLOW["jobs"]
PYTHONS = ["3.11", "3.12", "3.13"]


def list_targets():
    """Returns the targets that the workflow makes, with the values of its matrices."""
    targets = set()
    for job in JOBS.values():
        values = job.get("strategy", {}).get("matrix", {})
        for target in re.findall(r"^make (\$\{\{.*?\}\}|\w+)", commands(job), re.M):
            name = re.fullmatch(r"\$\{\{ matrix\.(\w+) \}\}", target)
            targets |= set(values[name[1]]) if name else {target}
    return targets


def commands(job):
    """Returns the commands of a job, one a line."""
    return "\n".join(step["run"] for step in job["steps"] if "run" in step)


def test_the_workflow_makes_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = list_targets()
    assert targets == {
        *("lint", "matrix", "test", "soak", "parity", "package", "notebooks", "docs", "browser")
    }
    assert targets <= set(re.findall(r"^(\w+):", makefile, re.M))


def test_the_workflow_tests_the_versions_of_the_classifiers():
    assert check_versions.list_pythons() == PYTHONS
    matrix = JOBS["versions"]["strategy"]["matrix"]
    assert matrix["python"] == PYTHONS
    assert matrix["versions"] == list(check_versions.RESOLUTIONS)
    assert "--python ${{ matrix.python }} --versions ${{ matrix.versions }}" in commands(
        JOBS["versions"]
    )


def test_the_workflow_may_only_read_and_names_the_versions_of_its_actions():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True
    for name, job in JOBS.items():
        assert job["timeout-minutes"] and "permissions" not in job, name
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in uses), uses
        (setup,) = [step for step in job["steps"] if "setup-python" in step.get("uses", "")]
        assert setup["with"]["cache"] == "pip"
        assert (ROOT / setup["with"]["cache-dependency-path"]).exists()


def test_every_package_has_a_quick_test():
    """Each package of plan_jax is imported by a test file that is not marked slow."""
    quick = [path for path in ROOT.glob("tests/test_*.py") if path.name not in conftest.SLOW_FILES]
    content = "\n".join(path.read_text() for path in quick)
    packages = [path.parent.name for path in ROOT.glob("plan_jax/*/__init__.py")]
    assert len(packages) >= 12
    missing = [
        name
        for name in packages
        if not re.search(rf"plan_jax\.{name}\b|from plan_jax import .*\b{name}\b", content)
    ]
    assert missing == []


def test_python_is_the_one_of_the_variable(monkeypatch, tmp_path):
    version = "{}.{}".format(*sys.version_info)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv(f"PYTHON{version.replace('.', '')}", sys.executable)
    assert check_versions.find_python(version) == sys.executable


def test_a_python_of_another_version_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHON399", sys.executable)
    assert check_versions.find_python("3.99") == ""


UV = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
with open({calls!r}, "a") as calls:
    print(*arguments, file=calls)
if arguments[:2] == ["pip", "compile"]:
    if {resolves}:
        print("jax==0.7.2\\nflax==0.11.2\\nnumpy==2.0.0")
    else:
        sys.exit("nothing meets the requirements")
if arguments[0] == "venv":
    programs = pathlib.Path(arguments[-1], "bin")
    programs.mkdir(parents=True, exist_ok=True)
    for name in ("python", "ruff", "mypy"):
        program = programs / name
        code = int(name in {failing})
        program.write_text(f"#!/bin/sh\\necho output of {{name}}\\nexit {{code}}")
        program.chmod(0o755)
"""


@pytest.fixture
def matrix(monkeypatch, tmp_path):
    """Returns a function that runs the tool with a `uv` that installs nothing."""
    folder, calls = tmp_path / "matrix", tmp_path / "calls"
    monkeypatch.setattr(check_versions, "FOLDER", folder)
    monkeypatch.setattr(check_versions, "find_python", lambda name: "" if name == "3.12" else "py")
    uv = tmp_path / "uv"
    monkeypatch.setattr(check_versions.shutil, "which", lambda name, path=None: str(uv))

    def run(*arguments, failing=(), resolves=True):
        values = {"python": sys.executable, "calls": str(calls), "failing": tuple(failing)}
        uv.write_text(UV.format(**values, resolves=resolves))
        uv.chmod(0o755)
        calls.write_text("")
        return check_versions.main(arguments), calls.read_text().splitlines(), folder

    return run


def test_all_environments_are_tested_and_the_table_lists_them(matrix, capsys):
    code, calls, folder = matrix()
    output = capsys.readouterr().out
    assert code == 0
    assert "Python 3.12 is not found; install it, or set PYTHON312" in output
    assert (
        len(re.findall(r"^\| 3.1[13] \| (lowest|highest) \| 0.7.2 \| .* passed", output, re.M)) == 4
    )
    resolutions = [call.split("--resolution ")[1].split()[0] for call in calls if "compile" in call]
    assert resolutions == ["lowest-direct", "highest"] * 2
    assert (folder / "3.11-lowest.txt").read_text().startswith("jax==0.7.2")
    log = (folder / "3.11-lowest.log").read_text()
    assert log.count("output of ruff") == 2 and "--disable-error-code=arg-type" in log
    assert "-m not slow" in log and "output of mypy" in log
    assert "disable-error-code" not in (folder / "3.11-highest.log").read_text()


def test_an_environment_is_installed_once(matrix):
    matrix("--python", "3.11")
    _, calls, folder = matrix("--python", "3.11")
    assert [call.split()[1] for call in calls] == ["compile"] * 2
    (folder / "3.11-lowest.txt").write_text("jax==0.7.1\n")
    _, calls, _ = matrix("--python", "3.11", "--versions", "lowest")
    assert [call.split()[0] for call in calls] == ["pip", "venv", "pip", "pip"]


def test_a_failure_does_not_stop_the_others(matrix, capsys):
    code, _, folder = matrix("--versions", "lowest", failing=["mypy"])
    output = capsys.readouterr().out
    assert code == 1 and output.count("| lint failed |") == 2
    assert f"output of mypy\n$ {folder}" in output and f"see {folder}/3.13-lowest.log" in output


def test_requirements_that_exclude_each_other_are_a_failure(matrix, capsys):
    code, _, _ = matrix("--python", "3.13", resolves=False)
    output = capsys.readouterr().out
    assert code == 1 and output.count("| - | - | - | not resolved |") == 2
    assert "nothing meets the requirements" in output


def test_a_python_that_is_asked_for_must_exist(matrix, capsys):
    assert matrix("--python", "3.12")[0] == 1
    assert "| 3.12 |  | - | - | - | failed: not found | 0 |" in capsys.readouterr().out


def test_tests_can_be_chosen(matrix):
    _, _, folder = matrix("--python", "3.11", "--tests", "tests/test_parallel.py", "-x")
    log = (folder / "3.11-highest.log").read_text()
    assert "-m pytest -p no:cacheprovider tests/test_parallel.py -x\n" in log
