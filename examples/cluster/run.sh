#!/usr/bin/env bash
# All steps of a run on a cluster, one step a call. The run.sh of an example calls this with its config and number of nodes.
#
#     run.sh CONFIG NODES STEP [FLAG ...]
#
#   dry-run   one process, no GPU: checks flags, layout, number of processes, data, checkpoint and folders; estimates memory
#   convert   one process, no GPU: MODEL -> OUTPUT/megatron, for Megatron-LM; `train` reads MODEL itself
#   prepare   one process, no GPU: DATA -> OUTPUT/data/train.*, tokenized once with the lengths of CONFIG
#   verify    every node: runs one batch through this layout and through transformers, and compares them
#   train     every node: trains, evaluates, saves to OUTPUT/run, exports to OUTPUT/aligned; a second call resumes
#   export    one process, no GPU: the latest checkpoint of OUTPUT/run -> OUTPUT/aligned-STEP, while training still runs or
#             after it was stopped
#
# Environment, on a file system that all nodes see:
#   MODEL       folder of the Hugging Face checkpoint
#   DATA        preferences to train on; not needed by convert and export
#   OUTPUT      folder to write to; `train` saves a checkpoint of about 14 bytes a parameter every 100 steps and at the end,
#               and deletes none
#   HELD_OUT    optional: preferences to evaluate on
#   TRAIN_DATA  optional: train on this instead of DATA; the prefix that `prepare` wrote, OUTPUT/data/train
#   ENV_SCRIPT  optional: a shell script that is sourced first, on every node and inside a container: modules, environment, NCCL
# and GPUS_PER_NODE (default 8; in a job those of --gpus-per-node) and NODES (default: the example's). FLAGs go to the program of the
# step and win over CONFIG.
set -euo pipefail

fail() {
    echo "run.sh: $1" >&2
    exit 2
}

(($# >= 3)) || fail "give CONFIG, NODES and a step: dry-run, convert, prepare, verify, train or export"
config=$1 nodes=${NODES:-$2} step=$3
shift 3
for name in MODEL OUTPUT; do
    [[ -n ${!name:-} ]] || fail "$name is not set; the head of $0 says what it is"
done
[[ -n ${DATA:-} || $step == convert || $step == export ]] || fail "DATA is not set: the preferences to train on"
root=$(realpath -- "$(dirname "$0")/../..")
if [[ -n ${ENV_SCRIPT:-} ]]; then
    set +u # scripts of conda and of modules read variables that are not set
    # shellcheck source=/dev/null
    . "$ENV_SCRIPT" || fail "ENV_SCRIPT $ENV_SCRIPT failed"
    set -u
fi
command -v torchrun >/dev/null || fail "torchrun is not on PATH; activate the environment, or do that in a script and set ENV_SCRIPT"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 # this package from any folder, installed or not

# Slurm's job.slurm sets MASTER_ADDR and MASTER_PORT, srun the node's rank. Without Slurm set the three on each node.
gpus=${GPUS_PER_NODE:-8}
[[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^[1-9][0-9]*$ ]] || fail "NODES is $nodes and GPUS_PER_NODE $gpus; both must be numbers above 0"
node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
port=${MASTER_PORT:-29500}
if ! [[ $node_rank =~ ^(0|[1-9][0-9]*)$ ]] || ((node_rank >= nodes)); then
    fail "NODE_RANK is $node_rank; it must be a number from 0 to $((nodes - 1))"
fi
if ! [[ $port =~ ^[1-9][0-9]*$ ]] || ((port > 65535)); then
    fail "MASTER_PORT is $port; it must be a number from 1 to 65535"
fi

# --node-rank is given, so that ranks are counted node by node and each tensor-parallel group lies within a node.
launch() {
    [[ ${SLURM_JOB_NUM_NODES:-$nodes} == "$nodes" ]] ||
        fail "the job has $SLURM_JOB_NUM_NODES nodes, but the run needs $nodes; give sbatch --nodes=$nodes, or set NODES"
    [[ -n ${MASTER_ADDR:-} || $nodes == 1 ]] || fail "MASTER_ADDR is not set: the host name of the node with rank 0"
    # job.slurm sends USR1 before the time limit. It must not end torchrun, or a process that does not handle it.
    trap '' USR1
    # Before Blackwell, tensor parallelism overlaps communication with GEMMs only if kernels start in launch order: one queue.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # NVLink SHARP reserves GPU memory for every communicator, and a run has about twelve.
    export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
    # Warnings report a link that fails; more detail would hide them.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Set NCCL_SOCKET_IFNAME (and NCCL_IB_HCA) where nodes have several networks: NCCL may choose the slow one.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
    torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --node-rank "$node_rank" \
        --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$port" "$@"
}

held_out=()
[[ -z ${HELD_OUT:-} ]] || held_out=(--valid-data "$HELD_OUT")
run=(--config "$config" --hf-checkpoint "$MODEL" --train-data "${TRAIN_DATA:-${DATA:-}}" "${held_out[@]}"
    --save "$OUTPUT/run" --save-interval 100 --load "$OUTPUT/run" --export-hf "$OUTPUT/aligned")

# A step of one process runs on the first node alone, also in a job of several.
[[ $node_rank == 0 || $step == verify || $step == train ]] || exit 0

case $step in
dry-run) WORLD_SIZE=$((nodes * gpus)) RANK=0 python -m simpo_megatron.train "${run[@]}" --dry-run "$@" ;;
convert) python "$root/tools/hf_to_megatron.py" --hf-checkpoint "$MODEL" --save "$OUTPUT/megatron" "$@" ;;
prepare) python "$root/tools/preprocess_preferences.py" --config "$config" --data "$DATA" --hf-checkpoint "$MODEL" \
    --output-prefix "$OUTPUT/data/train" "$@" ;;
verify) launch "$root/tools/verify_layout.py" --config "$config" --hf-checkpoint "$MODEL" --data "$DATA" --global-batch-size 8 "$@" ;;
train) launch -m simpo_megatron.train "${run[@]}" "$@" ;;
export)
    saved=$(cat "$OUTPUT/run/latest_checkpointed_iteration.txt") || fail "$OUTPUT/run has no checkpoint yet; train first"
    python "$root/tools/megatron_to_hf.py" --load "$OUTPUT/run" --hf-checkpoint "$MODEL" --save "$OUTPUT/aligned-$saved" "$@"
    ;;
*) fail "$step is not a step; use dry-run, convert, prepare, verify, train or export" ;;
esac
