#!/usr/bin/env bash
# Runs every test; makes .venv and installs first if that has not been done. Arguments go to pytest.
#
#     bash tests/run.sh [-k NAME ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh
python -m pytest tests "$@"
