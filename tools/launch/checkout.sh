# Functions of the launchers that start a run elsewhere: mistakes, quoting, the files of a checkout.
# shellcheck shell=bash

# Ends with exit code 2, after one sentence.
fail() {
  printf '%s\n' "$1" >&2
  exit 2
}

# Prints the arguments as a line of bash that has the same arguments.
quote() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Prints where plan_jax.main writes by its arguments: --workdir, or else the run of --checkpoint.
find_workdir() {
  local workdir='' checkpoint=''
  while [ $# -gt 0 ]; do
    case $1 in
      --workdir=*) workdir=${1#*=} ;;
      --workdir) workdir=${2:-} ;;
      --checkpoint=*) checkpoint=${1#*=} ;;
      --checkpoint) checkpoint=${2:-} ;;
    esac
    shift
  done
  printf '%s' "${workdir:-$checkpoint}"
}

# Succeeds if a run lies in a bucket of Google's, as gs://bucket/run, and not on a disk.
is_address() {
  [[ $1 =~ ^(gs|gcs)://[^/] ]]
}

# Writes an archive of the checkout $1 to $2: what git tracks or does not ignore, as it is now. The
# folder `shared` is left out, which is the name of the mounted one.
pack_checkout() {
  git -C "$1" rev-parse --git-dir >/dev/null 2>&1 ||
    fail "$1 is not a checkout of git; clone the repository, and run the launcher of the clone"
  git -C "$1" ls-files -z --cached --others --exclude-standard -- . ':!shared' |
    while IFS= read -r -d '' file; do
      if [ -e "$1/$file" ]; then printf '%s\0' "$file"; fi # it may be deleted and still tracked
    done |
    tar -C "$1" --null -czf "$2" -T -
}
