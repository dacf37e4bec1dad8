#!/usr/bin/env bash
# sbatch --nodes 2 examples/slurm.sh my_arguments.yaml [--further arguments]
#
# Starts one launcher on each node and one process for each of its GPUs. A job that is requeued goes on from its newest
# complete checkpoint, bit for bit.
#SBATCH --job-name=hf_saq
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
GPUS="${SLURM_GPUS_ON_NODE:-8}"
NODES="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
# Cut here, not by `head`: it may close the pipe before scontrol has written, which `pipefail` takes for a failure.
FIRST="${NODES%%$'\n'*}"
# Each node fills in its own rank, which only `srun` knows.
srun bash -c 'accelerate launch --multi_gpu --mixed_precision bf16 \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * '"$GPUS"'))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip '"$FIRST"' --main_process_port 29500 --rdzv_backend static \
    examples/run_image_classification.py "$@" --resume_from_checkpoint true' run "$@"
