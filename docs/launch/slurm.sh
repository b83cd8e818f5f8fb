#!/bin/bash
# A run on SLURM: one process for each GPU. sbatch docs/launch/slurm.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
# Submit it where the package is installed or checked out; WORKDIR lies on storage that all nodes see.
#SBATCH --job-name=mlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time is over every process is asked to stop: it saves, and the job queues up again below.
#SBATCH --signal=TERM@120

set -u

if [ "$#" -lt 2 ]; then
    echo "usage: sbatch docs/launch/slurm.sh CONFIG WORKDIR [--config.KEY=VALUE ...]" >&2
    exit 2
fi
config=$1
workdir=$2
shift 2

srun --kill-on-bad-exit=1 python -m experiments.run --config "$config" --workdir "$workdir" \
    --config.parallel.distributed=True "$@"
status=$?

# 143 is 128 + SIGTERM: stopped by a signal, all is saved, and the same command goes on.
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
