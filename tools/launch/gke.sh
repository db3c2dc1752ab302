#!/usr/bin/env bash
# Runs plan_jax.main as a workload of xpk, on the TPUs of a GKE cluster, restarted until it is done.
#
#   tools/launch/gke.sh --cluster my-cluster --workload mgca --tpu-type v5litepod-16 \
#     -- --config mgca --config.data.dir=gs://my-bucket/data --workdir gs://my-bucket/runs/mgca
#
# What precedes `--` are options of `xpk workload create`, and what follows are the arguments of
# plan_jax.main. The run lies at an address, or in a folder of a storage, which is passed as
# `--storage NAME`; `xpk storage attach` gives a storage its name and its place in a pod. A pod
# installs plan_jax when it starts; with --base-docker-image of an image that has gcsfs and the
# packages of constraints.txt, this takes seconds. A workload is restarted 50 times at most, or
# --max-restarts, and not after a mistake or a loss that is not finite.
#
# Exit codes: 2, a mistake, in one sentence; else that of xpk, which does not wait for the run.

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source-path=SCRIPTDIR
source "$root/tools/launch/checkout.sh"

# The last of several values counts, so that options of the user come after these.
options=(--base-docker-image=python:3.12 --max-restarts=50 --termination-grace-period-seconds=120)
options+=(--restart-on-exit-codes=75) # what could not be fetched; codes above 127 count anyway
has_storage=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --storage | --storage=*) has_storage=yes ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
  esac
  options+=("$1")
  shift
done
[ $# -gt 1 ] || fail "plan_jax.main has no arguments; write them after --, as -- --config mgca"
shift
workdir=$(find_workdir "$@")
if ! is_address "$workdir"; then
  [ -n "$has_storage" ] || fail \
    "a pod loses its disk, and the run with it; pass --workdir gs://BUCKET/NAME, or --storage NAME"
  [[ $workdir == /* ]] ||
    fail "--workdir is ${workdir:-not set}, on the disk of a pod; pass a folder of the storage"
fi
command -v xpk >/dev/null || fail "xpk is not installed, or not in PATH; pip install xpk"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pack_checkout "$root" "$folder/plan_jax.tgz"
mkdir "$folder/plan_jax"
tar -xzf "$folder/plan_jax.tgz" -C "$folder/plan_jax"
worker='bash tools/launch/worker.sh'
xpk workload create --script-dir="$folder/plan_jax" "${options[@]}" \
  --command="$worker install && exec $worker run $(quote "$@")"
