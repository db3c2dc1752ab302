"""Builds the wheel and the sdist, and tries the wheel as a new user would.

    python tools/check_package.py

The wheel is installed into an empty environment, and the commands of the README run in an empty
folder, outside the checkout. It needs the package `build` and a package registry.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a library of Python files forgets easily.
REQUIRED = (
    "plan_jax/py.typed",
    "plan_jax/configs/demo.py",
    "plan_jax/configs/eval/all_phantom.py",
    "plan_jax/data/vocabulary.txt",
    "plan_jax/models/phantom-plan/model.safetensors",
    "plan_jax/page/template.html",
    "plan_jax/demo/results.html",
    "plan_jax/demo/style.css",
)
CONFIG = """from configs import testing


def get_config():
    config = testing.get_config()
    config.steps = 2
    return config
"""
DRAW = """import sys
from PIL import Image
from plan_jax.data import phantom
Image.fromarray(phantom.draw_study(0, 0, 96).image[..., 0]).save(sys.argv[1])
"""
GROUND = """import plan_jax
plan_jax.load("phantom-plan").ground("film.png", "effusion on the left").save("heat.png")
"""
# The sizes of configs/testing.py: this checks the package, not the demo.
SMALL = """--config.steps=2 --config.batch=8 --config.parallel.cpu_devices=1 --config.data.size=32
--config.data.builder.size=32 --config.data.builder.train=48 --config.data.builder.val=8
--config.data.builder.test=8 --config.vision.name=resnet_tiny --config.text.name=bert_tiny
--config.embed_dim=8 --config.eval.limit=8 --config.eval.num_prior_records=16"""


def run(*command: str | Path, folder: Path, expected: int = 0) -> str:
    """Runs a command outside the checkout and returns its output.

    Raises:
      SystemExit: the exit code is not the expected one.
    """
    start = time.monotonic()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    line = " ".join(str(word) for word in (Path(command[0]).name, *command[1:]))
    print(f"{time.monotonic() - start:6.1f} s  {line[:120]}", flush=True)
    if result.returncode != expected:
        raise SystemExit(f"{result.stdout}\nexit code {result.returncode}, not {expected}: {line}")
    return result.stdout


def build(out: Path) -> tuple[Path, Path]:
    """Builds the sdist, a wheel from it and a wheel from the checkout; returns sdist and wheel.

    Raises:
      SystemExit: the wheels differ, or miss a file of the checkout.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "build", "--outdir", folder / "sdist", ROOT, folder=folder)
        run(
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--outdir",
            folder / "wheel",
            ROOT,
            folder=folder,
        )
        (from_sdist,) = (folder / "sdist").glob("*.whl")
        (from_checkout,) = (folder / "wheel").glob("*.whl")
        if read_wheel(from_sdist) != read_wheel(from_checkout):
            raise SystemExit("the wheel from the sdist is not the wheel from the checkout")
        out.mkdir(parents=True, exist_ok=True)
        (sdist,) = (folder / "sdist").glob("*.tar.gz")
        paths = (out / sdist.name, out / from_sdist.name)
        for source, path in zip((sdist, from_sdist), paths, strict=True):
            path.write_bytes(source.read_bytes())
    check_contents(*paths)
    return paths


def read_wheel(path: Path) -> dict[str, bytes]:
    """Returns the files of a wheel."""
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def check_contents(sdist: Path, wheel: Path) -> None:
    """Compares the wheel with the files of the checkout that git knows.

    Raises:
      SystemExit: a file is missing, or is there without belonging to it.
    """
    listed = subprocess.run(
        ["git", "ls-files", "plan_jax", "configs"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        raise SystemExit(f"git ls-files fails: {listed.stderr}")
    expected = {
        f"plan_jax/{name}" if name.startswith("configs/") else name
        for name in listed.stdout.splitlines()
    }
    content = {name for name in read_wheel(wheel) if ".dist-info/" not in name}
    missing = sorted((expected | set(REQUIRED)) - content)
    if missing or content - expected:
        raise SystemExit(f"{wheel.name} misses {missing}; has also {sorted(content - expected)}")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = sorted({"README.md", "LICENSE", "CITATION.cff", "configs/demo.py"} - names)
    if missing:
        raise SystemExit(f"{sdist.name} misses {missing}")
    print(f"{wheel.name}: {len(content)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def try_wheel(wheel: Path, environment: Path, folder: Path) -> None:
    """Installs a wheel into an environment, and runs the commands of the README in a folder.

    Raises:
      SystemExit: a command fails.
    """
    binaries = environment / "bin"
    python = binaries / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    # Python compiles a module when it is first imported, and most never are.
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-compile"]
    constraints = ("-c", ROOT / "constraints.txt")
    run(*pip, *constraints, wheel, folder=folder)
    run(*pip, "--no-deps", "--force-reinstall", wheel, folder=folder)

    origin = run(python, "-c", "import plan_jax; print(plan_jax.__file__)", folder=folder)
    if str(environment) not in origin:
        raise SystemExit(f"plan_jax is imported from {origin}")
    for name in ("plan-jax", "plan-jax-predict", "plan-jax-export"):
        run(binaries / name, "--help", folder=folder)
    run(binaries / "plan-jax", "--config", "demoo", folder=folder, expected=2)
    run(binaries / "plan-jax", "--config", "demo", *SMALL.split(), folder=folder)
    run(binaries / "plan-jax", "--mode", "eval", "--checkpoint", "runs/demo", folder=folder)
    (folder / "mine.py").write_text(CONFIG)
    run(binaries / "plan-jax", "--config", "mine.py", folder=folder)
    run(python, "-c", DRAW, "film.png", folder=folder)
    run(python, "-c", GROUND, folder=folder)
    predict = ("--image", "film.png", "--text", "effusion on the left", "--out", "predict.png")
    run(binaries / "plan-jax-export", "runs/demo", "--out", "models/demo", folder=folder)
    run(binaries / "plan-jax-predict", "--checkpoint", "models/demo", *predict, folder=folder)
    reports = ("runs/demo/report.html", "runs/demo/eval/test/report.html", "runs/mine/report.html")
    for path in (*reports, "heat.png", "predict.png"):
        if not (folder / path).stat().st_size:
            raise SystemExit(f"{path} is empty")


def main() -> None:
    """Builds and tries the package; the exit code is 0 if everything works."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder of the built files")
    parser.add_argument(
        "--environment",
        type=Path,
        help="an environment to keep; by default a new one, then removed",
    )
    options = parser.parse_args()
    _, wheel = build(options.out.absolute())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "empty"
        folder.mkdir()
        environment = options.environment or Path(temporary) / "environment"
        try_wheel(wheel, environment.absolute(), folder)


if __name__ == "__main__":
    main()
