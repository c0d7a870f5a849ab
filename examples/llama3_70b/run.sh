#!/usr/bin/env bash
# SimPO of Llama-3-70B-Instruct, all parameters, bf16, rows of 4096 tokens.
#
# Hardware: 8 nodes of 8 GPUs with 80 GB, NVLink inside and InfiniBand between them. Not run on a GPU yet.
# Layout: tensor 8 x pipeline 2 (4 virtual stages each) x data 4.
# Expected memory: 50.4 GiB on the fullest GPU, without CUDA context and NCCL buffers, by
#     python tools/plan_layout.py --hf-checkpoint examples/llama3_70b/model.json --gpus 64 --seq-length 4096
# Checkpoint: 919.9 GiB each (14 bytes a parameter), every 100 steps and at the end; none is deleted. 60,000 pairs make 5.
# Time: not measured.
#
#     export MODEL=/data/Llama-3-70B-Instruct DATA=/data/pairs.jsonl OUTPUT=/data/runs/llama3_70b
#     bash examples/llama3_70b/run.sh dry-run       # on any machine: one process, no GPU
#     bash examples/llama3_70b/run.sh prepare       # then: export TRAIN_DATA=$OUTPUT/data/train
#     # does this layout compute what transformers computes?
#     sbatch --nodes=8 examples/cluster/job.slurm examples/llama3_70b/run.sh verify
#     # the same call resumes; the aligned checkpoint is OUTPUT/aligned
#     sbatch --nodes=8 examples/cluster/job.slurm examples/llama3_70b/run.sh train
#     bash examples/llama3_70b/run.sh export        # a run that was stopped: its latest checkpoint as a model, OUTPUT/aligned-STEP
#
# Without Slurm: `bash examples/llama3_70b/run.sh train` on every node, with NODE_RANK and MASTER_ADDR set.
# Environment, containers, chains of jobs: examples/cluster/README.md. All steps: examples/cluster/run.sh.
set -euo pipefail
here=$(dirname "$0")
exec bash "$here/../cluster/run.sh" "$here/config.yaml" 8 "$@"
