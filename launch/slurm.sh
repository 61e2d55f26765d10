#!/usr/bin/env bash
# Trains on a SLURM cluster, and has itself started again. Hand it to sbatch, with what the cluster
# asks for (account, partition, constraint), from the environment in which olmo-jax is installed:
#
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 --time=24:00:00 \
#     launch/slurm.sh --gin_file=configs/olmo2/7b.gin --gin.Train.run_dir=/shared/runs/7b
#
# One process a GPU as above, or one a node with --ntasks-per-node=1. All arguments are those of
# `olmo-jax train`. Without sbatch, `launch/slurm.sh --dry_run …` prints what a job would run.
# OLMO_JAX_MAX_RESTARTS: so many starts of a job in all before a failure ends it (default 30).
#
# Saves 10 minutes before the time limit; SLURM looks once a minute. The output goes on in one file:
#SBATCH --job-name=olmo-jax
#SBATCH --requeue
#SBATCH --signal=TERM@600
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail

# The processes end one another; srun's own limits are a backstop. A step doesn't take over the
# job's CPUs per task by itself (srun's manual, --cpus-per-task).
step=(srun --kill-on-bad-exit=0 --wait=300 --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"
  olmo-jax train)

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  if [[ ${1:-} == --dry_run ]]; then
    printf '%q ' "${step[@]}" "${@:2}" && echo
    exit
  fi
  sed -n '/^#SBATCH/q; 2,$ s/^# \{0,1\}//p' "$0"
  exit 2
fi

"${step[@]}" "$@"
status=$?

# 0: trained to the end. 2: a mistake that a start won't mend. 75: asked to stop, and saved. Others:
# a process or node was lost; as often as OLMO_JAX_MAX_RESTARTS allows.
if ((status == 75)) ||
  ((status != 0 && status != 2 && ${SLURM_RESTART_COUNT:-0} < ${OLMO_JAX_MAX_RESTARTS:-30})); then
  echo "status $status: job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
