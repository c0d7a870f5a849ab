#!/usr/bin/env bash
# SimPO of Mixtral-8x7B-Instruct, all parameters, bf16, rows of 4096 tokens.
#
# Hardware: 4 nodes of 8 GPUs with 80 GB, NVLink inside and InfiniBand between them.
# Layout: tensor 4 x data 8, experts over 8 GPUs, each expert whole.
# Expected memory: 58.6 GiB on the fullest GPU, without CUDA context and NCCL buffers, by
#     python tools/plan_layout.py --hf-checkpoint examples/mixtral_8x7b/model.json --gpus 32 --seq-length 4096
# The estimate assumes that the router spreads tokens evenly over the experts. It does not quite, so keep a few GiB free.
# Time: not measured; job.slurm asks for 12 hours, and a run that is cut off resumes from its last checkpoint.
#
#     export MODEL=/data/Mixtral-8x7B-Instruct DATA=/data/pairs.jsonl OUTPUT=/data/runs/mixtral_8x7b
#     bash examples/mixtral_8x7b/run.sh dry-run       # on any machine: one process, no GPU
#     bash examples/mixtral_8x7b/run.sh prepare       # then: export TRAIN_DATA=$OUTPUT/data/train
#     sbatch examples/mixtral_8x7b/job.slurm verify --fp32 --transformer-impl local   # does this layout compute what transformers computes?
#     sbatch examples/mixtral_8x7b/job.slurm train    # the same call resumes; the aligned checkpoint is OUTPUT/aligned
#
# Verification runs in fp32, because in bf16 a near-tie between experts can fall either way. It runs on Megatron's own layers,
# because Transformer Engine may have no fp32 attention for packed rows.
# Without Slurm: `bash examples/mixtral_8x7b/run.sh train` on every node, with NODE_RANK and MASTER_ADDR set.
# All steps: examples/cluster/run.sh.
set -euo pipefail
here=$(dirname "$0")
exec bash "$here/../cluster/run.sh" "$here/config.yaml" 4 "$@"
