#!/bin/sh
# What a GPU alone can tell, in eight minutes at most: tests of captured graphs, then the quick suite,
# compiled derivatives first. Run it again after a stop: it goes on with what is left.
#     LIMIT=480 PYTHON=.venv/bin/python sh benchmarks/cuda.sh
# Commit benchmarks/results/quick-cuda.json afterwards, and run `make report`.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
end=$(($(date +%s) + ${LIMIT:-480}))
tested=benchmarks/results/quick-cuda.tested

# a part gets so many seconds at most, and never more than are left
part() {
    most=$1
    shift
    left=$((end - $(date +%s)))
    [ "$left" -lt "$most" ] && most=$left
    [ "$most" -gt 15 ] && timeout --signal=INT "$most" "$@"
}

"$python" -c "import torch; torch.zeros(1, device='cuda')" || exit 2
if [ ! -e "$tested" ]; then
    part 150 env JACFUNC_TEST_DEVICE=cuda "$python" -m pytest -q -m cuda tests/compiled && : >"$tested"
fi
part 150 "$python" -m benchmarks run --suite quick --device cuda --resume --only compiled
part 480 "$python" -m benchmarks run --suite quick --device cuda --resume && rm -f "$tested"
