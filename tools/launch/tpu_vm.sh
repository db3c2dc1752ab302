#!/usr/bin/env bash
# Runs plan_jax.main on all hosts of a Cloud TPU VM, and starts it again until the run is done.
#
#   tools/launch/tpu_vm.sh --type v5e-16 --zone us-west4-a --spot -- \
#     --config mgca --config.data.dir=gs://my-bucket/data --workdir gs://my-bucket/runs/mgca
#
# What follows `--` are the arguments of plan_jax.main. A TPU VM of several hosts, or one that may be
# pre-empted, needs a run that outlives its disks: an address, or a folder of a mounted share. The
# options:
#
#   --name NAME       of the TPU VM, which is created unless it exists (plan-jax)
#   --zone ZONE       of Google Cloud (that of `gcloud config`)
#   --type TYPE       accelerator type, as v5e-8, v6e-16 or v4-32 (v5e-8)
#   --version NAME    its runtime version (that of the type)
#   --spot            may be pre-empted at any time, and is cheaper
#   --queued          waits in Google's queue for a TPU
#   --mount SHARE     a bucket, or HOST:/FOLDER of NFS, which all hosts see as the folder `shared`
#   --restarts N      of the run at most (100)
#   --wait SECONDS    before the next attempt (30)
#   --delete          deletes the TPU VM when the run is done
#   --dry-run         prints the commands of one start and does nothing
#
# Exit codes: 0, the run is done; 2, a mistake, in one sentence; else that of the last start.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source-path=SCRIPTDIR
source "$root/tools/launch/checkout.sh"

name=plan-jax zone='' type=v5e-8 version='' mount='' restarts=100 wait=30
spot='' queued='' delete='' dry_run=''
while [ $# -gt 0 ]; do
  case $1 in
    --)
      shift
      break
      ;;
    --*=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    --name | --zone | --type | --version | --mount | --restarts | --wait)
      [ -n "${2:-}" ] || fail "$1 has no value; --help shows the options"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --spot | --queued | --delete) printf -v "${1#--}" yes ;;
    --dry-run) dry_run=yes ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    *) fail "$1 is not an option; --help shows them, and arguments of plan_jax.main follow --" ;;
  esac
  shift
done

type=${type/#v5e-/v5litepod-} # Google's name
[[ $type =~ ^v[0-9].*-[1-9][0-9]*$ ]] || fail "--type is $type; use a generation and a size, as v5e-8"
for option in restarts wait; do
  [[ ${!option} =~ ^[0-9]+$ ]] || fail "--$option is ${!option}; use a number"
done
[ $# -gt 0 ] || fail "plan_jax.main has no arguments; write them after --, as -- --config mgca"
workdir=$(find_workdir "$@")
remedy='pass --workdir gs://BUCKET/NAME, or --mount SHARE'
if is_address "$workdir"; then
  : # it outlives any disk
elif [ -n "$mount" ]; then
  [[ $workdir == shared/?* ]] ||
    fail "--workdir is ${workdir:-not set}, not in the mounted folder; pass --workdir shared/NAME"
elif [ "${type##*-}" -gt 8 ]; then
  # Larger slices of all generations have several hosts, and none of up to 8.
  fail "$type has several hosts, which need a run that all of them can reach; $remedy"
elif [ -n "$spot" ]; then
  fail "a pre-empted TPU VM loses its disk, and the run with it; $remedy"
fi
if [ -z "$dry_run" ] && ! command -v gcloud >/dev/null; then
  fail "gcloud is not installed, or not in PATH; install the Google Cloud CLI"
fi
if [ -z "$version" ]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

folder=$(mktemp -d)
archive=$folder/plan_jax.tgz
trap 'rm -rf "$folder"' EXIT
trap 'say "stopped; the run saves its state and ends when it next prints"; exit 130' INT TERM HUP

say() {
  printf '== %s\n' "$1" >&2
}

tpus() {
  set -- gcloud compute tpus "$@" ${zone:+"--zone=$zone"} --quiet
  if [ -n "$dry_run" ]; then
    quote "$@"
    printf '\n'
  else
    "$@" </dev/null
  fi
}

# Prints the state of a `tpu-vm` or of its queued resource; ABSENT if there is none, UNKNOWN if
# gcloud cannot say.
find_state() {
  local format='value(state)' state
  if [ "$1" = queued-resources ]; then format='value(state.state)'; fi
  if state=$(tpus "$1" describe "$name" "--format=$format" 2>"$folder/error"); then
    printf '%s' "$state"
  elif grep -qi 'not[_ ]found' "$folder/error"; then
    printf ABSENT
  else
    cat "$folder/error" >&2
    printf UNKNOWN
  fi
}

create() {
  if [ -n "$queued" ]; then
    tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$version" ${spot:+--spot}
  else
    tpus tpu-vm create "$name" "--accelerator-type=$type" "--version=$version" ${spot:+--spot}
  fi
}

remove() {
  if [ -n "$queued" ]; then
    tpus queued-resources delete "$name" --force
  else
    tpus tpu-vm delete "$name"
  fi
}

# Returns when the TPU VM can be used. A TPU that was there once is waited for as long as it takes.
was_ready=''
make_ready() {
  local state request
  while true; do
    state=$(find_state tpu-vm)
    if [ "$state" = ABSENT ] && [ -n "$queued" ]; then
      request=$(find_state queued-resources)
      if [ "$request" != ABSENT ]; then state=$request; fi
    fi
    say "$name is $state"
    case $state in
      READY)
        was_ready=yes
        return
        ;;
      ABSENT)
        create || [ -n "$was_ready" ] || fail "$name cannot be created; gcloud says why above"
        ;;
      PREEMPTED | TERMINATED | SUSPENDED) remove || true ;;
      STOPPED) tpus tpu-vm start "$name" || true ;;
      FAILED)
        [ -n "$was_ready" ] ||
          fail "queued resource $name has failed; delete it, once \`describe\` has said why"
        remove || true
        ;;
      UNKNOWN) [ -n "$was_ready" ] || fail "gcloud cannot find the state of $name; see above" ;;
    esac
    sleep "$wait"
  done
}

# Copies, installs and runs on all hosts. The first connections to a new machine may fail, and one
# to a machine that has gone would never end by itself.
start() {
  local unpack='mkdir -p plan_jax && tar -xzf plan_jax.tgz -C plan_jax'
  local worker='cd plan_jax && exec bash tools/launch/worker.sh'
  local ssh=(tpu-vm ssh "$name" --worker=all --ssh-flag=-oServerAliveInterval=30)
  tpus tpu-vm scp "$archive" "$name:" --worker=all --scp-flag=-oServerAliveInterval=30 ||
    return 255
  tpus "${ssh[@]}" --command="$unpack && $worker install $(quote "$mount")" || return
  tpus "${ssh[@]}" --command="$worker run $(quote "$@")"
}

if [ -n "$dry_run" ]; then
  archive=plan_jax.tgz
  printf '# plan_jax.tgz has the files of %s that git does not ignore\n' "$root"
  create
  start "$@"
  if [ -n "$delete" ]; then remove; fi
  exit
fi
pack_checkout "$root" "$archive"
count=0
while true; do
  make_ready
  code=0
  start "$@" || code=$?
  if [ "$code" = 0 ]; then break; fi
  state=$(find_state tpu-vm)
  is_final=''
  if [ "$code" = 2 ]; then is_final=yes; fi
  if [ "$code" = 65 ]; then code=1 is_final=yes; fi # of plan_jax.main, and not of gcloud
  if [ "$state" = READY ] && [ -n "$is_final" ]; then
    say "ended with exit code $code, which would come again; its message is above"
    exit "$code"
  elif [ "$count" -ge "$restarts" ]; then
    say "ended with exit code $code after $count restarts, as --restarts allows"
    exit "$code"
  fi
  count=$((count + 1))
  say "restart $count of at most $restarts in $wait s: exit code $code, $name is $state"
  sleep "$wait"
done
say 'the run is done'
if [ -n "$delete" ]; then
  remove
else
  say "$name has to be paid for until you delete it: $(dry_run=yes remove)"
fi
