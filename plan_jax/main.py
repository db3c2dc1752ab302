"""The command line: flags -> train or evaluate; a user's mistake is one sentence and exit code 2.

    python -m plan_jax.main --config configs/demo.py
    python -m plan_jax.main --config configs/demo.py --config.optim.rate=1e-3 --workdir runs/slow
    python -m plan_jax.main --mode eval --checkpoint runs/demo --config.eval.split=val
    python -m plan_jax.main --config configs/eval/all_phantom.py --checkpoint runs/demo

The same command again resumes a run that was stopped. SIGTERM saves and exits with 0.
"""

import json
import math
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections.config_flags import config_flags

from plan_jax.types import UserError


def define() -> flags.FlagValues:
    """Make the flags, apart from the overrides `--config.field=value`."""
    values = flags.FlagValues()
    text = {"flag_values": values}
    flags.DEFINE_string("config", None, "a file with get_config(), as those in configs/", **text)
    flags.DEFINE_string("workdir", None, "folder of the run; by default runs/<config>", **text)
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "what to do", **text)
    flags.DEFINE_string("checkpoint", None, "run, or one of its steps, to evaluate", **text)
    flags.DEFINE_bool("help", False, "show this and exit", short_name="h", **text)
    return values


def run(argv: Sequence[str]) -> int:
    """Do what the arguments say and return the exit code: 0, 2 for a mistake, 130 for Ctrl-C."""
    try:
        go(argv)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def go(argv: Sequence[str]) -> None:
    """Read the arguments, check all that can be checked, then train or evaluate.

    Raises:
      UserError: for a mistake of the user.
    """
    given, changes = parse(argv)
    if given.help:
        print(__doc__, given.get_help(), sep="\n")
        return
    loaded = load(given.config) if given.config else None

    from plan_jax import config, parallel  # after the arguments are read: imports take seconds

    judges = config.is_evaluation(loaded or {})
    if given.mode == "train" and given.checkpoint and not judges:
        raise UserError("--checkpoint is for --mode eval; a run is resumed by its --workdir")
    if judges and not given.checkpoint:
        raise UserError(f"{given.config} evaluates a checkpoint; give its folder as --checkpoint")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl's own flags
    parallel.initialize()
    if given.mode == "eval" or judges:
        folder = given.checkpoint or given.workdir or default(given.config)
        evaluate(loaded, changes, folder, Path(default(given.config)).name if judges else "")
    else:
        train(loaded, changes, given.workdir or default(given.config))


def parse(argv: Sequence[str]) -> tuple[flags.FlagValues, dict[str, str]]:
    """Split arguments into flags and changes to the config, by the name of the field.

    Raises:
      UserError: for a flag that there is not, or a value that it cannot have.
    """
    rest, changes, waiting = ["main"], {}, ""
    for argument in argv:
        name, is_set, value = argument.lstrip("-").partition("=")
        if waiting:
            changes[waiting], waiting = argument, ""
        elif argument.startswith("-") and name.startswith("config."):
            waiting = "" if is_set else name.removeprefix("config.")
            if is_set:
                changes[name.removeprefix("config.")] = value
        else:
            rest.append(argument)
    if waiting:
        raise UserError(f"--config.{waiting} has no value; write --config.{waiting}=value")
    values = define()
    try:
        left = values(rest)[1:]
    except flags.Error as error:
        raise UserError(f"{str(error).rstrip('.')}; --help shows the flags") from None
    if left:
        raise UserError(f"argument {left[0]!r} has no flag; write --config {left[0]}, say")
    return values, changes


def load(path: str) -> dict[str, Any]:
    """Read a config file, `file.py` or `file.py:argument`, as plain dicts.

    Raises:
      UserError: the file is missing, or an error is in it.
    """
    name = path.split(":", 1)[0]
    if not Path(name).is_file():
        near = ", ".join(sorted(str(p) for p in Path(name).absolute().parent.glob("*.py"))[:9])
        there = f"there are {near}" if near else "give the path of a file"
        raise UserError(f"config file {name} is not there; {there}")
    try:
        made = config_flags.ConfigFileFlagParser(Path(name).stem, lock_config=False).parse(path)
    except Exception as error:  # whatever a user's file can raise
        place = getattr(error, "lineno", None) or _line(error, name)
        what = (str(error).strip().splitlines() or [""])[-1]
        where = f" line {place}" if place else ""
        raise UserError(
            f"config file {name}{where} fails with {type(error).__name__}: {what}; correct it"
        ) from None
    if not hasattr(made, "to_dict"):
        raise UserError(
            f"config file {name} returns {made!r}; let get_config() return a ConfigDict"
        )
    return made.to_dict()


def train(loaded: dict[str, Any] | None, changes: dict[str, str], workdir: str) -> None:
    """Check the config and the folder of the run, and train.

    Raises:
      UserError: for a mistake of the user.
    """
    if loaded is None:
        raise UserError("--config is not given; write --config configs/demo.py, say")
    from plan_jax import config, parallel

    config.override(loaded, changes)
    config.check(loaded)
    settings = loaded["parallel"]
    beside = Path(workdir).absolute().parent / "programs"
    parallel.configure_backend(settings["cpu_devices"], settings["cache"] or beside)
    held = held_by(Path(workdir))
    if held and (differs := config.difference(held, loaded)):
        raise UserError(
            f"workdir {workdir} holds a run of {differs}; give another --workdir, or delete it"
        )
    from plan_jax.train import train as begin

    show(begin(loaded, workdir), Path(workdir) / "report.html")


def evaluate(
    loaded: dict[str, Any] | None, changes: dict[str, str], folder: str, name: str = ""
) -> None:
    """Evaluate a checkpoint by its own config, with changes and the given config's `eval`.

    Of a config that only tells how to evaluate, its `data` count too; `name` is then that of the
    folder beside the checkpoint where the page goes, else the split's.

    Raises:
      UserError: for a mistake of the user.
    """
    from plan_jax import checkpoint, config, parallel

    held = config.complete(checkpoint.read_config(folder))
    given = config.for_evaluation(held, loaded or {}) if name or loaded is None else loaded
    config.override(given, changes)
    config.check(given)
    if differs := config.difference(held, given, ("data.name", "data.builder") if name else ()):
        raise UserError(
            f"checkpoint {folder} is of {differs}; leave --config out to use the run's own"
        )
    from plan_jax.evaluate import evaluate_checkpoint as begin

    top = checkpoint.locate(folder)[0].parent
    parallel.configure_backend(1, given["parallel"]["cache"] or top.absolute().parent / "programs")
    out = top / "eval" / (name or given["eval"]["split"])
    show(begin(given, folder, out), out / "report.html")


def show(metrics: Mapping[str, Any], page: Path) -> None:
    """Print the table of the metrics that matter most, and where the page of all of them is."""
    from plan_jax import parallel
    from plan_jax.metrics import headlines
    from plan_jax.tasks import CATALOGUE

    if not metrics or not parallel.is_main():
        return  # stopped before the end, or another process says it
    shown = headlines(CATALOGUE, metrics)
    wide = max(26, *(len(entry.key) for entry in shown)) + 2 if shown else 28
    for entry in shown:
        baselines = [f"{label} {value:.3g}" for label, value in entry.baselines.items()]
        print(f"{entry.key:<{wide}}{entry.value:>8.3f}  {', '.join(baselines)}".rstrip())
    for key in ("images_per_s", "wall_s", "evaluated_s"):
        if not math.isnan(metrics.get(key, math.nan)):
            print(f"{key:<{wide}}{metrics[key]:>8.0f}")
    print(f"params_sha256 {metrics['params_sha256']}")
    print(f"all of it, with pictures: {page}")


def held_by(workdir: Path) -> dict[str, Any]:
    """Give the config of the run that a folder holds, {} if none, having checked the folder.

    Raises:
      UserError: the folder cannot be one, or nothing can be written there.
    """
    existing = next(at for at in (workdir, *workdir.absolute().parents) if at.exists())
    if not existing.is_dir():
        raise UserError(f"workdir {workdir} is inside {existing}, a file; give another --workdir")
    if not os.access(existing, os.W_OK):
        raise UserError(f"workdir {workdir} cannot be written; give another --workdir")
    held = workdir / "config.json"
    try:
        return json.loads(held.read_text()) if held.exists() else {}
    except (OSError, ValueError):
        raise UserError(f"{held} cannot be read; give another --workdir, or delete it") from None


def default(config: str | None) -> str:
    """Give the folder of a run whose config file is known.

    Raises:
      UserError: it is not.
    """
    if not config:
        raise UserError("nothing to do; write --config configs/demo.py, or see --help")
    path, _, argument = config.partition(":")
    return str(Path("runs") / "_".join(filter(None, (Path(path).stem, argument.replace("/", "_")))))


def _line(error: Exception, name: str) -> int | None:
    """Give the line of the file where the error arose, if it did there."""
    path = Path(name).resolve()
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).resolve() == path
    ]
    return lines[-1] if lines else None


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
