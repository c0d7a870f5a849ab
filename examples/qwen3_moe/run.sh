#!/usr/bin/env bash
# SimPO of Qwen3-30B-A3B, all parameters, bf16, rows of 4096 tokens.
#
# Hardware: 2 nodes of 8 GPUs with 80 GB, NVLink inside and InfiniBand between them. Not run on a GPU yet.
# Layout: tensor 2 x data 8, experts over 8 GPUs, each expert whole.
# Expected memory: 58.6 GiB on the fullest GPU, without CUDA context and NCCL buffers, by
#     python tools/plan_layout.py --hf-checkpoint examples/qwen3_moe/model.json --gpus 16 --seq-length 4096
# The estimate assumes that the router spreads tokens evenly over the experts. It does not quite, so keep a few GiB free.
# Checkpoint: 398.1 GiB each (14 bytes a parameter), every 100 steps and at the end; none is deleted. 60,000 pairs make 5.
# Time: not measured.
#
#     export MODEL=/data/Qwen3-30B-A3B DATA=/data/pairs.jsonl OUTPUT=/data/runs/qwen3_moe
#     bash examples/qwen3_moe/run.sh dry-run       # on any machine: one process, no GPU
#     bash examples/qwen3_moe/run.sh prepare       # then: export TRAIN_DATA=$OUTPUT/data/train
#     # does this layout compute what transformers computes?
#     sbatch --nodes=2 examples/cluster/job.slurm examples/qwen3_moe/run.sh verify --fp32 --transformer-impl local
#     # the same call resumes; the aligned checkpoint is OUTPUT/aligned
#     sbatch --nodes=2 examples/cluster/job.slurm examples/qwen3_moe/run.sh train
#     bash examples/qwen3_moe/run.sh export        # a run that was stopped: its latest checkpoint as a model, OUTPUT/aligned-STEP
#
# Verification runs in fp32, because in bf16 a near-tie between experts can fall either way. It runs on Megatron's own layers,
# because Transformer Engine may have no fp32 attention for packed rows.
# Without Slurm: `bash examples/qwen3_moe/run.sh train` on every node, with NODE_RANK and MASTER_ADDR set.
# Environment, containers, chains of jobs: examples/cluster/README.md. All steps: examples/cluster/run.sh.
set -euo pipefail
here=$(dirname "$0")
exec bash "$here/../cluster/run.sh" "$here/config.yaml" 2 "$@"
