#!/usr/bin/env bash
# SimPO from nothing to an aligned Hugging Face checkpoint, on a CPU: 4 processes, tensor 2 x pipeline 2.
#
#     bash examples/quickstart.sh [--data FILE [--held-out FILE]] [--output DIR]
#
# Needs two cores, 4 GB of memory and about 3 minutes. The first call also installs packages into .venv, which takes minutes.
# Without --data it trains on made-up questions. With --data it trains on your own preferences (.jsonl, .jsonl.gz or .parquet;
# TRL's forms or UltraFeedback-binarized). DIR (default runs/quickstart) gets data/, model/ (random weights), sft_run/, sft/,
# simpo_run/, aligned/ and curves.png. At the end a table compares sft/ and aligned/ on held-out pairs: on the made-up questions
# the ranking accuracy rises from about 0.67 to about 0.91.
set -euo pipefail

fail() {
    echo "quickstart: $1" >&2
    exit 2
}

data="" held_out="" output=""
while (($#)); do
    case $1 in
    --data | --held-out | --output)
        (($# > 1)) || fail "$1 needs a value"
        name=${1#--}
        declare "${name//-/_}=$(realpath -m -- "$2")"
        shift 2
        ;;
    -h | --help)
        sed -n '2,10s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *) fail "$1 is not a flag; use --data FILE, --held-out FILE or --output DIR" ;;
    esac
done
[[ -z $data || -f $data ]] || fail "--data $data: there is no such file"
[[ -z $held_out || -f $held_out ]] || fail "--held-out $held_out: there is no such file"
[[ -z $held_out || -n $data ]] || fail "--held-out needs --data, the preferences to train on"
cd "$(dirname "$0")/.."
output=${output:-runs/quickstart}
marker=$output/.quickstart # marks a folder that the quick start has made and may replace
if [[ -e $output && ! -e $marker && -n $(ls -A "$output" 2>/dev/null || echo file) ]]; then
    fail "--output $output is not of an earlier quick start; choose another folder"
fi

. tools/venv.sh

# The 4 processes share the cores. More threads would slow down a model this small: they would mostly wait for each other.
cores=$(nproc)
export OMP_NUM_THREADS=$((cores > 4 ? cores / 4 : 1))

stage() {
    local title=$1 start=$SECONDS
    shift
    echo "== $title"
    "$@"
    echo "== done in $((SECONDS - start)) s"
}

train() {
    torchrun --standalone --nproc-per-node 4 -m simpo_megatron.train --device cpu --fp32 \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --valid-data "$output/data/heldout.jsonl" \
        --max-length "$max_length" --seq-length "$row_length" --log-interval 10 "$@"
}

if [[ -z $data ]]; then
    max_length=64 row_length=2048
    sft=(--train-iters 200 --global-batch-size 64 --lr 2e-3)
    simpo=(--train-iters 120 --global-batch-size 64 --lr 1e-4 --eval-interval 20)
else
    max_length=192 row_length=2048
    sft=(--train-epochs 3 --global-batch-size 32 --lr 2e-3)
    simpo=(--train-epochs 1 --global-batch-size 32 --lr 5e-5 --eval-interval 15)
fi
beta=10.0 # with gamma / beta 0.3: the SimPO repository's setting for Llama-3-Instruct v0.2

if [[ -e $marker ]]; then
    rm -r "$output"
fi
{ mkdir -p "$output" && touch "$marker"; } 2>/dev/null || fail "--output $output cannot be written; choose another folder"

stage "1/4 Preferences, a tokenizer and a small Llama with random weights (seconds)" \
    python examples/quickstart_data.py --output "$output" ${data:+--data "$data"} ${held_out:+--held-out "$held_out"}
stage "2/4 SFT on the demonstrations (1 to 3 minutes)" \
    train --objective sft --hf-checkpoint "$output/model" --train-data "$output/data/sft.jsonl" "${sft[@]}" \
    --save "$output/sft_run" --export-hf "$output/sft"
stage "3/4 SimPO on the preferences (2 to 5 minutes)" \
    train --objective simpo --hf-checkpoint "$output/sft" --train-data "$output/data/train.jsonl" "${simpo[@]}" \
    --simpo-beta "$beta" --simpo-gamma-beta-ratio 0.3 --save "$output/simpo_run" --export-hf "$output/aligned"
stage "4/4 Before and after, measured with transformers alone (seconds)" \
    python examples/quickstart_report.py --before "$output/sft" --after "$output/aligned" \
    --held-out "$output/data/heldout.jsonl" --metrics "$output/simpo_run/metrics.jsonl" \
    --plot "$output/curves.png" --beta "$beta" --max-length "$max_length"
echo "Aligned model: $output/aligned. All of it took $((SECONDS / 60)) min $((SECONDS % 60)) s."
