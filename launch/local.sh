#!/usr/bin/env bash
# N processes of kdjax on this machine, joined into one run.
#
#   launch/local.sh N VERB ARGS...
#   launch/local.sh 2 distill --config configs/digits.py --workdir runs/digits
#
# Process 0 writes to this terminal as it is; each line of process I goes to standard error behind "[I] ", or, where
# LOG_DIR is set, to LOG_DIR/process-I.log. SIGTERM and SIGINT are passed on once, also from Ctrl-C. If a process ends
# badly, the others have GRACE seconds to end by themselves, then get SIGTERM, and KILL_AFTER seconds later SIGKILL.
# The exit code is that of the first process that ended with another one than 0; after SIGTERM it is 143, as schedulers
# that requeue expect.
#
# With NVIDIA GPUs each process gets an equal share of them; without, or with JAX_PLATFORMS=cpu, all share the cores.
#
#   GRACE=60  KILL_AFTER=10  LOG_DIR=  PORT=(a free one)  PYTHON=python3  KDJAX="PYTHON -m kdjax"
#
# Run: with real kdjax processes on CPUs. Checked by tests/test_launch.py with stub commands: codes, signals, a killed
# process, orphans, output, the shares of GPUs (with a stub nvidia-smi); shellcheck. Not run: on a machine with GPUs.
set -u
fail() {
  echo "local.sh: $1" >&2
  exit 2
}

((BASH_VERSINFO[0] >= 4)) || fail "bash $BASH_VERSION is too old: bash 4 or newer is needed."
[[ $# -ge 2 && $1 =~ ^[1-9][0-9]*$ ]] || fail "usage: launch/local.sh N VERB ARGS..., with N = 1, 2, ... processes."
count=$1
shift
python=${PYTHON:-python3}
command=("$python" -m kdjax)
[[ -z ${KDJAX:-} ]] || read -r -a command <<<"$KDJAX"
# Where the kernel can: should this script itself be killed, its processes are told to save and end.
! setpriv --pdeathsig TERM true 2>/dev/null || command=(setpriv --pdeathsig TERM "${command[@]}")

gpus=()
if [[ ${JAX_PLATFORMS:-} != cpu* ]] && command -v nvidia-smi >/dev/null; then
  mapfile -t gpus < <(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')
  [[ -z ${CUDA_VISIBLE_DEVICES:-} ]] || IFS=, read -r -a gpus <<<"$CUDA_VISIBLE_DEVICES"
fi
((${#gpus[@]} % count == 0)) || fail "$count processes cannot share ${#gpus[@]} GPUs equally: choose N to divide it."
share=$((${#gpus[@]} / count))
if ((share)); then platform=gpu; else platform=cpu; fi
# shellcheck source=/dev/null
PROCESSES=$count . "$(dirname "${BASH_SOURCE[0]}")/env/$platform.env" || exit 2

free_port='import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
port=${PORT:-$("$python" -c "$free_port")} || fail "no free port: $python does not run; set PYTHON or PORT."
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
mkfifo "$scratch/never" && exec 3<>"$scratch/never" # what is never written to: a sleep that starts no process

# A process group for each child: a Ctrl-C of the terminal reaches this script alone, which passes it on once, and
# what a child leaves behind (data workers) can be ended with its group.
set -m
pids=()   # of the processes that run; the index is the process
groups=() # of all of them
readers=()
first=""  # the code of the first process that ended badly
stopped=0 # 128 + the signal, where a signal came before that
deadline=""

signal="" # the last that came
told=()   # 1 for each process that it was passed on to

tell() { # those that were not told yet: one may have begun while the signal came
  local i
  for i in ${pids[@]+"${!pids[@]}"}; do
    [[ -z ${told[i]:-} ]] || continue
    told[i]=1
    kill -s "$signal" "${pids[i]}" 2>/dev/null
  done
}

# shellcheck disable=SC2329 # the traps call it
forward() { # signal
  [[ -n $first ]] || stopped=$((128 + $(kill -l "$1")))
  signal=$1
  told=()
  tell
}
trap 'forward TERM' TERM HUP
trap 'forward INT' INT

become() { # process I
  ((share == 0)) || CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:$1*share:share}") && export CUDA_VISIBLE_DEVICES
  exec "${command[@]}" "${words[@]}" --coordinator "127.0.0.1:$port" --processes "$count" --process "$1" 3>&-
}

prefix() { # process I
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

words=("$@")
[[ -z ${LOG_DIR:-} ]] || mkdir -p "$LOG_DIR" || exit 2
for ((i = 0; i < count; i++)); do
  if ((i == 0)); then
    become 0 </dev/null &
  elif [[ -n ${LOG_DIR:-} ]]; then
    become "$i" </dev/null >"$LOG_DIR/process-$i.log" 2>&1 &
  else
    mkfifo "$scratch/$i" || exit 2
    prefix "$i" <"$scratch/$i" >&2 3>&- &
    readers+=($!)
    become "$i" </dev/null >"$scratch/$i" 2>&1 &
  fi
  pids[i]=$!
  groups[i]=$!
  [[ -z $signal ]] || tell
done

ended() { # process I, its status
  (($2)) || return
  if [[ -z $first ]]; then
    deadline=$((SECONDS + ${GRACE:-60}))
    local how="ended with code $2" others=""
    (($2 <= 128)) || how="ended by SIG$(kill -l $(($2 - 128))) (code $2)"
    ((count == 1)) || others="; the others have ${GRACE:-60} seconds to end by themselves"
    ((stopped)) || echo "local.sh: process $1 $how$others." >&2
  fi
  [[ -n $first && $2 -ne $stopped ]] || first=$2
}

force=TERM
while ((${#pids[@]})); do
  read -r -t 0.2 -u 3
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    wait "${pids[i]}" 2>/dev/null
    status=$?
    unset "pids[i]"
    ended "$i" "$status"
  done
  if [[ -n $deadline ]] && ((${#pids[@]} && SECONDS >= deadline)); then
    echo "local.sh: SIG$force to process ${!pids[*]}, which did not end in time." >&2
    for pid in "${pids[@]}"; do
      if [[ $force == KILL ]]; then kill -KILL -- "-$pid"; else kill -TERM "$pid"; fi 2>/dev/null
    done
    deadline=$((SECONDS + ${KILL_AFTER:-10}))
    force=KILL
  fi
done
for group in "${groups[@]}"; do kill -KILL -- "-$group" 2>/dev/null; done
((${#readers[@]} == 0)) || wait "${readers[@]}"
exit "${first:-0}"
