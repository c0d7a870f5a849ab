#!/usr/bin/env bash
# The whole way of a run on a cluster, one step a call; the run.sh of an example calls it with its config and its nodes.
#
#     run.sh CONFIG NODES STEP [FLAG ...]
#
#   dry-run   one process, no GPU: flags, layout, number of processes, data, checkpoint, folders, expected memory
#   convert   one process: MODEL -> OUTPUT/megatron, for Megatron-LM; training reads MODEL itself and needs no conversion
#   prepare   one process: DATA -> OUTPUT/data/train.*, tokenized once with the lengths of CONFIG
#   verify    every node: one batch through this layout and through transformers
#   train     every node: trains, evaluates, saves to OUTPUT/run, exports to OUTPUT/aligned; a second call resumes
#   export    one process: the latest checkpoint of OUTPUT/run -> OUTPUT/aligned-STEP, before training ends
#
# Environment: MODEL, DATA and OUTPUT, on a file system that all nodes see; HELD_OUT (optional), TRAIN_DATA (what to train on,
# where it is not DATA: the prefix that `prepare` wrote). FLAGs go to the program of the step and win over CONFIG.
set -euo pipefail

fail() {
    echo "run.sh: $1" >&2
    exit 2
}

(($# >= 3)) || fail "give CONFIG, NODES and a step: dry-run, convert, prepare, verify, train or export"
config=$1 nodes=$2 step=$3
shift 3
for name in MODEL OUTPUT; do
    [[ -n ${!name:-} ]] || fail "$name is not set; the head of $0 says what it is"
done
[[ -n ${DATA:-} || $step == convert || $step == export ]] || fail "DATA is not set: the preferences to train on"
root=$(realpath -- "$(dirname "$0")/../..")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 # this package from any folder, installed or not

# Slurm's names where there is Slurm; else one node, or NODE_RANK, MASTER_ADDR and MASTER_PORT by hand on each.
gpus=${GPUS_PER_NODE:-8}
[[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^[1-9][0-9]*$ ]] || fail "NODES is $nodes and GPUS_PER_NODE $gpus; both must be numbers above 0"
node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
if [[ -z ${MASTER_ADDR:-} && -n ${SLURM_JOB_NODELIST:-} && $nodes != 1 ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # reads all: scontrol would die of a closed pipe
fi

# Ranks are counted node by node, so tensor-parallel groups lie within a node: --node-rank is given, not drawn.
launch() {
    [[ -n ${MASTER_ADDR:-} || $nodes == 1 ]] || fail "MASTER_ADDR is not set: the host name of the node with rank 0"
    # Tensor parallelism overlaps communication with GEMMs by the order of launches, which one queue keeps (before Blackwell).
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # Rows of changing lengths would leave the allocator with holes.
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    # NVLink SHARP reserves GPU memory for every communicator, and a run has a dozen.
    export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
    # A link that fails says so in the log; more than warnings would drown it.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # Set NCCL_SOCKET_IFNAME (and NCCL_IB_HCA) where nodes have several networks: NCCL's guess may be the slow one.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
    torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --node-rank "$node_rank" \
        --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" "$@"
}

held_out=()
[[ -z ${HELD_OUT:-} ]] || held_out=(--valid-data "$HELD_OUT")
run=(--config "$config" --hf-checkpoint "$MODEL" --train-data "${TRAIN_DATA:-${DATA:-}}" "${held_out[@]}"
    --save "$OUTPUT/run" --save-interval 100 --load "$OUTPUT/run" --export-hf "$OUTPUT/aligned")

case $step in
dry-run) WORLD_SIZE=$((nodes * gpus)) RANK=0 python -m simpo_megatron.train "${run[@]}" --dry-run "$@" ;;
convert) python "$root/tools/hf_to_megatron.py" --hf-checkpoint "$MODEL" --save "$OUTPUT/megatron" "$@" ;;
prepare) python "$root/tools/preprocess_preferences.py" --config "$config" --input "$DATA" --hf-checkpoint "$MODEL" \
    --output-prefix "$OUTPUT/data/train" "$@" ;;
verify) launch "$root/tools/verify_layout.py" --config "$config" --hf-checkpoint "$MODEL" --data "$DATA" --global-batch-size 8 "$@" ;;
train) launch -m simpo_megatron.train "${run[@]}" "$@" ;;
export)
    saved=$(cat "$OUTPUT/run/latest_checkpointed_iteration.txt") || fail "$OUTPUT/run has no checkpoint yet; train first"
    python "$root/tools/megatron_to_hf.py" --load "$OUTPUT/run" --hf-reference "$MODEL" --save "$OUTPUT/aligned-$saved" "$@"
    ;;
*) fail "$step is not a step; use dry-run, convert, prepare, verify, train or export" ;;
esac
