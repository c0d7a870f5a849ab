#!/usr/bin/env bash
# All steps of a run on a cluster, one step a call. The run.sh of an example calls this with its config and number of nodes.
#
#     run.sh CONFIG NODES STEP [FLAG ...]
#
#   dry-run   one process, no GPU: checks flags, layout, number of processes, data, checkpoint and folders; estimates memory
#   convert   one process, no GPU: MODEL -> OUTPUT/megatron, for Megatron-LM; `train` reads MODEL itself. A second call goes
#             on, or leaves what is complete as it is; so does export
#   prepare   one process, no GPU: DATA -> OUTPUT/data/train.*, tokenized once with the lengths of CONFIG
#   verify    every node: runs one batch through this layout and through transformers, and compares them
#   train     every node: trains, evaluates, saves to OUTPUT/run, exports to OUTPUT/aligned; a second call resumes
#   export    one process, no GPU: the latest checkpoint of OUTPUT/run -> OUTPUT/aligned-STEP, while training still runs or
#             after it was stopped
#
# Environment, on a file system that all nodes see:
#   MODEL       folder of the Hugging Face checkpoint
#   DATA        preferences to train on; not needed by convert and export, nor by verify where MODEL is a config.json without
#               weights and tokenizer
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

steps="dry-run, convert, prepare, verify, train or export"
(($# >= 2)) || fail "give CONFIG, NODES and a step: $steps; the run.sh of an example gives the first two"
(($# >= 3)) || fail "give a step: $steps"
config=$1 nodes=${NODES:-$2} step=$3
shift 3
case $step in
dry-run | convert | prepare | verify | train | export) ;;
*) fail "$step is not a step; use $steps" ;;
esac
[[ -n ${MODEL:-} ]] || fail "MODEL is not set; export MODEL=FOLDER, the Hugging Face checkpoint"
[[ -n ${OUTPUT:-} ]] || fail "OUTPUT is not set; export OUTPUT=FOLDER, where this step writes"

# Whether MODEL is a config.json without weights and tokenizer. `verify` then uses random weights and token ids.
config_alone() {
    local folder=$MODEL file
    [[ -f $MODEL || -f $MODEL/config.json ]] || return 1
    [[ -d $MODEL ]] || folder=$(dirname -- "$MODEL")
    for file in "$folder"/tokenizer{.json,_config.json,.model} "$MODEL"/*.{safetensors,bin,index.json}; do
        [[ ! -e $file ]] || return 1
    done
}

case $step in
convert | export) ;;
verify) [[ -n ${DATA:-} ]] || config_alone || fail "DATA is not set; export DATA=FILE, preferences to verify with" ;;
*) [[ -n ${DATA:-} ]] || fail "DATA is not set; export DATA=FILE, the preferences to train on" ;;
esac
root=$(realpath -- "$(dirname "$0")/../..")
if [[ -n ${ENV_SCRIPT:-} ]]; then
    [[ -f $ENV_SCRIPT && -r $ENV_SCRIPT ]] || fail "ENV_SCRIPT $ENV_SCRIPT is not a file that can be read; give a shell script"
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
    # job.slurm sends USR1 before the time limit. The processes of the run save and end; torchrun must wait for them.
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

# Goes on with an interrupted conversion; where one to Megatron is complete, it says so and ends with 0.
convert() {
    local again=(--resume) word
    for word in "$@"; do
        [[ $word != --overwrite && $word != --resume ]] || again=()
    done
    python "$root/tools/$1" "${@:2}" "${again[@]}"
}

held_out=()
[[ -z ${HELD_OUT:-} ]] || held_out=(--valid-data "$HELD_OUT")
run=(--config "$config" --hf-checkpoint "$MODEL" --train-data "${TRAIN_DATA:-${DATA:-}}" "${held_out[@]}"
    --save "$OUTPUT/run" --save-interval 100 --load "$OUTPUT/run" --export-hf "$OUTPUT/aligned")

# A step of one process runs on the first node alone, also in a job of several.
[[ $node_rank == 0 || $step == verify || $step == train ]] || exit 0

case $step in
dry-run) WORLD_SIZE=$((nodes * gpus)) RANK=0 python -m simpo_megatron.train "${run[@]}" --dry-run "$@" ;;
convert) convert hf_to_megatron.py --hf-checkpoint "$MODEL" --save "$OUTPUT/megatron" "$@" ;;
prepare) python "$root/tools/preprocess_preferences.py" --config "$config" --data "$DATA" --hf-checkpoint "$MODEL" \
    --output-prefix "$OUTPUT/data/train" "$@" ;;
verify)
    data=()
    config_alone || data=(--data "$DATA")
    launch "$root/tools/verify_layout.py" --config "$config" --hf-checkpoint "$MODEL" "${data[@]}" --global-batch-size 8 "$@"
    ;;
train) launch -m simpo_megatron.train "${run[@]}" "$@" ;;
export)
    latest=$OUTPUT/run/latest_checkpointed_iteration.txt
    [[ -f $latest ]] || fail "$OUTPUT/run has no checkpoint yet; train first"
    aligned=$OUTPUT/aligned-$(<"$latest")
    # An export is complete once it has its name, and it is of this checkpoint if it is newer.
    if (($# == 0)) && [[ -f $aligned/config.json && $aligned/config.json -nt $latest ]]; then
        echo "nothing is left to do: $aligned is the model of the latest checkpoint of $OUTPUT/run"
    else
        convert megatron_to_hf.py --load "$OUTPUT/run" --hf-checkpoint "$MODEL" --save "$aligned" "$@"
    fi
    ;;
esac
