#!/usr/bin/env bash
# Every objective from one SFT model, with the same data, steps and seeds, on CPU cores.
#
#     bash examples/study/run.sh [--quick] [--data FILE [--held-out FILE]] [--output DIR]
#
# --help lists all flags; README.md has the results. A second call goes on where the first one stopped. The first call
# also installs packages into .venv, which takes minutes.
set -euo pipefail

called_in=$PWD
cd "$(dirname "$0")/../.."
. tools/venv.sh
export PYTHONPATH=$PWD OMP_NUM_THREADS=1 # the runs share the cores: one run a core
cd "$called_in"
exec python -m examples.study "$@"
