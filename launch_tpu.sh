#!/usr/bin/env bash
# Start a training run on every host of a TPU VM slice. Needs gcloud and bash 4.4 or newer.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch_tpu.sh --name TPU --zone ZONE --config FILE [options] [-- KEY=VALUE ...]

Puts the code on every host of the slice, installs it there with the tpu extra, runs
`python -m esft_jax.train --config FILE KEY=VALUE ...` on all hosts at once, and exits with the
highest exit code among them. SIGINT and SIGTERM are passed on to the training processes, which
save a checkpoint and stop.

  --name TPU         name of the TPU VM
  --zone ZONE        its zone
  --project PROJECT  its project (default: the one gcloud is set to)
  --config FILE      run configuration, relative to the root of the repository
  --copy             send the files of this checkout, uncommitted ones too (the default)
  --repo URL         let every host pull this git repository instead
  --ref REF          branch, tag or commit to pull (default: HEAD)
  --log-dir DIR      one log file per worker (default: logs/TPU)
  --dry-run          print the commands, run none
END
}

fail() {
  echo "error: $1" >&2
  exit 2
}

name='' zone='' project='' config='' repo='' ref='' log_dir='' copy=false dry_run=false
while (($#)); do
  case $1 in
    --name | --zone | --project | --config | --repo | --ref | --log-dir)
      [[ $# -ge 2 && -n $2 ]] || fail "$1: expected a value"
      option=${1#--}
      printf -v "${option//-/_}" %s "$2"
      shift
      ;;
    --copy) copy=true ;;
    --dry-run) dry_run=true ;;
    -h | --help) usage && exit ;;
    --) shift && break ;;
    *) fail "$1: unknown option; see launch_tpu.sh --help" ;;
  esac
  shift
done
overrides=("$@")

[[ -n $name ]] || fail "--name: missing; expected the name of a TPU VM"
[[ -n $zone ]] || fail "--zone: missing; expected the zone of the TPU VM"
[[ -n $config ]] || fail "--config: missing; expected a run configuration"
if [[ -n $repo ]]; then
  ! $copy || fail "--copy: expected either --copy or --repo"
else
  [[ -z $ref ]] || fail "--ref: expected --repo with it"
  root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
  [[ $config != /* && -f $root/$config ]] ||
    fail "--config: no file $config; expected one relative to the root of this checkout"
  git -C "$root" rev-parse --git-dir >/dev/null 2>&1 ||
    fail "--copy: this folder is no git checkout, which tells what to send; expected --repo URL"
fi
log_dir=${log_dir:-logs/$name}

tpu_vm=(gcloud compute tpus tpu-vm)
options=("--zone=$zone" ${project:+"--project=$project"} --quiet)
describe=("${tpu_vm[@]}" describe "$name" "${options[@]}" '--flatten=networkEndpoints[]'
  '--format=value(networkEndpoints.ipAddress)')

# The words of a command, quoted where a shell needs it.
words() {
  local word line='' quote="'" escaped="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word="'${word//$quote/"$escaped"}'"
    line+=${line:+ }$word
  done
  echo "$line"
}

# On each host: the code in ~/esft_jax, its environment in ~/esft_jax/.venv, and the process id of
# the training in ~/esft_jax.pid.
if [[ -n $repo ]]; then
  get_code="git init -q
git fetch -q --depth 1 $(words "$repo" "${ref:-HEAD}")
git checkout -q --force --detach FETCH_HEAD"
else
  get_code='tar -xzf ../esft_jax.tar.gz'
fi
setup=$(
  cat <<END
set -e
mkdir -p esft_jax
cd esft_jax
# Modules that are gone must not stay importable; runs/ holds what to resume from, and stays.
rm -rf esft_jax
$get_code
for python in python3.13 python3.12 python3.11 python3; do
  [ ! -x .venv/bin/pip ] || break
  "\$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || continue
  "\$python" -m venv .venv || true
done
# Some TPU images have only an older Python: there uv brings one.
if [ ! -x .venv/bin/pip ]; then
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --clear --seed --python 3.12 .venv
fi
.venv/bin/pip install --quiet -e ".[tpu]"
END
)
# exec keeps the process id that was written down.
train="cd esft_jax && echo \$\$ > ../esft_jax.pid && exec .venv/bin/python -m esft_jax.train"
train+=" --distributed --config $(words "$config" "${overrides[@]}")"

send_checkout() {
  local archive=$1 file
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      # A tracked file may be deleted in the working tree.
      if [[ -e $root/$file ]]; then printf '%s\0' "$file"; fi
    done | tar -C "$root" -czf "$archive" --null -T -
  "${tpu_vm[@]}" scp "$archive" "$name:esft_jax.tar.gz" "${options[@]}" --worker=all
}

if $dry_run; then
  if [[ -z $repo ]]; then
    echo "# esft_jax.tar.gz holds the files of $root that git does not ignore"
    words "${tpu_vm[@]}" scp esft_jax.tar.gz "$name:esft_jax.tar.gz" "${options[@]}" --worker=all
  fi
  words "${tpu_vm[@]}" ssh "$name" "${options[@]}" --worker=all "--command=$setup"
  words "${describe[@]}"
  echo "# prints one line per worker; then at once for each WORKER, counted from 0:"
  echo "$(words "${tpu_vm[@]}" ssh "$name" "${options[@]}")" --worker=WORKER \
    "$(words "--command=$train")"
  exit
fi

scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
[[ -n $repo ]] || send_checkout "$scratch/esft_jax.tar.gz"
"${tpu_vm[@]}" ssh "$name" "${options[@]}" --worker=all "--command=$setup"
endpoints=$("${describe[@]}")
workers=$(grep -c . <<<"$endpoints") || fail "$name: the slice has no workers; is it ready?"
mkdir -p -- "$log_dir"
echo "training on $workers workers; logs in $log_dir" >&2

run_worker() {
  {
    code=0
    "${tpu_vm[@]}" ssh "$name" "${options[@]}" "--worker=$1" "--command=$train" || code=$?
    echo "$code" >"$scratch/code-$1"
  } 2>&1 </dev/null |
    tee -- "$log_dir/worker-$1.log" |
    awk -v prefix="[worker $1] " '{ print prefix $0; fflush() }'
}

# shellcheck disable=SC2329 # called by the traps
forward() {
  echo "passing SIG$1 on to all workers" >&2
  # The pattern guards against a process that has only the number of a training that ended.
  "${tpu_vm[@]}" ssh "$name" "${options[@]}" --worker=all \
    "--command=pkill -$1 -F esft_jax.pid -f esft_jax.train" </dev/null ||
    echo "warning: not every worker had a training process to stop" >&2
}

trap 'forward INT' INT
trap 'forward TERM' TERM
# Each worker gets its own process group: an interrupt from the terminal must not cut the
# connection over which a worker reports how it stops.
set -m
for ((worker = 0; worker < workers; worker++)); do run_worker "$worker" & done
set +m
# A signal that was forwarded ends `wait` early.
until wait; do :; done

worst=0
for ((worker = 0; worker < workers; worker++)); do
  code=$(<"$scratch/code-$worker")
  ((code == 0)) || echo "worker $worker exited with code $code" >&2
  ((code <= worst)) || worst=$code
done
exit "$worst"
