#!/usr/bin/env bash
# One command of kdjax on all workers of a TPU VM that exists and has this repository, installed, in FOLDER.
#
#   launch/tpu_vm.sh NAME ZONE VERB ARGS...
#   DRY_RUN=1 launch/tpu_vm.sh my-v5e us-west4-a distill --config configs/fashion_mnist.py --workdir /mnt/shared/run
#
# It creates, changes and deletes nothing in the cloud: it runs the command over ssh on every worker, where JAX finds
# the others (--cluster), and shows their output; process 0 alone has any. DRY_RUN=1 prints the gcloud command and
# runs nothing. The workdir is on a filesystem that all workers mount. The run ends with the ssh connection: start
# this in tmux on a machine that stays, and run the same command again to go on.
#
#   DRY_RUN=  FOLDER=kdjax  PROJECT=(gcloud's own)  PYTHON=python3  KDJAX="PYTHON -m kdjax"
#
# Checked by shellcheck, and by tests/test_launch.py with a stub gcloud that runs the command in a local shell: words
# with spaces and quotes arrive whole. Not run: with gcloud, on a TPU.
set -euo pipefail

if (($# < 3)); then
  echo "tpu_vm.sh: usage: launch/tpu_vm.sh NAME ZONE VERB ARGS..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2
# Quoted for the shell at the other end.
printf -v words ' %q' "$@" --cluster
remote="cd $(printf %q "${FOLDER:-kdjax}") && . launch/env/tpu.env && exec ${KDJAX:-${PYTHON:-python3} -m kdjax}$words"
gcloud=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$remote")
[[ -z ${PROJECT:-} ]] || gcloud+=("--project=$PROJECT")

if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${gcloud[@]}"
  echo
else
  exec "${gcloud[@]}"
fi
