"""Compiles the methods at paper size for slices of TPUs: `tools/benchmark.py scale`.

Each combination is one run of `python -m plan_jax.main --mode compile` in a process of its own, one
after the other. Its figures become a line of a file, and what the file has is not compiled again,
so that the same command continues where an earlier one was interrupted. The tables of
`docs/scale.md` are printed from that file. No TPU is needed, and times on one cannot be measured
here: those of the tables are estimates.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BASELINE = "convirt"  # the method whose compile time the others are compared with
# Slice -> its number of chips. The most important ones come first.
TOPOLOGIES = {"v5e-8": 8, "v5e-1": 1, "v6e-1": 1, "v4-32": 16, "v5e-256": 256}
# A paper's batch divided by the devices that its config is made for. A batch that does not divide
# over a slice is replaced by as many pairs on each of its chips.
PAPER_CHIPS = 8
MIB, GIB = 2**20, 2**30
HEADER = (
    "| method | pairs, on a chip | state | temporaries | program | of HBM | TFLOPs | traffic GB |"
    " sent MB | least MB | step ms | images/s | compile s | ratio |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)
STATE = ("parameters", "optimiser state", "moving average", "other state", "batch", "padding")


class Case(NamedTuple):
    """One step to be compiled; `overrides` are fields of the config, as (name, value)."""

    method: str
    topology: str
    batch: int
    effort: float
    overrides: tuple[tuple[str, str], ...] = ()


def choose_batch(paper: int, chips: int) -> int:
    """Returns the pairs of a step on a slice: the paper's, or its pairs per chip on each chip.

    >>> [choose_batch(144, chips) for chips in (1, 8, 16, 256)]
    [144, 144, 144, 4608]
    """
    return paper if paper % chips == 0 else paper // PAPER_CHIPS * chips


def list_cases(
    methods: Sequence[str],
    topologies: Sequence[str],
    effort: float,
    overrides: Mapping[str, str],
) -> list[Case]:
    """Returns all combinations, those of a topology together.

    Raises:
      UserError: a topology is not in `TOPOLOGIES`, or there is no config of the name of a method.
    """
    from plan_jax.command.config_files import load_config_file
    from plan_jax.types import UserError

    for topology in topologies:
        if topology not in TOPOLOGIES:
            raise UserError(f"topology {topology!r} is none of {', '.join(TOPOLOGIES)}")
    fields = dict(overrides)
    fixed = fields.pop("batch", None)
    paper = {method: int(load_config_file(method)["batch"]) for method in methods}
    return [
        Case(
            method,
            topology,
            int(fixed) if fixed else choose_batch(paper[method], TOPOLOGIES[topology]),
            effort,
            tuple(sorted(fields.items())),
        )
        for topology in topologies
        for method in methods
    ]


def read_results(path: Path) -> dict[Case, dict[str, Any]]:
    """Returns the figures of a file by case; an incomplete last line is left out."""
    results = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run was interrupted while it wrote
        fields = entry["case"]
        overrides = tuple((name, value) for name, value in fields.pop("overrides"))
        results[Case(**fields, overrides=overrides)] = entry["figures"]
    return results


def compile_case(case: Case) -> dict[str, Any] | str:
    """Returns the figures of one step, or what the command said when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "plan_jax.main", "--config", case.method, "--mode", "compile"),
            *(f"--topology={case.topology}", f"--batch={case.batch}", f"--effort={case.effort}"),
            *(f"--workdir={folder}",),
            *(f"--config.{name}={value}" for name, value in case.overrides),
        ]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        output = subprocess.run(command, env=environment, capture_output=True, text=True)
        figures = Path(folder) / "preflight.json"
        if figures.exists():
            return json.loads(figures.read_text())
    lines = [line for line in output.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {output.returncode}"


def run_cases(cases: Sequence[Case], path: Path) -> None:
    """Compiles the cases that the file does not have, and adds a line for each."""
    finished = read_results(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(cases, 1):
        if case in finished:
            continue
        print(f"{number}/{len(cases)} {case.method} for {case.topology}", file=sys.stderr)
        figures = compile_case(case)
        if isinstance(figures, str):
            print(f"  {figures}", file=sys.stderr)
            continue
        with path.open("a") as file:
            # A line that an interrupted run has left open is closed first.
            is_open = path.stat().st_size and not path.read_text().endswith("\n")
            entry = {"case": case._asdict(), "figures": figures}
            file.write(("\n" if is_open else "") + json.dumps(entry) + "\n")


# Tables ------------------------------------------------------------------------------------------


def format_tables(
    cases: Iterable[Case], results: Mapping[Case, Mapping[str, Any]]
) -> Iterator[str]:
    """Yields the lines of one table for each topology; what was not compiled is named below it."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.topology, []).append(case)
    for topology, group in groups.items():
        present = [case for case in group if case in results]
        if present:
            yield from ("", describe(topology, results[present[0]]), "", HEADER)
        compiled = [case for case in present if not results[case]["refusal"]]
        baseline = next(
            (cpu_seconds(results[case]) for case in compiled if case.method == BASELINE), 0.0
        )
        yield from (format_row(case, results[case], baseline) for case in present)
        missing = [case.method for case in group if case not in results]
        if missing:
            yield from ("", f"Not compiled for {topology}: {', '.join(missing)}.")


def describe(topology: str, figures: Mapping[str, Any]) -> str:
    """Returns the sentence above a table."""
    chips = figures["devices"]
    limit = figures["memory_limit"] / GIB
    count = "one chip" if chips == 1 else f"{chips} chips"
    return f"**{topology}**: {count} of {figures['chip']}, {limit:.4g} GiB each."


def format_row(case: Case, figures: Mapping[str, Any], baseline: float) -> str:
    """Returns one row: sizes and figures of one chip, images per second of all of them."""
    memory = figures["memory"]
    state = sum(memory.get(kind, 0) for kind in STATE)
    share = figures["memory_total"] / figures["memory_limit"]
    is_refused = bool(figures["refusal"])
    verdict = f"{share:.0%}, {'fits' if figures['fits'] and not is_refused else 'does not fit'}"
    seconds = cpu_seconds(figures)
    cells = [
        case.method,
        f"{case.batch}, {figures['pairs_per_device']}",
        f"{state / GIB:.2f} GiB",
        f"{memory['temporaries'] / GIB:.2f} GiB",
        "-" if is_refused else f"{memory['program'] / GIB:.2f} GiB",
        verdict,
        f"{figures['flops'] / 1e12:.2f}",
        "-" if figures["traffic"] is None else f"{figures['traffic'] / 1e9:.0f}",
        *format_traffic(figures),
        *format_times(figures),
        f"{seconds:.0f}",
        f"{seconds / baseline:.2f}" if baseline and not is_refused else "-",
    ]
    return f"| {' | '.join(cells)} |"


def cpu_seconds(figures: Mapping[str, Any]) -> float:
    """Returns the CPU time of the compiler, which other processes do not disturb."""
    return float(figures["compile_cpu_seconds"])


def format_traffic(figures: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the megabytes that one chip sends in collectives, and the least that it must send."""
    from plan_jax.preflight.roofline import total_sent

    devices, collectives = figures["devices"], figures["collectives"]
    if devices == 1 or collectives is None:
        return "-", "-"
    sent = total_sent({kind: item["bytes"] for kind, item in collectives.items()}, devices)
    least = total_sent(figures["minimum"], devices)
    return f"{sent / 1e6:.1f}", f"{least / 1e6:.1f}" if least else "-"


def format_times(figures: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the estimated milliseconds of a step, and images per second."""
    if figures["step_seconds"] is None:
        return "-", "-"
    return f"{1e3 * figures['step_seconds']:.0f}", f"{figures['images_per_second']:.0f}"


def main(
    path: Path,
    *,
    methods: Sequence[str],
    topologies: Sequence[str],
    effort: float,
    overrides: Mapping[str, str],
    is_compiling: bool,
) -> None:
    """Compiles what the file lacks, if asked to, and prints the tables.

    Args:
      path: the file of figures, one case a line.
      methods, topologies: what to combine.
      effort: that of the compiler, see `--mode compile`.
      overrides: fields of the configs, the same for all methods.
      is_compiling: False only prints what the file has.
    """
    cases = list_cases(methods, topologies, effort, overrides)
    if is_compiling:
        run_cases(cases, path)
    print("\n".join(format_tables(cases, read_results(path))).strip())
