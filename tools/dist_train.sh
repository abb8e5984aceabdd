#!/usr/bin/env bash
# Train on several machines: run it on each of them, with the same MASTER_ADDR and PORT.
set -euo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: NNODES=N NODE_RANK=I MASTER_ADDR=HOST [PORT=29500] [GPUS=all] \
           bash tools/dist_train.sh [CONFIG] [OPTIONS of tools/train_pretrained.py]

  NNODES       machines of the run (default 1)
  NODE_RANK    this one's number, 0 to NNODES - 1 (default 0)
  MASTER_ADDR  host name or address of machine 0, as the others reach it
  PORT         a free port of machine 0, the same on all machines (default 29500)
  GPUS         GPUs of this machine, the same number on all; or all (default)

examples, on the machines 10.0.0.1 and 10.0.0.2:
  NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash tools/dist_train.sh
  NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 bash tools/dist_train.sh
TEXT
}

fail() {
    echo "error: $1" >&2
    usage
    exit 2
}

number='^[0-9]+$'
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
PORT=${PORT:-29500}
GPUS=${GPUS:-all}
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage 2>&1
    exit 0
elif ! [[ $NNODES =~ $number ]] || ((10#$NNODES == 0)); then
    fail "NNODES=$NNODES is not a number of machines"
elif ! [[ $NODE_RANK =~ $number ]] || ((10#$NODE_RANK >= 10#$NNODES)); then
    fail "NODE_RANK=$NODE_RANK is not between 0 and $((10#$NNODES - 1))"
elif ! [[ $PORT =~ $number ]] || ((10#$PORT == 0 || 10#$PORT > 65535)); then
    fail "PORT=$PORT is not a port"
elif ! [[ $GPUS == all || $GPUS =~ $number ]]; then
    fail "GPUS=$GPUS is neither a number nor all"
elif ((10#$NNODES > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
    fail "MASTER_ADDR is not set"
fi

if ((10#$NNODES > 1)); then
    # mmfinetune/launch.py reads it and starts torchrun's launcher.
    export MMFINETUNE_NODE="$NODE_RANK/$NNODES@$MASTER_ADDR:$PORT"
fi
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/train_pretrained.py" "$@" --gpus "$GPUS"
