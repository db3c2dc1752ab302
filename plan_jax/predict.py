"""Where phrases are in images, on the command line: heat maps, boxes and masks.

    python -m plan_jax.predict --checkpoint runs/demo --image chest.png \\
        --text "consolidation in the left lower zone" --out heat.png
    python -m plan_jax.predict --checkpoint runs/demo --csv pairs.csv --out results.csv maps.npz
    python -m plan_jax.predict --checkpoint runs/demo --image films/*.png \\
        --text effusion "enlarged heart" --out results.json pictures/ --masks masks/

A table (CSV, JSON Lines) has the columns `image` and `text`; otherwise every phrase is located in
every image. No network is needed. Left and right are the patient's, as in a report. The exit code
is 0; 1 if some pairs failed; 2 if all did, and for a mistake in the command. docs/predict.md says
what the files contain.
"""

from plan_jax import command

if __name__ == "__main__":
    command.end_on_signals()  # before the imports, which take seconds

import argparse
import contextlib
import glob
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from plan_jax.command.arguments import ArgumentParser, local_path
from plan_jax.types import Model, UserError

if TYPE_CHECKING:  # JAX takes seconds
    from plan_jax import prediction
    from plan_jax.prediction import batches, writers

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
TABLE_SUFFIXES = (".csv", ".json", ".npz")
MAX_NAMED = 10  # failures that are printed
SOME_FAILED = 1  # exit code


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns the exit code: that of `command.run`, or 1 if some failed."""
    num_failures = 0

    def run_and_count() -> None:
        nonlocal num_failures
        num_failures = run_command(argv)

    code = command.run(run_and_count)
    return SOME_FAILED if code == 0 and num_failures else code


def run_command(argv: Sequence[str]) -> int:
    """Parses the arguments, writes the results, and returns the number of pairs that failed.

    Raises:
      UserError: for a mistake of the user, or if all pairs fail.
    """
    options = _build_parser().parse_args(argv)
    _check_arguments(options)
    # A notebook may need the hub later.
    if command.owns_process() and os.path.exists(options.checkpoint):
        os.environ["HF_HUB_OFFLINE"] = "1"
    # Imported once the arguments are known to be sensible: JAX takes seconds.
    from plan_jax import model as models
    from plan_jax import parallel, prediction
    from plan_jax.prediction import batches, films, phrases, tables

    settings = prediction.Options(
        threshold=options.threshold,
        normalisation=options.normalisation,
        min_area=options.min_area,
        rounds=options.rounds,
        check=options.check,
    )
    for text in options.text:
        phrases.check_phrase(text, "--text")
    if options.csv:
        jobs = tables.read_jobs(Path(options.csv), options.images and Path(options.images))
    else:
        jobs = batches.list_products(_expand(options.image), options.text)
    num_pairs = sum(len(job.texts) for job in jobs)
    default_path = "heat.png" if num_pairs == 1 else "results.csv"
    paths = [*dict.fromkeys(options.out or ([] if options.json else [default_path]))]
    _check_outputs(paths, num_pairs)
    inputs = {job.path for job in jobs} | ({options.csv} if options.csv else set())
    _check_overwriting(paths, options.masks, inputs)
    parallel.list_devices()
    if len(jobs) == 1 and not jobs[0].fault:
        # A fault needs no model.
        films.read_film(jobs[0].path, 64, check=options.check, name=jobs[0].name)
    model = models.load(options.checkpoint)
    for note in prediction.describe_model(model):
        print(note, file=sys.stderr)
    return _write_results(model, jobs, settings, paths, options)


def _build_parser() -> ArgumentParser:
    parser = ArgumentParser("plan_jax.predict", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run, one of its steps, a model folder, or a name")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--image",
        nargs="+",
        action="extend",
        type=local_path,
        help="frontal chest radiographs: PNG, JPEG, DICOM",
    )
    source.add_argument("--csv", type=local_path, help="a table of pairs: columns image and text")
    add(
        "--images",
        type=local_path,
        help="folder that the paths in the table start from; by default that of it",
    )
    add("--text", nargs="+", action="extend", default=[], help="phrases, or whole reports")
    add(
        "--out",
        nargs="+",
        action="extend",
        type=local_path,
        help="files (.csv, .json, .npz; .png or .jpg for one pair), and a folder for pictures",
    )
    add("--masks", type=local_path, help="folder for the masks")
    add("--json", action="store_true", help="print the rows as JSON")
    add("--threshold", type=float, help="of the mask, 0 to 1; docs/predict.md has the default")
    add("--normalisation", default="minmax", help="scale of the threshold: minmax, raw or z")
    add("--min-area", type=float, help="smallest area of the mask, as a fraction of the image")
    add("--rounds", type=int, help="of refinement; by default as trained")
    add(
        "--no-check",
        dest="check",
        action="store_false",
        help="also accept colour photographs, lateral views and other kinds of DICOM",
    )
    return parser


def _check_arguments(options: argparse.Namespace) -> None:
    """Raises UserError for arguments that do not fit together."""
    from plan_jax import prediction

    if options.image and not options.text:
        raise UserError("--image needs phrases; pass them as --text")
    if options.csv and options.text:
        raise UserError("--csv has the phrases in its column text; leave --text out")
    if options.images and not options.csv:
        raise UserError("--images is the folder of the images of --csv; pass --image alone")
    if options.threshold is None:
        options.threshold = prediction.THRESHOLD
    if options.min_area is None:
        options.min_area = prediction.MIN_AREA
    if options.rounds is not None and options.rounds < 0:
        raise UserError(f"--rounds is {options.rounds}; use 0 or more")


def _expand(patterns: Sequence[str]) -> list[str]:
    """Returns the paths of images; patterns that no shell has replaced become what they match."""
    paths = []
    for pattern in patterns:
        matches = [] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        paths += matches or [pattern]
    return list(dict.fromkeys(paths))


def _check_outputs(paths: Sequence[str], num_pairs: int) -> None:
    """Raises UserError for a file that cannot be written, or is of another kind."""
    for path in paths:
        if not path:
            raise UserError("--out is an empty name; give a file, or a folder for pictures")
        kind = _find_kind(path)
        if kind == "folder":
            continue
        if kind not in ("picture", *TABLE_SUFFIXES):
            names = ", ".join((*PICTURE_SUFFIXES, *TABLE_SUFFIXES))
            raise UserError(f"--out {path} is not a PNG or JPEG, nor a table; use one of {names}")
        if not os.path.isdir(Path(path).absolute().parent):  # unlike Path, it raises nothing
            raise UserError(f"--out {path} is in a folder that does not exist; create it first")
        if kind == "picture" and num_pairs > 1:
            raise UserError(
                f"--out {path} is one picture, and there are {num_pairs} pairs; give a folder"
            )


def _check_overwriting(paths: Sequence[str], masks: str | None, inputs: Iterable[str]) -> None:
    """Raises UserError if a file to write, or one in a folder to write into, is read too."""
    files = {os.path.realpath(path) for path in inputs if path}
    folders = {os.path.dirname(path) for path in files}
    options = [("--out", path) for path in paths] + ([("--masks", masks)] if masks else [])
    places: set[str] = set()
    for option, path in options:
        place = os.path.realpath(path)
        if place in files | folders:
            raise UserError(f"{option} {path} has files that are read; give another place")
        if place in places:
            raise UserError(f"{option} {path} is the place of other results; give another one")
        places.add(place)


def _open_writers(
    stack: contextlib.ExitStack, paths: Sequence[str], masks: str | None, *, prints_json: bool
) -> list["writers.Write"]:
    """Returns the functions that write an outcome; the files are complete when the stack ends."""
    from plan_jax.prediction import writers

    openers = {
        "picture": writers.open_picture,
        "folder": writers.open_pictures,
        ".csv": writers.open_csv,
        ".json": writers.open_json,
        ".npz": writers.open_npz,
    }
    contexts = [openers[_find_kind(path)](Path(path)) for path in paths]
    if masks:
        contexts.append(writers.open_masks(Path(masks)))
    if prints_json:
        contexts.append(writers.write_json(sys.stdout))
    return [stack.enter_context(context) for context in contexts]


def _find_kind(path: str) -> str:
    """Returns `folder`, `picture`, or the suffix of a table."""
    suffix = Path(path).suffix.lower()
    if not suffix or path.endswith(("/", os.sep)) or os.path.isdir(path):
        return "folder"
    return "picture" if suffix in PICTURE_SUFFIXES else suffix


class _Summary:
    """Counts of outcomes, and sentences on the terminal while pairs are located and at the end."""

    def __init__(self, num_pairs: int, bar: tqdm) -> None:
        self.num_pairs, self.bar = num_pairs, bar
        self.num_failures = self.num_notes = 0
        self.faults: dict[str, None] = {}  # in the order in which they came
        self.last: batches.Outcome | None = None

    def add(self, outcome: "batches.Outcome") -> None:
        """Counts an outcome, and prints a fault that has not been printed yet."""
        self.bar.update()
        self.last = outcome
        grounding = outcome.grounding
        if grounding is not None:
            self.num_notes += bool(grounding.notes)
            return
        self.num_failures += 1
        if outcome.fault not in self.faults and self.num_pairs > 1:
            self.faults[outcome.fault] = None
            if len(self.faults) <= MAX_NAMED:
                self.bar.write(outcome.fault, file=sys.stderr)

    def print(self, paths: Sequence[str], clock: "batches.Clock", *, prints_json: bool) -> None:
        """Prints what was written, how long it took, and what failed."""
        stream = sys.stderr if prints_json else sys.stdout
        name = ", ".join(paths) or "result"
        grounding = self.last.grounding if self.last else None
        if self.num_pairs == 1 and grounding is not None:
            x, y = grounding.peak
            rows, columns = grounding.heat_map.shape
            place = f"highest at x {x}, y {y} of {columns} x {rows}, patient's {grounding.side}"
            print(f"{name}: {place}", file=stream)
            for note in grounding.notes:
                print(note, file=sys.stderr)
        else:
            count = f"{self.num_pairs - self.num_failures} of {self.num_pairs} pairs"
            print(f"{name}: {count}", file=stream)
            if self.num_notes:
                print(f"{self.num_notes} pairs have notes", file=sys.stderr)
        median, high = np.percentile(clock.latencies, [50, 95]) * 1000
        num_images = len(clock.latencies)
        percentiles = f"a median of {median:.0f} ms and a 95th percentile of {high:.0f} ms"
        print(
            f"1 image in {median:.0f} ms"
            if num_images == 1
            else f"{num_images} images in {percentiles}",
            f"(reading, encoding, maps, writing), after {clock.compilation:.1f} s of compilation",
            file=sys.stderr,
        )
        if self.num_failures:
            more = len(self.faults) - MAX_NAMED
            also = f", {more} more reasons are in the tables" if more > 0 else ""
            print(f"{self.num_failures} of {self.num_pairs} pairs failed{also}", file=sys.stderr)


def _write_results(
    model: Model,
    jobs: Sequence["batches.Job"],
    settings: "prediction.Options",
    paths: Sequence[str],
    options: argparse.Namespace,
) -> int:
    """Locates all pairs, writes what was asked for, and returns the number of failures.

    Raises:
      UserError: all pairs fail; then no table is written.
    """
    from plan_jax.prediction import batches

    num_pairs = sum(len(job.texts) for job in jobs)
    with_picture = any(_find_kind(path) in ("picture", "folder") for path in paths)
    clock = batches.Clock()
    bar = tqdm(
        total=num_pairs,
        unit="pair",
        dynamic_ncols=True,
        smoothing=0,  # pairs come in batches
        mininterval=0.5 if sys.stderr.isatty() else 20.0,
        file=sys.stderr,
        disable=num_pairs == 1,
    )
    summary = _Summary(num_pairs, bar)
    with bar, contextlib.ExitStack() as stack:
        writes = _open_writers(stack, paths, options.masks, prints_json=options.json)
        # The remaining time does not count the compilation before the first image.
        outcomes = batches.ground_jobs(
            model, jobs, settings, clock, with_picture=with_picture, on_compiled=bar.unpause
        )
        for outcome in outcomes:
            for write in writes:
                write(outcome)
            summary.add(outcome)
        if summary.num_failures == num_pairs:
            reason = f"all {num_pairs} pairs failed; the first: " if num_pairs > 1 else ""
            raise UserError(f"{reason}{next(iter(summary.faults), outcome.fault)}")
    written = [*paths, options.masks] if options.masks else paths
    summary.print(written, clock, prints_json=options.json)
    return summary.num_failures


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
