#!/usr/bin/env bash
# Several processes on this machine: to try a mesh of many hosts, or one process a GPU.
#
#   launch/local.sh 2 --config=quickstart:smoke --workdir=runs/two --config.data.num_shards=2
#   JAX_NUM_CPU_DEVICES=4 launch/local.sh 2 ...      4 virtual devices each, where there is no GPU
#
# GPUs are shared out in order; their number must be a multiple of the number of processes. The
# output of process 0 is shown, that of process I goes to LOGS/process-I.log too (LOGS: a new folder
# under /tmp). Ctrl-C and SIGTERM reach all. The exit code is the first that is not 0.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
number=$1
shift
logs=${LOGS:-$(mktemp -d -t jaxreason.XXXXXX)}
mkdir -p "$logs"

export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS:-localhost:$((20000 + RANDOM % 10000))}
export JAX_NUM_PROCESSES=$number

gpus=0
if command -v nvidia-smi > /dev/null; then
  gpus=$(nvidia-smi --list-gpus | wc -l)
fi
if ((gpus > 1 && gpus % number)); then
  echo "error: $number processes for $gpus GPUs; the number must divide $gpus" >&2
  exit 2
fi

pids=()
# shellcheck disable=SC2329  # the traps call it
forward() {
  for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2> /dev/null || true; done
}
trap 'forward TERM' TERM
trap 'forward INT' INT

for ((i = 0; i < number; i++)); do
  export JAX_PROCESS_ID=$i
  if ((gpus > 1)); then
    share=$((gpus / number))
    JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * share)) $(((i + 1) * share - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  if ((i == 0)); then
    "${PYTHON:-python}" -m jaxreason.launch "$@" > >(tee "$logs/process-0.log") 2>&1 &
  else
    "${PYTHON:-python}" -m jaxreason.launch "$@" > "$logs/process-$i.log" 2>&1 &
  fi
  pids+=($!)
done

code=0
for i in "${!pids[@]}"; do
  ended=0
  wait "${pids[$i]}" || ended=$?
  # A signal that was passed on interrupts `wait` before the process has ended.
  while kill -0 "${pids[$i]}" 2> /dev/null; do
    ended=0
    wait "${pids[$i]}" || ended=$?
  done
  if ((ended != 0 && code == 0)); then
    code=$ended
    echo "process $i ended with code $ended: $logs/process-$i.log; run the same command to resume" >&2
  fi
done
exit "$code"
