#!/usr/bin/env bash
# Runs every test; makes .venv and installs first if that has not been done. Other arguments go to pytest.
#
#     bash tests/run.sh [--quick] [-k NAME ...]
#
# --quick runs a representative part in under 3 minutes: the tests that quick.txt lists.
# MEGATRON_CORE_PATH: a checkout of Megatron-LM; its Megatron-Core is tested in place of the installed one. MEGATRON_LM_PATH: one
# of core_v0.16.1, for the tests that train with Megatron-LM itself.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh with-te
[[ -z ${MEGATRON_CORE_PATH:-} ]] || export PYTHONPATH=$MEGATRON_CORE_PATH${PYTHONPATH:+:$PYTHONPATH}
tests=tests
if [[ ${1:-} == --quick ]]; then
    tests=@tests/quick.txt
    shift
fi
python -m pytest "$tests" "$@"
