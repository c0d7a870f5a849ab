#!/usr/bin/env bash
# SimPO of Llama-3-8B-Instruct, all parameters, bf16, rows of 4096 tokens.
#
# Hardware: 1 node of 8 GPUs with 80 GB, NVLink inside.
# Layout: tensor 2 x data 4.
# Expected memory: 44.6 GiB on the fullest GPU, without CUDA context and NCCL buffers, by
#     python tools/plan_layout.py --hf-checkpoint examples/llama3_8b/model.json --gpus 8 --seq-length 4096
# Time: not measured; job.slurm asks for 4 hours, and a run that is cut off resumes from its last checkpoint.
#
#     export MODEL=/data/Llama-3-8B-Instruct DATA=/data/pairs.jsonl OUTPUT=/data/runs/llama3_8b
#     bash examples/llama3_8b/run.sh dry-run       # on any machine: one process, no GPU
#     bash examples/llama3_8b/run.sh prepare       # then: export TRAIN_DATA=$OUTPUT/data/train
#     sbatch examples/llama3_8b/job.slurm verify   # does this layout compute what transformers computes?
#     sbatch examples/llama3_8b/job.slurm train    # the same call resumes; the aligned checkpoint is OUTPUT/aligned
#
# Without Slurm: `bash examples/llama3_8b/run.sh train` on the node. All steps: examples/cluster/run.sh.
set -euo pipefail
here=$(dirname "$0")
exec bash "$here/../cluster/run.sh" "$here/config.yaml" 1 "$@"
