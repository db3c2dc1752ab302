"""The command line: trains a config, evaluates a checkpoint, or says what training needs.

    plan-jax --config demo
    plan-jax --config demo --config.seed=1 --workdir runs/seed_1
    plan-jax --mode eval --checkpoint runs/demo --config.eval.split=val
    plan-jax --config eval/all_phantom --checkpoint runs/demo
    plan-jax --config mgca --mode compile --topology v5e-8

`python -m plan_jax.main` is the same command. A config is a file or the name of one of the package,
and may have an argument, as `gloria:phantom`. `--config.field=value` overrides a field. Re-run the
same command to resume an interrupted run. `--mode compile` compiles the training step, for this
machine or for a TPU that need not be there, and prints its memory, traffic and time. Ctrl-C,
SIGTERM and a closed terminal save the state of a training run; a second one does not wait.
SIGTERM exits with 0, signal n otherwise with 128 + n. A mistake is one sentence on stderr and exit
code 2; so is training that diverges, with exit code 1.
"""

from plan_jax import command

if __name__ == "__main__":
    command.end_on_signals()  # before the imports, which take seconds

import ast
import dataclasses
import functools
import json
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from plan_jax.command.config_files import list_names, load_config_file
from plan_jax.data.processes import leave_worker
from plan_jax.types import UserError, check_local

if TYPE_CHECKING:  # it takes seconds
    from plan_jax.config import Config


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns the exit code, as `command.run` defines it."""
    leave_worker()
    return command.run(lambda: run_command(argv))


def run_command(argv: Sequence[str]) -> None:
    """Parses the arguments, checks all that can be checked, then trains or evaluates.

    Raises:
      UserError: for a mistake of the user.
    """
    values, overrides = parse_arguments(argv)
    if values.help:
        names = textwrap.fill(f"Names of configs: {', '.join(list_names())}.", 80)
        print(__doc__, values.get_help(), names, sep="\n")
        return
    content = load_config_file(values.config) if values.config else None

    # Imported once the arguments are known to be sensible: JAX takes seconds.
    from plan_jax import config, parallel

    is_evaluation = config.is_evaluation(content or {})
    if values.mode != "eval" and values.checkpoint and not is_evaluation:
        raise UserError("--checkpoint is for --mode eval; a run is resumed by its --workdir")
    for name in ("topology", "batch", "effort"):
        if values.mode != "compile" and values[name].present:
            remedy = "; set --config.batch" if name == "batch" else ""
            raise UserError(f"--{name} is for --mode compile{remedy}")
    if values.mode == "compile":
        check_local("--workdir", values.workdir or "")
    if values.mode == "compile" and is_evaluation:
        raise UserError(f"{values.config} only evaluates; compile a config that trains")
    if is_evaluation and not values.checkpoint:
        raise UserError(f"{values.config} evaluates a checkpoint; pass its folder as --checkpoint")
    parallel.initialize()
    with parallel.report_lost_host():
        if values.mode == "compile":
            if values.batch is not None:
                overrides["batch"] = str(values.batch)
            compile_step(content, overrides, values.topology, values.effort, values.workdir)
        elif values.mode == "eval" or is_evaluation:
            folder = values.checkpoint or values.workdir or default_workdir(values.config)
            name = Path(default_workdir(values.config)).name if is_evaluation else ""
            evaluate(content, overrides, folder, name, values.workdir)
        else:
            train(content, overrides, values.workdir or default_workdir(values.config))


def define_flags() -> flags.FlagValues:
    """Returns the flags of the command, without the overrides `--config.field=value`."""
    values = flags.FlagValues()
    options: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_string(
        "config", None, "a file with get_config(), or a name such as demo", **options
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "folder of the run, by default runs/<config>; of an evaluation's results, by default the "
        "run's",
        **options,
    )
    flags.DEFINE_enum("mode", "train", ["train", "eval", "compile"], "what to do", **options)
    flags.DEFINE_string(
        "checkpoint", None, "run, one of its steps, or a saved model, to evaluate", **options
    )
    flags.DEFINE_string(
        "topology",
        None,
        "TPUs to compile for, such as v5e-8 or v5e:2x4; without it, the machine at hand",
        **options,
    )
    flags.DEFINE_integer("batch", None, "config.batch of --mode compile", **options)
    flags.DEFINE_float(
        "effort", 0.0, "of the compiler, -1 (soonest) to 1, in --mode compile", -1, 1, **options
    )
    flags.DEFINE_bool("help", False, "show this and exit", short_name="h", **options)
    return values


def parse_arguments(argv: Sequence[str]) -> tuple[flags.FlagValues, dict[str, str]]:
    """Splits the arguments into flags and overrides of config fields, by dotted name.

    Raises:
      UserError: a flag does not exist or has a wrong value.
    """
    rest, overrides, pending = ["main"], dict[str, str](), ""
    for argument in argv:
        name, has_value, value = argument.lstrip("-").partition("=")
        if pending:  # the value of `--config.field value`
            overrides[pending], pending = argument, ""
        elif argument.startswith("-") and name.startswith("config."):
            field = name.removeprefix("config.")
            pending = "" if has_value else field
            if has_value:
                overrides[field] = value
        else:
            rest.append(argument)
    if pending:
        raise UserError(f"--config.{pending} has no value; write --config.{pending}=value")
    values = define_flags()
    try:
        positional = values(rest)[1:]
    except flags.Error as error:
        raise UserError(f"{str(error).rstrip('.')}; --help shows the flags") from None
    if positional:
        raise UserError(f"argument {positional[0]!r} has no flag; did you mean --config?")
    return values, overrides


def apply_overrides(content: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Returns a config's content with the fields that the command line sets.

    ml_collections parses the values, by the types that the fields have. It can override only fields
    that exist, so the content is completed with the defaults first: those of the method, encoders
    and dataset that the command line chooses.

    Raises:
      UserError: a field does not exist, or its type cannot be parsed from the text.
    """
    from plan_jax import config

    choices = ("method", "data.name", "data.augment.name", "vision.name", "text.name")
    values: dict[str, Any] = dict(content)
    for name in choices:
        if name in overrides:
            values = _set_field(values, name.split("."), overrides[name])
    if not overrides:
        return config.fill_defaults(values)
    # A field's type is that of its default, whatever the file says: None has no parser.
    values = config.fill_defaults(_drop_fields(values, set(overrides) - set(choices)))

    fields = dict(config.flatten(values))
    for name in overrides:
        if name not in fields:
            raise config.unknown_field(name, fields, _owner(name, values))
    # A dict is parsed here: its keys, such as names of columns, may contain dots.
    dicts = {
        name: _parse_dict(name, text)
        for name, text in overrides.items()
        if isinstance(fields[name], Mapping)
    }
    arguments = [
        f"--config.{name}={_as_literal(text, fields[name])}"
        for name, text in overrides.items()
        if name not in dicts
    ]
    flag_values = flags.FlagValues()
    config_flags.DEFINE_config_dict(
        "config",
        ConfigDict(values, allow_dotted_keys=True),
        flag_values=flag_values,
        sys_argv=["main", *arguments],
    )
    try:
        flag_values(["main", *arguments])
    except (flags.Error, TypeError, ValueError) as error:
        match = re.search(r"config\.([\w.]+)", str(error))
        name = match.group(1) if match and match.group(1) in overrides else next(iter(overrides))
        kind = config.KIND_NAMES.get(type(fields[name]), f"a {type(fields[name]).__name__}")
        raise UserError(f"config.{name} is {overrides[name]!r}; must be {kind}") from None
    result = flag_values.config.to_dict()
    for name, value in dicts.items():
        section, _, field = name.rpartition(".")
        functools.reduce(dict.__getitem__, section.split("."), result)[field] = value
    return result


def _set_field(values: Any, path: Sequence[str], value: str) -> Any:
    """Returns nested dicts with one field set; what is no dict stays, for `Config` to report."""
    if not isinstance(values, Mapping):
        return values
    first, *rest = path
    return {**values, first: _set_field(values.get(first, {}), rest, value) if rest else value}


def train(content: Mapping[str, Any] | None, overrides: Mapping[str, str], workdir: str) -> None:
    """Checks the config and the folder of the run, then trains.

    Raises:
      UserError: for a mistake of the user.
    """
    if content is None:
        raise UserError("--config is missing; pass --config demo, for example")
    from plan_jax import config as configs
    from plan_jax import parallel, storage
    from plan_jax.checkpoint.mirror import open_run

    config = configs.Config.from_dict(apply_overrides(content, overrides))
    is_remote = storage.find_place("--workdir", workdir) is not None
    parent = storage.cache_root() if is_remote else Path(workdir).absolute().parent
    cache = config.parallel.cache or parent / "programs"
    parallel.configure_backend(config.parallel.cpu_devices, cache)
    require_same_config(config)
    require_same_workdir(workdir)
    with open_run(workdir) as folder:
        _train_in_folder(config, overrides, workdir, folder)


def _train_in_folder(
    config: "Config", overrides: Mapping[str, str], workdir: str, folder: Path
) -> None:
    """Trains a config in the local folder of a run, unless it holds another one."""
    from plan_jax import config as configs
    from plan_jax import parallel

    previous = parallel.ask_main(lambda: read_run_config(folder))
    if previous:
        configs.check_version(previous, f"workdir {workdir}")
        try:
            previous_config = configs.Config.from_dict(previous)
        except UserError as error:
            raise UserError(
                f"workdir {workdir} holds a config that cannot be used ({error}); "
                "pass another --workdir"
            ) from None
        config = configs.expect_normalisation(config, previous_config)
        difference = configs.difference(previous_config, config)
        if difference:
            raise UserError(
                f"workdir {workdir} holds a run of {difference}; pass another --workdir, or "
                "delete it"
            )
        if "data.fingerprint" not in overrides:
            config = configs.expect_data(config, previous_config, is_own=True)
    else:
        configs.check_image_size(config, is_training=True)
    from plan_jax.train import train as train_run

    command.describe_interruption("the same command continues")
    report_results(lambda: train_run(config, folder), folder / "report.html")


def evaluate(
    content: Mapping[str, Any] | None,
    overrides: Mapping[str, str],
    folder: str,
    name: str = "",
    workdir: str | None = None,
) -> None:
    """Evaluates a trained model by the config of its run, with overrides.

    Args:
      content: a config of the same run; or one that describes only an evaluation, whose data and
        tasks then count; None for the run's own.
      overrides: fields set on the command line.
      folder: the run, or one of its checkpoints; or a saved model, see `model.load`.
      name: name of an evaluation-only config, and of the folder for its results; otherwise that
        folder is named after the split.
      workdir: the folder under which results are written; None for that of the run, and for
        runs/<name> of a saved model.

    Raises:
      UserError: for a mistake of the user.
    """
    from plan_jax import checkpoint, parallel, storage
    from plan_jax import config as configs
    from plan_jax import model as models
    from plan_jax.checkpoint.fetch import fetch_source, find_run
    from plan_jax.export.sources import find_model

    # Where results go, if that is an address; they are written into a local folder first.
    target = storage.find_place("--workdir", workdir) if workdir else None
    place = storage.find_place("checkpoint", folder)
    folder = str(fetch_source(folder))
    saved = find_model(folder)
    if place and not saved and not workdir:
        target = find_run(place)[0]
    source = saved or folder
    run_config = models.load_config(source)
    if name or content is None:
        content = configs.merge_evaluation(run_config.to_dict(), content or {})
    config = configs.Config.from_dict(apply_overrides(content, overrides))
    config = configs.expect_normalisation(config, run_config)
    if saved and "data.tokenizer" not in overrides:  # the model's own is in its folder
        data = dataclasses.replace(config.data, tokenizer=run_config.data.tokenizer)
        config = dataclasses.replace(config, data=data)
    # A caption is a choice of the text that is retrieved or generated, whatever was trained on.
    ignore = ("data.caption", *(("data.name", "data.builder") if name else ()))
    if difference := configs.difference(run_config, config, ignore):
        field = difference.split()[0]
        flag = field if field.removeprefix("config.") in overrides else "config"
        raise UserError(
            f"checkpoint {folder} is of {difference}; leave --{flag} out to use the run's own"
        )
    if name:
        configs.check_image_size(config)
    if "data.fingerprint" not in overrides:
        data, run_data = config.data, run_config.data
        is_own = not name or (data.name, data.builder) == (run_data.name, run_data.builder)
        config = configs.expect_data(config, run_config, is_own)
    from plan_jax.evaluate import UnwrittenResults, evaluate_checkpoint

    if target and workdir:
        parent = storage.cache_folder("results", target.address)
    elif workdir or saved:
        parent = Path(workdir or Path("runs") / Path(folder).absolute().name.partition("@")[0])
    else:
        parent = checkpoint.locate(folder)[0].parent
    out = parent / "eval" / (name or config.eval.split)
    require_writable(out, "folder", "pass another for the results as --workdir")
    programs = parent.absolute().parent / "programs"
    parallel.configure_backend(1, config.parallel.cache or programs)
    require_same_config(config)
    require_same_workdir(workdir or "")
    command.describe_interruption("no results were written")

    def compute_metrics() -> Mapping[str, Any]:
        metrics = evaluate_checkpoint(config, source, out)
        if target and parallel.is_main():
            results = target.below(f"eval/{out.name}")
            try:
                storage.upload_files(out, results)
            except UserError as error:
                raise UnwrittenResults(str(error), dict(metrics)) from error
            parallel.print_once(f"results {out} are copied to {results.address}")
        return metrics

    report_results(compute_metrics, out / "report.html")


def compile_step(
    content: Mapping[str, Any] | None,
    overrides: Mapping[str, str],
    topology: str | None,
    effort: float,
    workdir: str | None,
) -> None:
    """Compiles the training step of a config, and prints what it needs.

    Args:
      content: the config.
      overrides: fields set on the command line.
      topology: TPUs that need not be there; None for the devices of this machine.
      effort: how much XLA tries to make the step fast.
      workdir: the folder for `preflight.json`, the figures; None writes no file.

    Raises:
      UserError: for a mistake of the user.
    """
    if content is None:
        raise UserError("--config is missing; pass --config demo, for example")
    import jax

    from plan_jax import config as configs
    from plan_jax import parallel, preflight

    config = configs.Config.from_dict(apply_overrides(content, overrides))
    configs.check_image_size(config, is_training=True)
    if workdir:
        require_writable(Path(workdir), "workdir", "pass another --workdir")
    if topology is not None:
        # Accelerators would be asked for, and this process does not run anything.
        if command.owns_process() and "JAX_PLATFORMS" not in os.environ:
            jax.config.update("jax_platforms", "cpu")
        target = preflight.make_target(topology, config.parallel.devices)
    else:
        cache = config.parallel.cache or "programs"
        parallel.configure_backend(config.parallel.cpu_devices, cache)
        target = preflight.find_target(config.parallel.devices)
    command.describe_interruption("nothing was written")
    result = preflight.compile_step(config, target, effort)
    if parallel.is_main():
        print(preflight.format_report(result))
        if workdir:
            path = Path(workdir) / "preflight.json"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(preflight.to_dict(result), indent=2) + "\n")
            except OSError as error:
                raise UserError(
                    f"{path} cannot be written ({error.strerror}); pass another --workdir"
                ) from None


def require_same_config(config: Any) -> None:
    """Checks that all hosts of a run have the same config, but for places on their machines.

    Raises:
      UserError: two differ; in every host, and the sentence names the first field.
    """
    from plan_jax import config as configs
    from plan_jax import parallel

    texts = parallel.gather_strings(json.dumps(config.to_dict()))
    first, *others = (configs.Config.from_dict(json.loads(text)) for text in texts)
    for index, other in enumerate(others, 1):
        if difference := configs.host_difference(first, other):
            raise UserError(
                f"{parallel.host_name(index)} does not have the config of {parallel.host_name(0)},"
                f" which has {difference}; start the same command on all hosts"
            )


def require_same_workdir(workdir: str) -> None:
    """Checks that all hosts of a run have the same folder or address.

    Raises:
      UserError: two differ; in every host.
    """
    from plan_jax import parallel

    if difference := parallel.find_difference(workdir or "that of the checkpoint"):
        raise UserError(
            "{} has workdir {}, and {} {}; pass the same --workdir on all hosts".format(*difference)
        )


def report_results(compute_metrics: Callable[[], Mapping[str, Any]], page: Path) -> None:
    """Prints the metrics that a function returns, also where it could not write them.

    Raises:
      UserError: for a mistake of the user, and for files that could not be written.
    """
    from plan_jax.evaluate import UnwrittenResults

    try:
        print_results(compute_metrics(), page)
    except UnwrittenResults as error:
        print_results(error.metrics)
        raise


def print_results(metrics: Mapping[str, Any], page: Path | None = None) -> None:
    """Prints the headline metrics beside their baselines, and the path of the page."""
    from plan_jax import parallel
    from plan_jax.metrics import headlines, is_number, undefined_sentences
    from plan_jax.tasks import CATALOGUE

    if not metrics or not parallel.is_main():
        return  # stopped before the end, or another process prints
    entries = headlines(CATALOGUE, metrics)
    width = max([26, *(len(entry.key) for entry in entries)]) + 2
    for entry in entries:
        baselines = ", ".join(
            f"{label} {value:.3g}"
            for label, value in entry.baselines.items()
            if not math.isnan(value)
        )
        print(f"{entry.key:<{width}}{entry.value:>8.3f}  {baselines}".rstrip())
    for task, sentence in undefined_sentences(CATALOGUE, metrics):
        print(f"{task}: {sentence}")
    for key in ("images_per_s", "wall_s", "evaluated_s"):
        if is_number(metrics.get(key)) and not math.isnan(metrics[key]):
            print(f"{key:<{width}}{metrics[key]:>8.0f}")
    print(f"params_sha256 {metrics['params_sha256']}")
    if page:
        print(f"all metrics, with pictures: {page}")


def read_run_config(workdir: Path) -> dict[str, Any]:
    """Returns the config of the run that a folder holds, or {}, having checked the folder.

    Raises:
      UserError: the folder cannot be created or written, or its config cannot be read.
    """
    require_writable(workdir, "workdir", "pass another --workdir")
    path = workdir / "config.json"
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(content, dict):
            raise ValueError
        return content
    except (OSError, ValueError):
        raise UserError(f"{path} cannot be read; pass another --workdir, or delete it") from None


def require_writable(folder: Path, name: str, remedy: str) -> None:
    """Raises UserError if a folder can neither be written nor created; creates nothing."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # the name is too long, or a folder may not be entered
        raise UserError(f"{name} {folder} cannot be written ({error.strerror}); {remedy}") from None
    parents = folder.absolute().parents
    existing = next(path for path in (folder, *parents) if os.path.exists(path))
    if not existing.is_dir():
        raise UserError(f"{name} {folder} is inside {existing}, a file; {remedy}")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{name} {folder} cannot be written; {remedy}")


def default_workdir(config: str | None) -> str:
    """Returns the folder of a run by the name of its config file.

    Raises:
      UserError: there is no config file.
    """
    if not config:
        raise UserError("--config is missing; pass --config demo, or see --help")
    path, _, argument = config.partition(":")
    return str(Path("runs") / "_".join(filter(None, (Path(path).stem, argument.replace("/", "_")))))


def _drop_fields(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Returns nested dicts without the fields of some dotted names."""
    kept = {}
    for key, value in values.items():
        prefix = f"{key}."
        inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if key not in names:
            kept[key] = _drop_fields(value, inside) if isinstance(value, Mapping) else value
    return kept


def _as_literal(text: str, default: Any) -> str:
    """Returns a text in the form that the parser of a field of that default expects.

    In a tuple `a,b` becomes `('a', 'b')` and `3` becomes `(3,)`; for a bool `yes` becomes `true`.
    """
    if isinstance(default, bool):
        return {"yes": "true", "no": "false"}.get(text.lower(), text)
    if not isinstance(default, tuple):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = [item.strip() for item in text.strip("()[]").split(",") if item.strip()]
    return repr(tuple(value) if isinstance(value, list | tuple) else (value,))


def _parse_dict(name: str, text: str) -> dict[Any, Any]:
    """Returns the dict that a text is a literal of.

    Raises:
      UserError: it is not one.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"config.{name} is {text!r}; must be a dict, such as {{'text': 'report'}}")
    return value


def _owner(name: str, values: Mapping[str, Any]) -> str:
    """Returns whose fields a section has, for an error: those of a method, encoder or dataset."""
    section = name.rpartition(".")[0]
    if section == "hyper":
        return f" of {values.get('method')}"
    source = {"vision": "vision", "text": "text", "data.builder": "data"}.get(section, "")
    choice = values.get(source)
    return f" of {choice.get('name')}" if isinstance(choice, Mapping) else ""


def run_process(argv: Sequence[str]) -> NoReturn:
    """Runs the command in a process of its own, and ends it."""
    try:
        code = run(argv)
    except Exception:
        traceback.print_exc()
        code = 1
    from plan_jax import parallel

    parallel.leave(code)


if __name__ == "__main__":
    run_process(sys.argv[1:])
