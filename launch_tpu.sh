#!/usr/bin/env bash
# Start a training run on every host of one or several TPU VM slices, and again after a failure.
# Needs gcloud and bash 4.4 or newer.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch_tpu.sh --name TPU ... --zone ZONE --config FILE [options] [-- KEY=VALUE ...]

Puts the code on every host, installs it there with the tpu extra, runs
`python -m esft_jax.train --config FILE KEY=VALUE ...` on all hosts at once, and exits with the
highest exit code among them. If one fails, the others are ended. SIGINT and SIGTERM are passed on
to the training processes, which save a checkpoint and stop; so is the end of the terminal.

  --name TPU            name of a TPU VM; once per slice for a run over several
  --zone ZONE           the zone of all of them
  --project PROJECT     their project (default: the one gcloud is set to)
  --queued-resource QR  wait until this queued resource, which creates them, is active
  --restarts N          when a worker fails, start again up to N times, from the last checkpoint
                        (default: 0); not after code 2, which means bad input, nor after a signal
  --config FILE         run configuration, relative to the root of the repository
  --copy                send the files of this checkout, uncommitted ones too (the default)
  --repo URL            let every host pull this git repository instead
  --ref REF             branch, tag or commit to pull (default: HEAD)
  --log-dir DIR         one log file per worker, appended to (default: logs/TPU)
  --dry-run             print the commands, run none
END
}

fail() {
  echo "error: $1" >&2
  exit 2
}

names=() zone='' project='' queued_resource='' restarts=0 config='' repo='' ref='' log_dir=''
copy=false dry_run=false
while (($#)); do
  case $1 in
    --name | --zone | --project | --queued-resource | --restarts | --config | --repo | --ref | \
      --log-dir)
      [[ $# -ge 2 && -n $2 ]] || fail "$1: expected a value"
      option=${1#--}
      if [[ $option == name ]]; then names+=("$2"); else printf -v "${option//-/_}" %s "$2"; fi
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

((${#names[@]})) || fail "--name: missing; expected the name of a TPU VM"
[[ -n $zone ]] || fail "--zone: missing; expected the zone of the TPU VM"
[[ -n $config ]] || fail "--config: missing; expected a run configuration"
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || fail "--restarts: expected a whole number, not $restarts"
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
log_dir=${log_dir:-logs/${names[0]}}

tpus=(gcloud compute tpus)
options=("--zone=$zone" ${project:+"--project=$project"} --quiet)

# The words of a command, quoted where a shell needs it.
words() {
  local word line='' quote="'" escaped="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]] || word="'${word//$quote/"$escaped"}'"
    line+=${line:+ }$word
  done
  echo "$line"
}

run() {
  if $dry_run; then words "$@"; else "$@"; fi
}

# ssh_slice WORKER COMMAND SLICE. A host that is gone closes no connection; ssh must ask for it.
ssh_slice() {
  run "${tpus[@]}" tpu-vm ssh "$3" "${options[@]}" --ssh-flag=-oServerAliveInterval=30 \
    --ssh-flag=-oConnectTimeout=30 "--worker=$1" "--command=$2"
}

# Start a job in a process group of its own: it ends as a whole, and an interrupt from the terminal
# does not cut the connection over which a worker reports how it stops.
start() {
  set -m
  "$@" </dev/null &
  set +m
}

# Run a function for all slices at once, with the slice as its last argument. Returns the highest
# exit code.
all_slices() {
  local name job jobs=() code worst=0
  for name in "${names[@]}"; do
    if $dry_run; then
      "$@" "$name"
    else
      start "$@" "$name"
      jobs+=($!)
    fi
  done
  for job in "${jobs[@]}"; do
    code=0
    wait "$job" || code=$?
    ((code <= worst)) || worst=$code
  done
  return "$worst"
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
# A training may have outlived the connection that it was started over, of an earlier launch too.
[ ! -e esft_jax.pid ] || pkill -KILL -F esft_jax.pid -f esft_jax.train || true
rm -f esft_jax.pid
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

set_up_slice() {
  if [[ -z $repo ]]; then
    run "${tpus[@]}" tpu-vm scp "$archive" "$1:esft_jax.tar.gz" "${options[@]}" --worker=all ||
      return
  fi
  ssh_slice all "$setup" "$1"
}

# The command that trains on the hosts of slice INDEX.
train_command() {
  local megascale=''
  # From these, JAX numbers the processes of several slices and libtpu connects them.
  ((${#names[@]} == 1)) || megascale="env MEGASCALE_COORDINATOR_ADDRESS=$coordinator \
MEGASCALE_NUM_SLICES=${#names[@]} MEGASCALE_SLICE_ID=$1 "
  # exec keeps the process id that was written down.
  cat <<END
set -e
cd esft_jax
# gcloud runs a command again if its connection breaks.
if [ -e ../esft_jax.pid ]; then echo "error: the connection broke" >&2; exit 1; fi
echo \$\$ > ../esft_jax.pid
exec ${megascale}.venv/bin/python -m esft_jax.train --distributed --config $(
    words "$config" "${overrides[@]}"
  )
END
}

# The pattern guards against a process that has only the number of a training that ended.
signal_slice() {
  ssh_slice all "pkill -$1 -F esft_jax.pid -f esft_jax.train" "$2"
}

describe() {
  run "${tpus[@]}" "$1" describe "$2" "${options[@]}" "${@:3}"
}

queued_resource_state() {
  describe queued-resources "$queued_resource" '--format=value(state.state)'
}

slice_state() {
  describe tpu-vm "$1" '--format=value(state)'
}

addresses() {
  describe tpu-vm "$1" '--flatten=networkEndpoints[]' '--format=value(networkEndpoints.ipAddress)'
}

if $dry_run; then
  archive=esft_jax.tar.gz coordinator=ADDRESS
  if [[ -n $queued_resource ]]; then
    queued_resource_state
    echo "# again until it prints ACTIVE"
  fi
  [[ -n $repo ]] || echo "# esft_jax.tar.gz holds the files of $root that git does not ignore"
  all_slices set_up_slice
  all_slices addresses
  echo "# prints one address per worker, ADDRESS first; then at once for each WORKER," \
    "counted from 0 in each slice:"
  for index in "${!names[@]}"; do
    ssh_slice WORKER "$(train_command "$index")" "${names[index]}"
  done
  echo "# if one fails, the others are given 30 seconds; then:"
  all_slices signal_slice KILL
  if ((restarts)); then
    echo "# up to $restarts times, unless one exited with code 2:"
    all_slices slice_state
    echo "# again until each prints READY, and once more from the top"
  fi
  exit
fi

# Wait until the queued resource is active and, after a failure, all slices are ready again.
wait_until_ready() {
  local name state waiting last=''
  while true; do
    waiting=''
    if [[ -n $queued_resource ]]; then
      state=$(queued_resource_state) || state='not there'
      case $state in
        ACTIVE) ;;
        FAILED | SUSPENDING | SUSPENDED)
          echo "error: $queued_resource is $state; delete it and create it again" >&2
          final=true
          return 1
          ;;
        *) waiting="$queued_resource is $state" ;;
      esac
    fi
    if ((attempt > 1)); then
      for name in "${names[@]}"; do
        state=$(slice_state "$name") || state='not there'
        [[ $state == READY ]] || waiting+="${waiting:+, }$name is $state"
      done
    fi
    [[ -n $waiting ]] || return 0
    # Before anything ran, this is rather a wrong name than a TPU VM that is being replaced.
    [[ $waiting != *' not there'* || -n $last ]] || $trained || return 1
    [[ $waiting == "$last" ]] || echo "waiting: $waiting" >&2
    last=$waiting
    # A signal interrupts `wait`, but not `sleep`.
    start sleep 30
    wait "$!"
  done
}

pack_checkout() {
  local file
  git -C "$root" ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      # A tracked file may be deleted in the working tree.
      if [[ -e $root/$file ]]; then printf '%s\0' "$file"; fi
    done | tar -C "$root" -czf "$archive" --null -T -
}

# run_worker INDEX WORKER LABEL: the training on one host, to its end.
run_worker() {
  {
    code=0
    echo "== attempt $attempt, $(date -u +%FT%TZ)"
    ssh_slice "$2" "$(train_command "$1")" "${names[$1]}" || code=$?
    # The code of a worker that was ended says nothing.
    [[ -e $here/ended ]] || echo "$code" >"$here/codes/$3"
  } 2>&1 |
    tee -a -- "$log_dir/${3// /-}.log" |
    awk -v prefix="[$3] " '{ print prefix $0; fflush() }'
  [[ -e $here/codes/$3 && $(<"$here/codes/$3") != 0 ]] || return 0
  # Only the first that fails gets to make the folder.
  ! mkdir "$here/failed" 2>/dev/null || end_rest
}

# The workers that a failed one leaves behind may wait for it for ever.
end_rest() {
  local second codes
  for ((second = 0; second < 30; second++)); do
    codes=("$here"/codes/*)
    ((${#codes[@]} < workers * ${#names[@]})) || return 0
    sleep 1
  done
  echo "ending the workers that are left" >&2
  touch "$here/ended"
  all_slices signal_slice KILL || true
}

find_workers() {
  local name list count
  workers=0
  for name in "${names[@]}"; do
    list=$(addresses "$name") || return
    if [[ -z $list ]]; then
      echo "error: $name: the slice has no workers; is it ready?" >&2
      return 1
    fi
    count=$(grep -c . <<<"$list")
    if ((workers == 0)); then workers=$count coordinator=${list%%$'\n'*}; fi
    # JAX computes the number of a process from that of its slice.
    ((count == workers)) ||
      fail "$name has $count workers and ${names[0]} $workers; expected slices of one size"
  done
}

# Returns the highest exit code of the workers.
train() {
  local index worker label labels=() code worst=0
  here=$scratch/$attempt
  mkdir -p -- "$here/codes" "$log_dir"
  echo "training on $((workers * ${#names[@]})) workers; logs in $log_dir" >&2
  trained=true training=true
  for index in "${!names[@]}"; do
    for ((worker = 0; worker < workers; worker++)); do
      label="worker $worker"
      ((${#names[@]} == 1)) || label="slice $index $label"
      labels+=("$label")
      start run_worker "$index" "$worker" "$label"
    done
  done
  # A signal that was forwarded ends `wait` early.
  until wait; do :; done
  training=false
  for label in "${labels[@]}"; do
    if [[ ! -e $here/codes/$label ]]; then
      echo "$label was ended" >&2
      continue
    fi
    code=$(<"$here/codes/$label")
    ((code == 0)) || echo "$label exited with code $code" >&2
    ((code <= worst)) || worst=$code
    # No restart mends bad input.
    ((code != 2)) || final=true
  done
  return "$worst"
}

run_attempt() {
  wait_until_ready || return
  all_slices set_up_slice || return
  find_workers || return
  train
}

# shellcheck disable=SC2329 # called by the traps
on_signal() {
  $training || exit "$2"
  final=true
  echo "passing SIG$1 on to all workers" >&2
  all_slices signal_slice "$1" ||
    echo "warning: not every worker had a training process to stop" >&2
}

# shellcheck disable=SC2329 # called by the trap
clean_up() {
  local job
  for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done
  rm -rf -- "$scratch"
}

scratch=$(mktemp -d)
trap clean_up EXIT
attempt=0 final=false trained=false training=false
trap 'on_signal INT 130' INT
trap 'on_signal TERM 129' HUP
trap 'on_signal TERM 143' TERM
archive=$scratch/esft_jax.tar.gz
[[ -n $repo ]] || pack_checkout
while true; do
  ((++attempt))
  code=0
  run_attempt || code=$?
  if $final || ((code == 0 || attempt > restarts)); then exit "$code"; fi
  echo "attempt $attempt failed with code $code; starting again" >&2
done
