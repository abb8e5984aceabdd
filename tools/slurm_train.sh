#!/usr/bin/env bash
# Train under Slurm, on one machine or several; a run that is stopped goes on by itself.
#   sbatch --nodes=2 --gpus-per-node=8 tools/slurm_train.sh [CONFIG] [OPTIONS of train_pretrained.py]
#SBATCH --job-name=mmfinetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time is up: the run saves and ends with 143.
#SBATCH --signal=TERM@120
set -uo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    sed -n '2,3s/^# *//p' "${BASH_SOURCE[0]}" >&2
    echo 'error: there is no Slurm job; submit this script with sbatch' >&2
    exit 2
fi
# sbatch runs a copy of this file.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
if [[ -z $MASTER_ADDR ]]; then
    echo "error: the first node of $SLURM_JOB_NODELIST cannot be told" >&2
    exit 2
fi
export MASTER_ADDR NNODES=$SLURM_JOB_NUM_NODES PORT=$((20000 + SLURM_JOB_ID % 10000))
export GPUS=${SLURM_GPUS_ON_NODE:-all}
# srun does not take it over from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

if ((${SLURM_RESTART_COUNT:-0} > 0)); then
    set -- "$@" --resume auto
fi
# One task on each machine, and the end of one ends all.
# shellcheck disable=SC2016
srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash -c 'NODE_RANK=$SLURM_PROCID exec bash tools/dist_train.sh "$@"' dist_train "$@"
code=$?
if ((code == 143)); then
    echo "Stopped in time; job $SLURM_JOB_ID is queued again and goes on with --resume auto"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
