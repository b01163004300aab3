#!/bin/bash
# Submit with: sbatch book/cluster/slurm.sh train.py
# One task per machine; accelerate starts a process for each of its GPUs.
#SBATCH --job-name=finetune
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log

set -euo pipefail

script=${1:?give the training script}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))  # no two jobs of a machine share it

# $SLURM_NODEID differs between the tasks, so each task's own shell reads it.
export script first port
srun bash -c 'accelerate launch \
  --config_file book/cluster/fsdp.yaml \
  --num_machines "$SLURM_NNODES" \
  --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
  --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$first" \
  --main_process_port "$port" \
  "$script"'
