#!/usr/bin/env bash
# SimPO of Llama-3-8B-Instruct, all parameters, bf16, rows of 4096 tokens.
#
# Hardware: 1 node of 8 GPUs with 80 GB, NVLink inside. Not run on a GPU yet.
# Layout: tensor 2 x data 4.
# Expected memory: 44.6 GiB on the fullest GPU, without CUDA context and NCCL buffers, by
#     python tools/plan_layout.py --hf-checkpoint examples/llama3_8b/model.json --gpus 8 --seq-length 4096
# Checkpoint: 104.7 GiB each (14 bytes a parameter), every 100 steps and at the end; none is deleted. 60,000 pairs make 5.
# Time: not measured.
#
#     export MODEL=/data/Llama-3-8B-Instruct DATA=/data/pairs.jsonl OUTPUT=/data/runs/llama3_8b
#     bash examples/llama3_8b/run.sh dry-run       # on any machine: one process, no GPU
#     bash examples/llama3_8b/run.sh prepare       # then: export TRAIN_DATA=$OUTPUT/data/train
#     # does this layout compute what transformers computes?
#     sbatch --nodes=1 examples/cluster/job.slurm examples/llama3_8b/run.sh verify
#     # the same call resumes; the aligned checkpoint is OUTPUT/aligned
#     sbatch --nodes=1 examples/cluster/job.slurm examples/llama3_8b/run.sh train
#     bash examples/llama3_8b/run.sh export        # a run that was stopped: its latest checkpoint as a model, OUTPUT/aligned-STEP
#
# Without Slurm: `bash examples/llama3_8b/run.sh train` on the node.
# Environment, containers, chains of jobs: examples/cluster/README.md. All steps: examples/cluster/run.sh.
set -euo pipefail
here=$(dirname "$0")
exec bash "$here/../cluster/run.sh" "$here/config.yaml" 1 "$@"
