#!/usr/bin/env bash
# SimPO of Llama-3-70B-Instruct, all parameters, bf16, rows of 4096 tokens.
#
# Hardware: 8 nodes of 8 GPUs with 80 GB, NVLink inside and InfiniBand between them.
# Layout: tensor 8 x pipeline 2 (4 virtual stages each) x data 4.
# Expected memory: 50.4 GiB on the fullest GPU, without CUDA context and NCCL buffers, by
#     python tools/plan_layout.py --hf-checkpoint examples/llama3_70b/model.json --gpus 64 --seq-length 4096
# Time: not measured; job.slurm asks for 24 hours, and a run that is cut off resumes from its last checkpoint.
#
#     export MODEL=/data/Llama-3-70B-Instruct DATA=/data/pairs.jsonl OUTPUT=/data/runs/llama3_70b
#     bash examples/llama3_70b/run.sh dry-run       # on any machine: one process, no GPU
#     bash examples/llama3_70b/run.sh prepare       # then: export TRAIN_DATA=$OUTPUT/data/train
#     sbatch examples/llama3_70b/job.slurm verify   # does this layout compute what transformers computes?
#     sbatch examples/llama3_70b/job.slurm train    # the same call resumes; the aligned checkpoint is OUTPUT/aligned
#
# Without Slurm: `bash examples/llama3_70b/run.sh train` on every node, with NODE_RANK and MASTER_ADDR set.
# All steps: examples/cluster/run.sh.
set -euo pipefail
here=$(dirname "$0")
exec bash "$here/../cluster/run.sh" "$here/config.yaml" 8 "$@"
