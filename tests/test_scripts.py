"""The console scripts, run as pip writes them."""

import os
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SCRIPT = "import sys\nfrom {} import {}\nif __name__ == '__main__':\n    sys.exit({}())\n"


def start(folder, name, *arguments, path=ROOT):
    """Starts a console script in its own process, in a folder where it is in `bin`."""
    module, _, function = SCRIPTS[name].partition(":")
    script = folder / "bin" / name
    script.parent.mkdir()
    script.write_text(SCRIPT.format(module, function, function))
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_function_of_a_script_exists(name):
    assert callable(EntryPoint(name, SCRIPTS[name], "console_scripts").load())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, tmp_path):
    process = start(tmp_path, name, "--help")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err
    assert "--help" in out.replace("[no]", "")
    if name == "plan-jax":
        assert "eval/all_phantom" in out.replace("\n", " ")


def test_a_mistyped_config_is_one_sentence(tmp_path):
    process = start(tmp_path, "plan-jax", "--config", "demoo")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == "config file demoo does not exist; did you mean demo?\n"
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_signal_during_the_imports_ends_a_script_quietly(name, tmp_path):
    slow = "print('imports', flush=True)\nimport time\ntime.sleep(60)\n"
    for module in ("absl", "numpy", "jax"):  # whichever is imported first
        (tmp_path / f"{module}.py").write_text(slow)
    process = start(tmp_path, name, path=f"{tmp_path}{os.pathsep}{ROOT}")
    assert process.stdout.readline() == "imports\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (143, "", "interrupted\n")
