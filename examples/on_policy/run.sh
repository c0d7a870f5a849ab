#!/usr/bin/env bash
# Three rounds of on-policy SimPO on a CPU, beside one offline round on the same number of pairs.
#
#     bash examples/on_policy/run.sh [--output DIR]
#
# Needs two cores, 4 GB of memory and less than 15 minutes. The task is the quick start's: questions with right answers, and a
# small Llama that a short SFT leaves imperfect. DIR (default runs/on_policy) gets all files; started again, it goes on where
# it stopped. A rule scores the responses (rewards.py). README.md explains the table at the end.
set -euo pipefail

fail() {
    echo "on_policy: $1" >&2
    exit 2
}

output=""
while (($#)); do
    case $1 in
    --output)
        [[ -n ${2-} ]] || fail "--output needs a value"
        output=$(realpath -m -- "$2")
        shift 2
        ;;
    -h | --help)
        sed -n '2,8s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *) fail "$1 is not a flag; use --output DIR" ;;
    esac
done
cd "$(dirname "$0")/../.."
output=${output:-$PWD/runs/on_policy}
export ON_POLICY_OUTPUT=$output PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [[ -e $output && ! -e $output/.on_policy && -n $(ls -A "$output" 2>/dev/null || echo file) ]]; then
    fail "--output $output is not of an earlier run of this example; choose another folder"
fi
{ mkdir -p "$output" && touch "$output/.on_policy"; } 2>/dev/null || fail "--output $output cannot be written; choose another folder"

. tools/venv.sh

train() {
    torchrun --standalone --nproc-per-node 1 -m simpo_megatron.train --device cpu --fp32 --max-length 64 --seq-length 2048 "$@"
}

if [[ ! -e $output/.data ]]; then
    python examples/quickstart_data.py --output "$output"
    touch "$output/.data"
fi
if [[ ! -e $output/sft ]]; then
    echo "== SFT"
    train --objective sft --hf-checkpoint "$output/model" --train-data "$output/data/sft.jsonl" --train-iters 150 \
        --global-batch-size 64 --lr 2e-3 --save "$output/sft_run" --load "$output/sft_run" --export-hf "$output/sft"
fi

echo "== On-policy: three rounds"
python tools/iterate.py --config examples/on_policy/loop.yaml

echo "== Offline: one round on as many pairs of the file"
pairs=$(cat "$output"/loop/round_*/pairs.jsonl | wc -l)
head -n "$pairs" "$output/data/train.jsonl" >"$output/offline.jsonl"
if [[ ! -e $output/offline_model ]]; then
    train --hf-checkpoint "$output/sft" --train-data "$output/offline.jsonl" --train-epochs 2 --global-batch-size 32 --lr 1e-4 \
        --simpo-beta 10 --simpo-gamma-beta-ratio 0.3 --save "$output/offline_run" --load "$output/offline_run" \
        --export-hf "$output/offline_model"
fi
python tools/generate_responses.py --prompts "$output/data/heldout.jsonl" --hf-checkpoint "$output/offline_model" \
    --output "$output/offline_responses.jsonl" --num-responses 1 --temperature 0 --max-new-tokens 32
python tools/score_responses.py --responses "$output/offline_responses.jsonl" --scorer examples.on_policy.rewards:score \
    --output "$output/offline_scored.jsonl"
python examples/on_policy/report.py --rounds "$output/loop/rounds.csv" --offline "$output/offline_scored.jsonl" \
    --pairs "$pairs" --plot "$output/rounds.png"
