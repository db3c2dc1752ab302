#!/usr/bin/env bash
# What each host of a TPU slice does. tpu_vm.sh and gke.sh call it there.
#
#   worker.sh install [SHARE]   mounts SHARE as the folder `shared`; installs plan_jax into .venv, with
#                               what TPUs and gs:// need
#   worker.sh run ARGUMENTS     runs plan_jax.main as one process of the slice
#
# SHARE is a bucket (by gcsfuse) or HOST:/FOLDER (by NFS). Exit codes: 0; 2, a mistake; 65, that of
# plan_jax.main was 1, which is also that of gcloud's own errors; 75, what is to be installed cannot
# be fetched; 143, the run was stopped, has lost another host or was not copied, and the same command
# continues; else that of plan_jax.main.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

GCSFUSE=${GCSFUSE:-3.7.1}
RELEASES=https://github.com/GoogleCloudPlatform/gcsfuse/releases/download
# Sentences of plan_jax of what may be gone at the next start: a lost host (parallel/hosts.py), a
# failed upload (checkpoint/mirror.py), a run that another pod is still ending (checkpoint/lock.py).
TEMPORARY='another host of this run has ended or cannot be reached|is not copied completely'
TEMPORARY+='|is in use by process'

fail() {
  printf '%s\n' "$1" >&2
  exit 2
}

# As after a failure of the network, which another attempt may not have.
fail_for_now() {
  printf '%s\n' "$1" >&2
  exit 75
}

# A machine that has just started may still be updating itself.
install_package() {
  sudo apt-get -o DPkg::Lock::Timeout=300 update -qq >/dev/null || true # install may work anyway
  sudo apt-get -o DPkg::Lock::Timeout=300 install -qq -y "$1" >/dev/null ||
    fail_for_now "$1 cannot be installed; apt-get says why above"
}

mount_share() {
  mkdir -p shared
  if mountpoint -q shared; then return; fi
  case $1 in
    *:/*)
      command -v mount.nfs >/dev/null || install_package nfs-common
      sudo mount -t nfs "$1" shared || fail "share $1 cannot be mounted; mount says why above"
      ;;
    *)
      if ! command -v gcsfuse >/dev/null; then
        curl -fsSL -o /tmp/gcsfuse.deb "$RELEASES/v$GCSFUSE/gcsfuse_${GCSFUSE}_amd64.deb" ||
          fail_for_now "gcsfuse $GCSFUSE cannot be downloaded; set GCSFUSE to another version"
        install_package /tmp/gcsfuse.deb
      fi
      gcsfuse --implicit-dirs "$1" shared >/dev/null ||
        fail "bucket $1 cannot be mounted; gcsfuse says why above"
      ;;
  esac
}

install() {
  if [ -n "${1:-}" ]; then mount_share "$1"; fi
  local versions
  versions=$(cksum pyproject.toml constraints.txt tools/launch/worker.sh)
  if [ "$(cat .venv/.installed 2>/dev/null)" = "$versions" ]; then return; fi
  rm -rf .venv
  # uv finds a Python that is new enough, or fetches one: that of an image may be too old.
  if ! {
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv &&
      python3 -m uv venv --quiet --python '>=3.11,<3.14' .venv &&
      python3 -m uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[tpu,gcs]'
  }; then
    fail_for_now "plan_jax cannot be installed; pip says why above"
  fi
  printf '%s\n' "$versions" >.venv/.installed
}

run() {
  # A run whose connection broke off ends by itself, when it next prints. Until then it has the TPU.
  exec 9>.running
  if ! flock -n 9; then
    echo 'waiting for the run that was started here before' >&2
    flock -w 600 9 || exit 143
  fi
  local python=python3 process='' stopped='' was_interrupted code messages reader
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
  messages=$(mktemp -d)
  mkfifo "$messages/pipe"
  trap 'stopped=yes was_interrupted=yes; kill -TERM "$process" 2>/dev/null || true' TERM HUP INT
  (
    trap '' TERM HUP INT # the last words of the run come after them
    exec tee "$messages/text" <"$messages/pipe" >&2
  ) &
  reader=$!
  JAX_DISTRIBUTED=auto "$python" -m plan_jax.main "$@" 2>"$messages/pipe" &
  process=$!
  if [ -n "$stopped" ]; then kill -TERM "$process" 2>/dev/null || true; fi
  while true; do
    was_interrupted='' code=0
    wait "$process" || code=$?
    [ -n "$was_interrupted" ] || break # else a signal has ended `wait`, and not the run
  done
  for _ in {1..50}; do # a process that outlives the run may hold the pipe open
    kill -0 "$reader" 2>/dev/null || break
    sleep 0.1
  done
  if [ "$code" = 0 ] && [ -n "$stopped" ]; then code=143; fi
  if [ "$code" = 2 ] && grep -Eq "$TEMPORARY" "$messages/text"; then code=143; fi
  if [ "$code" = 1 ]; then code=65; fi
  rm -rf "$messages"
  exit "$code"
}

case ${1:-} in
  install | run) "$@" ;;
  *) fail "worker.sh has the commands install and run, not ${1:-none}" ;;
esac
