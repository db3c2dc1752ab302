"""TFDS builder of the phantom dataset: draws every split and stores it with its full truth."""

import base64
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from plan_jax.data import phantom, schema
from plan_jax.data.phantom.anatomy import Number
from plan_jax.data.tfds import tfds
from plan_jax.types import UserError

MIN_PARALLEL_IMAGES = 600  # fewer are drawn before a second process has started
MAX_PROCESSES = 8
DIFFICULTIES = ("standard", "hard")
_WORKER_CODE = "from plan_jax.data.builders.phantom import run_worker; run_worker()"

Settings = tuple[int, int, phantom.Difficulty]  # seed, size, difficulty of all images


@dataclasses.dataclass
class PhantomConfig(tfds.core.BuilderConfig):
    """Which phantoms to draw; the last eight fields make a `phantom.Difficulty`."""

    # Seed of all patients and studies.
    seed: int = 0
    # Side of an image, in pixels.
    size: int = 96
    # Number of training images.
    train: int = 4096
    # Number of validation images.
    val: int = 300
    # Number of test images.
    test: int = 300
    # Kinds of findings that occur, in the order of the labels.
    findings: tuple[str, ...] = phantom.FINDINGS
    # Most findings per image, 0 to 4.
    max_findings: int = 4
    # Factor of the image noise (0: none).
    noise: Number = 1.0
    # Mean number of irrelevant sentences per report.
    filler: Number = 1.5
    # Fraction of the mildest findings that a report states with doubt.
    hedged: Number = 0.3
    # Mean number of absent kinds that a report rules out.
    negated: Number = 1.6
    # Fraction of findings that a report states without their location.
    vague: Number = 0.2
    # standard or hard: subtle and overlapping findings, poor films, long reports (docs/data.md).
    difficulty: str = "standard"

    def make_difficulty(self) -> phantom.Difficulty:
        """Returns the settings of the phantoms.

        Raises:
          UserError: if a value is out of range.
        """
        if self.difficulty not in DIFFICULTIES:
            raise UserError(
                f"difficulty {self.difficulty!r} is unknown; use {' or '.join(DIFFICULTIES)}"
            )
        names = {field.name for field in dataclasses.fields(phantom.Difficulty)} - {"hard"}
        values = {name: getattr(self, name) for name in names}
        values |= {"findings": tuple(self.findings), "hard": self.difficulty == "hard"}
        return phantom.Difficulty(**values)

    def identity(self) -> dict[str, Any]:
        """Returns what the records depend on: all fields, but `difficulty` only if it is hard.

        So records that were prepared before there was a difficulty are still found.
        """
        inherited = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
        left_out = inherited | ({"difficulty"} if self.difficulty == "standard" else set())
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in left_out
        }

    def __post_init__(self):
        """Raises UserError if a value is out of range."""
        self.make_difficulty()
        for split in phantom.SPLITS:
            phantom.split_range(split, getattr(self, split))
            if getattr(self, split) == 0:
                raise UserError(f"{split} count 0 leaves that split empty; use 1 or more")
        phantom.check_arguments(self.seed, 0, self.size)


class Phantom(tfds.core.GeneratorBasedBuilder):
    """Builds a dataset of procedural chest radiographs with reports, masks, boxes and triplets."""

    VERSION = tfds.core.Version("1.2.0")
    RELEASE_NOTES = {
        "1.0.0": "First version.",
        "1.1.0": "Boxes of regions.",
        "1.2.0": "Ids, views, sections and the shape of the original.",
    }
    builder_config: PhantomConfig

    def _info(self) -> tfds.core.DatasetInfo:
        anatomy = list(phantom.ANATOMY)
        findings = list(self.builder_config.findings)
        # The region of an organ is the box around its mask, so both have the same names.
        names = {"findings": findings, "anatomy": anatomy, "regions": anatomy}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Procedural frontal chest radiographs with reports and full truth.",
            features=schema.record_features(),
            metadata=tfds.core.MetadataDict(names),
            disable_shuffling=True,  # record i is the i-th index of its split
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        counts = {split: getattr(self.builder_config, split) for split in phantom.SPLITS}
        return {split: self._generate_examples(split, count) for split, count in counts.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        settings = (config.seed, config.size, config.make_difficulty())
        indices = phantom.split_range(split, count)
        num_processes = min(_count_cores(), MAX_PROCESSES) if count > MIN_PARALLEL_IMAGES else 1
        if num_processes > 1:
            examples = _draw_in_parallel(settings, indices, num_processes)
        else:
            examples = _draw_examples(settings, indices)
        yield from zip(range(count), examples, strict=True)


def _count_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; it honours the limits of a container
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _draw_examples(settings: Settings, indices: range) -> Iterator[dict[str, Any]]:
    """Yields the examples of `indices`, in order."""
    seed, size, difficulty = settings
    for index in indices:
        yield schema.to_example(phantom.draw_study(seed, index, size, difficulty))


def _draw_in_parallel(
    settings: Settings, indices: range, num_processes: int
) -> Iterator[dict[str, Any]]:
    """Yields the examples of `indices`, in order, drawn by several processes.

    Process k draws every `num_processes`-th study from the k-th on, and writes one line of JSON per
    example. `multiprocessing` would import the caller's main module again, or fork a process that
    may run JAX's threads.
    """
    root = str(Path(__file__).resolve().parents[3])
    python_path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # One process per core: the threads of numpy's BLAS would only get in each other's way.
    single_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | single_thread | {"PYTHONPATH": python_path}
    seed, size, difficulty = settings
    workers: list[subprocess.Popen] = []
    streams: list[IO[bytes]] = []
    try:
        for first in range(num_processes):
            part = indices[first::num_processes]
            arguments = json.dumps(
                [seed, size, dataclasses.asdict(difficulty), part.start, part.stop, part.step]
            )
            command = [sys.executable, "-c", _WORKER_CODE, arguments]
            workers.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment))
            streams.append(cast(IO[bytes], workers[-1].stdout))
        for position in range(len(indices)):
            # A full pipe stops a worker that is ahead, so memory stays bounded.
            line = streams[position % num_processes].readline()
            if not line:
                raise RuntimeError("a process that drew phantoms ended early; see its error above")
            yield json.loads(line, object_hook=_from_json)
    finally:
        for worker, stream in zip(workers, streams, strict=True):
            worker.kill()
            worker.wait()
            stream.close()


def run_worker() -> None:
    """Draws the studies that the command line names and writes them to stdout."""
    seed, size, difficulty, start, stop, step = json.loads(sys.argv[1])
    difficulty["findings"] = tuple(difficulty["findings"])
    settings = seed, size, phantom.Difficulty(**difficulty)
    try:
        for example in _draw_examples(settings, range(start, stop, step)):
            print(json.dumps(example, default=_to_json), flush=True)
    except BrokenPipeError:  # the parent is gone; a normal exit would fail to flush stdout
        os._exit(1)


def _to_json(value: io.BytesIO | np.ndarray) -> dict[str, Any]:
    """Encodes bytes as {"bytes"}, and an array as {"bytes", "dtype", "shape"}."""
    if isinstance(value, io.BytesIO):
        return {"bytes": base64.b64encode(value.getvalue()).decode()}
    data = base64.b64encode(value.tobytes()).decode()
    return {"bytes": data, "dtype": str(value.dtype), "shape": value.shape}


def _from_json(value: dict[str, Any]) -> io.BytesIO | np.ndarray | dict[str, Any]:
    """Inverts `_to_json`; returns any other dict unchanged."""
    if "bytes" not in value:
        return value
    data = base64.b64decode(value["bytes"])
    if "dtype" not in value:
        return io.BytesIO(data)
    return np.frombuffer(data, value["dtype"]).reshape(value["shape"])
