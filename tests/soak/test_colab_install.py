"""What installing this package changes on a Colab runtime: no version of JAX's family.

An environment gets an empty package for each line of the runtime's list, in which pip then resolves
without installing. The empty packages have no requirements of their own, so pip may change a few
more on the real machine.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Another version of one of these loses the accelerator, or asks for a restart of the kernel.
FAMILY = re.compile("jax|jaxlib|jax-cuda12-.*|libtpu|flax|optax|orbax-.*|numpy|ml-dtypes|protobuf")
MAX_CHANGED = 2
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", "--dry-run")


@functools.cache
def find_python():
    """Returns a Python 3.13 that reaches a package registry, or "" if there is none."""
    paths = [sys.executable, shutil.which("python3.13")]
    paths += sorted(Path("~/.pyenv/versions").expanduser().glob("3.13*/bin/python"))
    for path in filter(None, paths):
        version = "import sys; sys.exit(sys.version_info[:2] != (3, 13))"
        if subprocess.run([path, "-c", version], capture_output=True).returncode:
            continue
        command = [path, *PIP, "--no-deps", "--ignore-installed", "hatchling"]
        if not subprocess.run(command, capture_output=True, timeout=120).returncode:
            return str(path)
    return ""


def canonical(name):
    """Returns the name of a package as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def make_environment(folder, versions):
    """Creates an environment with empty packages of some versions; returns its Python."""
    subprocess.run([find_python(), "-m", "venv", folder], check=True)
    site = folder / "lib/python3.13/site-packages"
    for name, version in versions.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        header = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(header)
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
    return folder / "bin/python"


@pytest.mark.skipif(not find_python(), reason="needs a Python 3.13 and the package registry")
@pytest.mark.parametrize("runtime", ["cpu", "gpu", "tpu"])
def test_an_installation_keeps_the_jax_of_colab(runtime, tmp_path):
    lines = (ROOT / f"colab/runtime/{runtime}.txt").read_text().splitlines()
    versions = {
        canonical(name): version
        for name, _, version in (line.partition("==") for line in lines if line[0] != "#")
    }
    python = make_environment(tmp_path / "env", versions)
    report = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, *PIP, "--report", report, ROOT], check=True, env=environment)
    packages = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    packages = {canonical(package["name"]): package["version"] for package in packages}
    changed = {name: version for name, version in packages.items() if name in versions}
    print(f"{runtime}: changed {changed or 'nothing'}, new {sorted(set(packages) - set(changed))}")
    assert "plan-jax" in packages
    assert not [name for name in changed if FAMILY.fullmatch(name)], changed
    assert len(changed) <= MAX_CHANGED, changed
