# shellcheck shell=bash
# Makes .venv in the repository root, installs this package and its development tools, and activates it.
#
#     . tools/venv.sh            # from the repository root, in bash
#     . tools/venv.sh with-te    # also what the tests read from beside it: Transformer Engine's wheels (tests/te_on_cpu) in .venv/te,
#                                # and AlpacaEval's in .venv/alpaca_eval, whose loader reads our files (tests/on_policy)
#
# Exact versions come from constraints.txt. Installs again when they, or setup.py, have changed.

simpo_python() {
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

simpo_venv() {
    local wanted
    wanted=$(cat setup.py constraints.txt | cksum)
    if [[ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]]; then
        if ! simpo_python; then
            echo "tools/venv.sh: python3 is missing or older than 3.11; put a newer one first in PATH" >&2
            return 2
        fi
        echo "Installing into .venv (minutes the first time)"
        python3 -m venv .venv
        .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
        echo "$wanted" >.venv/installed # last: an interrupted install starts over
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
}

# Transformer Engine stands beside the environment: in it, the wheel without its compiled part breaks Megatron-Core.
simpo_te() {
    local release
    while read -r release; do
        [[ -n $release && $release != \#* && ! -f .venv/te/$release/installed ]] || continue
        echo "Installing Transformer Engine $release into .venv/te"
        rm -rf ".venv/te/$release"
        # Its own needs that the environment lacks lie with it.
        .venv/bin/python -m pip install --quiet --no-deps --target ".venv/te/$release" -c constraints.txt \
            "transformer_engine==$release" einops ml_dtypes onnx onnx_ir onnxscript
        touch ".venv/te/$release/installed"
    done <tests/te_on_cpu/releases.txt
}

# AlpacaEval's loader needs few of the packages that the wheel asks for.
simpo_alpaca_eval() {
    [[ ! -f .venv/alpaca_eval/installed ]] || return 0
    rm -rf .venv/alpaca_eval
    .venv/bin/python -m pip install --quiet --no-deps --target .venv/alpaca_eval -c constraints.txt alpaca_eval
    touch .venv/alpaca_eval/installed
}

simpo_venv
if [[ ${1:-} == with-te ]]; then
    simpo_te
    simpo_alpaca_eval
fi
