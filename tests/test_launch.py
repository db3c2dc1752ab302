"""The launchers, executed: stubs of gcloud, SLURM and xpk record calls and play interruptions.

The stub of gcloud runs what it is given for the hosts on this machine, in a folder that stands for
the disk of a host. There a stub of Python stands for plan_jax.main: it records its arguments and
ends as PLAY says, a line for each start.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = sorted(path.name for path in (ROOT / "tools/launch").iterdir())
# What a shell would read as something else than text.
HARD = [
    "--config.eval.tasks=('grounding', \"retrieval\")",
    "--config.data.builder.columns={'text': 'the $HOME of `x`; \\ & | > *'}",
    "--config.data.dir=a  b\tc\nd",
    "",
    "!",
]
ARGUMENTS = ["--config", "mgca", "--workdir", "shared/runs/mgca", *HARD]

RECORD = """record() { { printf '%s\\0' "$@"; printf '\\036'; } >>"$STUBS/calls/${0##*/}"; }
"""
GCLOUD = """record "$@"
vm=$STUBS/vm request=$STUBS/request host=$STUBS/host
case $4 in
  describe)
    if [ "$3" = tpu-vm ]; then place=$vm; else place=$request; fi
    [ -e "$place" ] || { echo 'ERROR: (gcloud) NOT_FOUND: Resource was not found.' >&2; exit 1; }
    cat "$place"
    ;;
  create)
    if [ -e "$STUBS/no_capacity" ]; then
      rm "$STUBS/no_capacity"
      echo 'ERROR: there is no more capacity in the zone' >&2
      exit 1
    fi
    echo READY >"$vm"
    if [ "$3" = queued-resources ]; then echo ACTIVE >"$request"; fi
    ;;
  delete) rm -f "$vm" "$request" ;;
  scp)
    mkdir -p "$host"
    cp "$5" "$host"
    ;;
  ssh)
    for word; do
      case $word in --command=*) command=${word#*=} ;; esac
    done
    code=0
    (cd "$host" && bash -c "$command") || code=$?
    case $code in
      98 | 99)
        echo PREEMPTED >"$vm"
        rm -r "$host"
        # The connection breaks off, or another host had gone before.
        if [ "$code" = 99 ]; then code=255; else code=2; fi
        ;;
    esac
    exit "$code"
    ;;
esac
"""
# Python of a host: pip, uv, and the interpreter that uv makes.
PYTHON = """if [ "$2" != plan_jax.main ]; then
  record "$@"
  if [ "$3" = venv ]; then
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
  fi
  exit
fi
record "$JAX_DISTRIBUTED" "$PWD" "$@"
IFS= read -r line <"$STUBS/play"
sed -i 1d "$STUBS/play"
case $line in *' '*) echo "${line#* }" >&2 ;; esac
case $line in
  wait*)
    trap 'kill $!; exit 0' TERM
    sleep 3600 &
    touch "$STUBS/waiting"
    wait
    ;;
esac
exit "${line%% *}"
"""
SRUN = """record "$JAX_DISTRIBUTED" "$@"
if [ -n "$TIME" ]; then
  trap 'kill $!; exit "$CODE"' TERM
  sleep 3600 &
  echo "$$" >"$STUBS/step"
  read -r _ _ _ shell _ <"/proc/$PPID/stat"
  kill -USR1 "$shell"
  wait
fi
exit "$CODE"
"""
STUBS = {
    "gcloud": GCLOUD,
    "python3": PYTHON,
    "srun": SRUN,
    "scancel": 'record "$@"\nkill -TERM "$(cat "$STUBS/step")"\n',
    "xpk": 'record "$@"\nls "${3#*=}" >"$STUBS/files"\n',
} | dict.fromkeys(["scontrol", "gcsfuse", "mount.nfs", "sudo"], 'record "$@"\n')


class Machine:
    """A checkout with the launchers, and the stubs in front of PATH."""

    def __init__(self, folder):
        self.folder, self.checkout, stubs = folder, folder / "a checkout", folder / "bin"
        shutil.copytree(ROOT / "tools/launch", self.checkout / "tools/launch")
        for name in ("pyproject.toml", "constraints.txt", "new.py", "ignored.py"):
            (self.checkout / name).write_text(name)
        (self.checkout / ".gitignore").write_text("ignored.py\n")
        subprocess.run(["git", "init", "--quiet"], cwd=self.checkout, check=True)
        stubs.mkdir()
        (folder / "calls").mkdir()
        for name, code in STUBS.items():
            (stubs / name).write_text(f"#!{shutil.which('bash')}\n{RECORD}{code}")
            (stubs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}",
            "STUBS": str(folder),
            "HOME": str(folder),
            "LC_ALL": "C.UTF-8",
        }

    def play(self, *lines):
        (self.folder / "play").write_text("\n".join(lines))

    def start(self, launcher, *arguments, **environment):
        """Returns the ended process of a launcher."""
        return subprocess.run(
            ["bash", f"tools/launch/{launcher}", *arguments],
            cwd=self.checkout,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def calls(self, name):
        """Returns the arguments of each call of a stub."""
        path = self.folder / "calls" / name
        calls = path.read_text().split("\036")[:-1] if path.exists() else []
        return [call.split("\0")[:-1] for call in calls]

    def gcloud_verbs(self):
        """Returns the calls of gcloud that change something, as `tpu-vm create`."""
        calls = [" ".join(call[2:4]) for call in self.calls("gcloud")]
        return [call for call in calls if not call.endswith("describe")]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def start_tpu(machine, *options, arguments=ARGUMENTS):
    return machine.start("tpu_vm.sh", "--wait=0", *options, "--", *arguments)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_is_bash(name):
    path = ROOT / "tools/launch" / name
    result = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert os.access(path, os.X_OK) == path.read_text().startswith("#!")


# TPU VM ------------------------------------------------------------------------------------------


def test_a_preempted_run_starts_again_until_it_is_done(machine):
    machine.play("99", "143", "0")
    result = start_tpu(machine, "--spot", "--mount", "my-bucket", "--zone", "us-x1-a")
    assert result.returncode == 0, result.stderr
    runs = machine.calls("python")
    disk = str(machine.folder / "host/plan_jax")
    assert runs == [["auto", disk, "-m", "plan_jax.main", *ARGUMENTS]] * 3
    launch = ["tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]
    created = ["tpu-vm create", *launch]
    assert machine.gcloud_verbs() == [*created, "tpu-vm delete", *created, *launch]
    (creation, _) = [call for call in machine.calls("gcloud") if "create" in call]
    assert creation[4:] == [
        "plan-jax",
        "--accelerator-type=v5litepod-8",
        "--version=v2-alpha-tpuv5-lite",
        "--spot",
        "--zone=us-x1-a",
        "--quiet",
    ]
    assert "exit code 255, plan-jax is PREEMPTED" in result.stderr
    assert "exit code 143, plan-jax is READY" in result.stderr
    assert "has to be paid for until you delete it: gcloud compute tpus tpu-vm" in result.stderr


def test_all_hosts_get_the_checkout_and_one_environment(machine):
    machine.play("143", "0")
    assert start_tpu(machine, "--mount", "my-bucket", "--type", "v4-32").returncode == 0
    calls = machine.calls("gcloud")
    on_hosts = [call for call in calls if call[3] in ("ssh", "scp")]
    assert len(on_hosts) == 6 and all("--worker=all" in call for call in on_hosts)
    assert "--version=tpu-ubuntu2204-base" in next(call for call in calls if "create" in call)
    host = machine.folder / "host/plan_jax"
    assert (host / "new.py").exists() and not (host / "ignored.py").exists()
    # The second start has nothing to install.
    installations = [" ".join(call[:4]) for call in machine.calls("python3")]
    assert installations == ["-m pip install --quiet", "-m uv venv --quiet", "-m uv pip install"]
    assert machine.calls("python3")[2][-3:] == ["constraints.txt", "-e", ".[tpu,gcs]"]
    assert machine.calls("gcsfuse")[0] == ["--implicit-dirs", "my-bucket", "shared"]


ADDRESS = ["--config", "mgca", "--workdir", "gs://my-bucket/runs/mgca"]


EVALUATION = ["--mode", "eval", "--checkpoint=gs://my-bucket/runs/mgca"]


@pytest.mark.parametrize("option", ["--type=v4-32", "--spot"])
@pytest.mark.parametrize("arguments", [ADDRESS, EVALUATION])
def test_a_run_at_an_address_needs_no_share(option, arguments, machine):
    machine.play("143", "0")
    result = start_tpu(machine, option, arguments=arguments)
    assert result.returncode == 0, result.stderr
    assert [call[4:] for call in machine.calls("python")] == [arguments] * 2
    assert not machine.calls("gcsfuse") and not machine.calls("sudo")


def test_a_run_at_an_address_may_read_from_a_share(machine):
    machine.play("0")
    arguments = [*ADDRESS, "--config.data.dir=shared/data"]
    assert start_tpu(machine, "--mount=b", arguments=arguments).returncode == 0
    assert machine.calls("gcsfuse")[0] == ["--implicit-dirs", "b", "shared"]


@pytest.mark.parametrize("workdir", ["file:///tmp/run", "memory://run", "s3://b/run", "gs:///run"])
def test_what_does_not_outlive_the_hosts_or_needs_other_packages_is_no_address(workdir, machine):
    result = start_tpu(machine, "--type=v5e-16", arguments=["--workdir", workdir])
    assert result.returncode == 2 and "pass --workdir gs://BUCKET/NAME" in result.stderr
    assert not machine.calls("gcloud")


def test_a_launcher_that_installs_something_else_installs_again(machine):
    machine.play("0", "0")
    for _ in range(2):
        assert start_tpu(machine, arguments=ADDRESS).returncode == 0
        path = machine.checkout / "tools/launch/worker.sh"
        path.write_text(path.read_text() + "# changed\n")
    assert len(machine.calls("python3")) == 6


def test_a_share_of_nfs_is_mounted(machine):
    machine.play("0")
    assert start_tpu(machine, "--mount", "10.0.0.2:/runs").returncode == 0
    assert machine.calls("sudo")[0] == ["mount", "-t", "nfs", "10.0.0.2:/runs", "shared"]


@pytest.mark.parametrize("code", [1, 2])
def test_a_mistake_and_a_diverged_run_are_not_repeated(machine, code):
    machine.play(f"{code} the loss is NaN; lower it", "0")
    result = start_tpu(machine, "--mount", "b")
    assert result.returncode == code and len(machine.calls("python")) == 1
    assert "the loss is NaN; lower it" in result.stderr
    assert f"ended with exit code {code}, which would come again" in result.stderr


def test_a_machine_that_exists_is_used_and_waited_for_once_it_is_lost(machine):
    machine.play("98", "0")
    (machine.folder / "no_capacity").touch()
    (machine.folder / "vm").write_text("READY")
    result = start_tpu(machine, "--mount", "b")
    assert result.returncode == 0
    created_again = ["tpu-vm delete", "tpu-vm create", "tpu-vm create"]
    assert machine.gcloud_verbs()[:6] == ["tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", *created_again]
    assert "no more capacity" in result.stderr
    assert "exit code 2, plan-jax is PREEMPTED" in result.stderr


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("parallel/hosts.py", "another host of this run has ended or cannot be reached"),
        ("checkpoint/mirror.py", "is not copied completely"),
        ("checkpoint/lock.py", "is in use by "),
    ],
)
def test_a_run_starts_again_after_what_passes(path, sentence, machine):
    assert sentence in (ROOT / "plan_jax" / path).read_text()
    machine.play(f"2 {sentence}process 7; look", "0")
    assert start_tpu(machine, "--mount", "b", "--type=v6e-16").returncode == 0
    assert len(machine.calls("python")) == 2


def test_restarts_end_and_the_machine_is_deleted_on_request(machine):
    machine.play("137", "137", "137", "137")
    result = start_tpu(machine, "--mount", "b", "--restarts", "2", "--delete")
    assert result.returncode == 137 and len(machine.calls("python")) == 3
    assert "after 2 restarts, as --restarts allows" in result.stderr
    assert "tpu-vm delete" not in machine.gcloud_verbs()
    machine.play("0")
    assert start_tpu(machine, "--mount", "b", "--delete").returncode == 0
    assert machine.gcloud_verbs()[-1] == "tpu-vm delete"


def test_a_queued_resource_is_asked_for_again(machine):
    machine.play("99", "0")
    (machine.folder / "request").write_text("SUSPENDED")
    result = start_tpu(machine, "--mount", "b", "--spot", "--queued", "--name", "mine")
    assert result.returncode == 0, result.stderr
    verbs = [verb for verb in machine.gcloud_verbs() if verb.startswith("queued")]
    assert verbs == ["queued-resources delete", "queued-resources create"] * 2
    creation = next(call for call in machine.calls("gcloud") if "create" in call)
    assert creation[4:6] == ["mine", "--node-id=mine"]
    assert creation[7:9] == ["--runtime-version=v2-alpha-tpuv5-lite", "--spot"]


def test_a_dry_run_prints_the_commands_and_does_nothing(machine):
    result = start_tpu(machine, "--dry-run", "--type=v5p-32", "--spot", "--mount=b", "--delete")
    assert result.returncode == 0 and result.stderr == ""
    comment, *lines = result.stdout.splitlines()
    assert comment.startswith("# plan_jax.tgz has the files of ")
    starts = ["tpu-vm create", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm delete"]
    assert [" ".join(line.split()[3:5]) for line in lines] == starts
    assert "--version=v2-alpha-tpuv5 --spot" in lines[0]
    assert not machine.calls("gcloud")
    # The printed command is the one that runs.
    machine.play("0")
    start_tpu(machine, "--type=v5p-32", "--spot", "--mount=b")
    run = machine.calls("gcloud")[-1]
    shell = subprocess.run(
        ["bash", "-c", f"gcloud() {{ printf '%s\\0' \"$@\"; }}; {lines[3]}"],
        capture_output=True,
        text=True,
    )
    assert shell.stdout.split("\0")[:-1] == run


MISTAKES = {
    "unknown option": (["--tpye", "x"], "--tpye is not an option; --help shows them"),
    "no value": (["--zone"], "--zone has no value"),
    "no size": (["--type", "v5e"], "--type is v5e; use a generation and a size, as v5e-8"),
    "no number": (["--restarts", "many"], "--restarts is many; use a number"),
    "no arguments": ([], "plan_jax.main has no arguments; write them after --"),
    "several hosts": (
        ["--type=v5e-16", "--", "x"],
        "v5litepod-16 has several hosts, which need a run that all of them can reach; pass"
        " --workdir gs://BUCKET/NAME, or --mount SHARE",
    ),
    "spot": (["--spot", "--", "x"], "a pre-empted TPU VM loses its disk, and the run with it"),
    "no workdir": (["--mount=b", "--", "x"], "--workdir is not set, not in the mounted folder"),
    "workdir": (
        ["--mount=b", "--", "--workdir", "runs/x"],
        "--workdir is runs/x, not in the mounted folder; pass --workdir shared/NAME",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_with_a_tpu_is_one_sentence(name, machine):
    options, sentence = MISTAKES[name]
    result = machine.start("tpu_vm.sh", *options)
    assert result.returncode == 2 and sentence in result.stderr
    assert result.stderr.count("\n") == 1 and not machine.calls("gcloud")


def test_what_gcloud_refuses_ends_the_first_start(machine):
    (machine.folder / "no_capacity").touch()
    result = start_tpu(machine, "--mount", "b")
    assert result.returncode == 2 and result.stderr.endswith(
        "ERROR: there is no more capacity in the zone\n"
        "plan-jax cannot be created; gcloud says why above\n"
    )


@pytest.mark.parametrize(
    ("launcher", "arguments", "command"),
    [
        ("tpu_vm.sh", ["--", "--config", "mgca"], "gcloud"),
        ("gke.sh", ["--storage", "s", "--", "--workdir", "/shared/x"], "xpk"),
    ],
)
def test_a_missing_command_is_one_sentence(launcher, arguments, command, machine):
    (machine.folder / "bin" / command).unlink()
    tools = machine.folder / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "git", "tar"):
        (tools / name).symlink_to(shutil.which(name))
    result = machine.start(launcher, *arguments, PATH=f"{machine.folder / 'bin'}:{tools}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"{command} is not installed, or not in PATH; ")


@pytest.mark.parametrize("launcher", ["tpu_vm.sh", "gke.sh"])
def test_help_is_the_comment_at_the_top(launcher, machine):
    result = machine.start(launcher, "--help")
    assert result.returncode == 0 and "Exit codes: " in result.stdout
    assert result.stdout.startswith("Runs plan_jax.main") and "#" not in result.stdout


def test_a_launcher_needs_a_checkout(machine):
    shutil.rmtree(machine.checkout / ".git")
    result = start_tpu(machine, "--mount", "b")
    assert result.returncode == 2 and "is not a checkout of git" in result.stderr


# What a host does --------------------------------------------------------------------------------


def test_a_worker_hands_sigterm_on_and_asks_for_a_restart(machine):
    machine.play("wait saving")
    worker = subprocess.Popen(
        ["bash", "tools/launch/worker.sh", "run", "--config", "mgca"],
        cwd=machine.checkout,
        env=machine.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stderr.readline() == "saving\n"
    while not (machine.folder / "waiting").exists():
        assert worker.poll() is None
    worker.send_signal(signal.SIGTERM)
    assert worker.wait() == 143  # although the run itself ends with 0, as it has saved
    worker.stderr.close()


def test_a_worker_has_two_commands(machine):
    result = machine.start("worker.sh", "start")
    assert (result.returncode, result.stderr) == (
        2,
        "worker.sh has the commands install and run, not start\n",
    )


# SLURM -------------------------------------------------------------------------------------------


def start_slurm(machine, *arguments, code=0, **environment):
    job = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "4"}
    job |= {"SLURM_CPUS_PER_TASK": "6", "CODE": str(code)}
    return machine.start("slurm.sbatch", *arguments, **job | environment)


def test_a_job_of_slurm_has_a_task_for_each_gpu(machine):
    assert start_slurm(machine, *ARGUMENTS).returncode == 0
    (call,) = machine.calls("srun")
    assert call[:3] == ["auto", "--kill-on-bad-exit=1", "--cpus-per-task=6"]
    assert call[3:] == ["python", "-m", "plan_jax.main", *ARGUMENTS]
    assert not machine.calls("scancel") and not machine.calls("scontrol")


@pytest.mark.parametrize("code", [0, 143])
def test_a_job_whose_time_is_up_saves_and_is_queued_again(machine, code):
    result = start_slurm(machine, *ARGUMENTS, code=code, TIME="up")
    assert result.returncode == 0, result.stderr
    assert machine.calls("scancel") == [["--signal=TERM", "7"]]
    assert machine.calls("scontrol") == [["requeue", "7"]]


@pytest.mark.parametrize(("code", "time"), [(2, "up"), (1, "up"), (2, ""), (137, "")])
def test_a_job_that_fails_is_not_queued_again(machine, code, time):
    assert start_slurm(machine, *ARGUMENTS, code=code, TIME=time).returncode == code
    assert not machine.calls("scontrol")


def test_a_job_is_not_queued_again_for_ever(machine):
    counts = {"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3"}
    result = start_slurm(machine, *ARGUMENTS, TIME="up", **counts)
    assert result.returncode == 143 and not machine.calls("scontrol")
    assert "queued again 3 times, as MAX_REQUEUES allows" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["x"], {"SLURM_JOB_ID": ""}, "slurm.sbatch is not a job of SLURM; start it with sbatch"),
        ([], {}, "plan_jax.main has no arguments; write them after slurm.sbatch"),
        (["x"], {"SLURM_GPUS_ON_NODE": "8"}, "a node has 8 GPUs and 4 tasks; pass"),
    ],
)
def test_a_mistake_with_slurm_is_one_sentence(arguments, environment, sentence, machine):
    result = start_slurm(machine, *arguments, **environment)
    assert result.returncode == 2 and not machine.calls("srun")
    assert result.stderr.startswith(sentence) and result.stderr.count("\n") == 1


def test_options_of_slurm_precede_the_first_command():
    text = (ROOT / "tools/launch/slurm.sbatch").read_text()
    head = [line for line in text.split("set -uo")[0].splitlines() if line]
    assert all(line.startswith("#") for line in head)
    options = {line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")}
    # SIGTERM would kill the tasks at once, by way of srun.
    assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= options


# GKE ---------------------------------------------------------------------------------------------

XPK = ["--cluster", "c", "--workload", "w", "--tpu-type=v5litepod-16", "--storage=s"]


def test_a_workload_of_gke_is_restarted_with_the_same_arguments(machine):
    arguments = ["--config", "mgca", "--workdir", "/shared/mgca", *HARD]
    result = machine.start("gke.sh", *XPK, "--max-restarts=9", "--", *arguments)
    assert result.returncode == 0, result.stderr
    (call,) = machine.calls("xpk")
    *options, command = call
    assert options[:2] == ["workload", "create"]
    assert "--restart-on-exit-codes=75" in options[:7]
    assert options[7:] == [*XPK, "--max-restarts=9"]
    assert options[4] == "--max-restarts=50"  # the last one counts
    files = (machine.folder / "files").read_text().split()
    assert {"new.py", "tools"} <= set(files) and "ignored.py" not in files
    # A pod runs the command in the folder of the checkout, in a subshell of its bash.
    machine.play("0")
    command = command.removeprefix("--command=")
    subprocess.run(
        ["bash", "-c", f"({command}) & wait $!"],
        cwd=machine.checkout,
        env=machine.environment,
        check=True,
    )
    assert [call[4:] for call in machine.calls("python")] == [arguments]
    assert "\n" not in command  # it becomes a line of YAML


def test_a_workload_at_an_address_needs_no_storage(machine):
    result = machine.start("gke.sh", *XPK[:-1], "--", *ADDRESS)
    assert result.returncode == 0, result.stderr
    (call,) = machine.calls("xpk")
    assert call[-1].endswith(f"worker.sh run {' '.join(ADDRESS)}")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--storage", "s"], "plan_jax.main has no arguments; write them after --"),
        (["--cluster", "c", "--", "x"], "a pod loses its disk, and the run with it; pass --workd"),
        (["--", "--workdir", "/shared/x"], "a pod loses its disk, and the run with it; pass --w"),
        (["--storage", "s", "--", "x"], "--workdir is not set, on the disk of a pod"),
        (["--storage=s", "--", "--workdir=runs/x"], "--workdir is runs/x, on the disk of a pod"),
    ],
)
def test_a_mistake_with_gke_is_one_sentence(arguments, sentence, machine):
    result = machine.start("gke.sh", *arguments)
    assert result.returncode == 2 and not machine.calls("xpk")
    assert result.stderr.startswith(sentence) and result.stderr.count("\n") == 1
