#!/usr/bin/env bash
# SimPO of Qwen3-30B-A3B, all parameters, bf16, rows of 4096 tokens.
#
# Hardware: 2 nodes of 8 GPUs with 80 GB, NVLink inside and InfiniBand between them.
# Layout: tensor 2 x data 8, experts over 8 GPUs, each expert whole.
# Expected memory: 58.6 GiB on the fullest GPU, without CUDA context and NCCL buffers, by
#     python tools/plan_layout.py --hf-checkpoint examples/qwen3_moe/model.json --gpus 16 --seq-length 4096
# The estimate assumes that the router spreads tokens evenly over the experts. It does not quite, so keep a few GiB free.
# Time: not measured; job.slurm asks for 12 hours, and a run that is cut off resumes from its last checkpoint.
#
#     export MODEL=/data/Qwen3-30B-A3B DATA=/data/pairs.jsonl OUTPUT=/data/runs/qwen3_moe
#     bash examples/qwen3_moe/run.sh dry-run       # on any machine: one process, no GPU
#     bash examples/qwen3_moe/run.sh prepare       # then: export TRAIN_DATA=$OUTPUT/data/train
#     sbatch examples/qwen3_moe/job.slurm verify --fp32 --transformer-impl local   # does this layout compute what transformers computes?
#     sbatch examples/qwen3_moe/job.slurm train    # the same call resumes; the aligned checkpoint is OUTPUT/aligned
#
# Verification runs in fp32, because in bf16 a near-tie between experts can fall either way. It runs on Megatron's own layers,
# because Transformer Engine may have no fp32 attention for packed rows.
# Without Slurm: `bash examples/qwen3_moe/run.sh train` on every node, with NODE_RANK and MASTER_ADDR set.
# All steps: examples/cluster/run.sh.
set -euo pipefail
here=$(dirname "$0")
exec bash "$here/../cluster/run.sh" "$here/config.yaml" 2 "$@"
