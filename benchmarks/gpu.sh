#!/usr/bin/env bash
# Tests and times every op on a machine with a GPU, in at most 9 minutes:
#   bash benchmarks/gpu.sh [FOLDER]           raw rows, table and logs go to FOLDER (default: benchmarks/results/gpu)
#   bash benchmarks/gpu.sh [FOLDER] --tiny    rehearses all of it without a GPU, under Triton's interpreter, at tiny sizes
# Nothing is installed: both packages are found through links in a temporary folder. PYTHON chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=${PYTHON:-python3} out=benchmarks/results/gpu tiny=
for argument in "$@"; do
    case $argument in --tiny) tiny=--tiny ;; *) out=$argument ;; esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1

links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$root/steerfast" "$links/steerfast"
ln -s "$root/kernels" "$links/steerfast_kernels" # the folder must never be importable as `kernels`
printf '[pytest]\nmarkers =\n%s\n' "$(sed -n '/^markers = \[/,/^\]/s/^ *"\(.*\)",$/    \1/p' pyproject.toml)" > "$links/pytest.ini"
export PYTHONPATH=$links:$root/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
unset STEERFAST_BACKEND
if [ -n "$tiny" ]; then export TRITON_INTERPRET=1; else unset TRITON_INTERPRET; fi

echo "== tests on the device"
marker=gpu tests="tests/test_ops.py tests/test_sae_ops.py" workers=
if [ -n "$tiny" ]; then marker=interpreter tests="tests/test_sae_ops.py -k decode"; fi
if [ -z "$tiny" ] && "$python" -c 'import xdist' 2> /dev/null; then workers="-n 8"; fi
# shellcheck disable=SC2086
timeout 200 "$python" -m pytest -c "$links/pytest.ini" --rootdir "$root" --import-mode=importlib -p no:cacheprovider \
    -q -m $marker $workers $tests > "$out/tests.log" 2>&1
tests_status=$?
grep -E '^(FAILED|ERROR)|(passed|failed|error|skipped|no tests ran).* in ' "$out/tests.log" | tail -20
[ $tests_status = 124 ] && echo "the tests ran out of their 200 s; see tests.log for those that ran"

echo "== memory checker"
if [ -z "$tiny" ] && command -v compute-sanitizer > /dev/null; then
    timeout 80 compute-sanitizer --error-exitcode 9 "$python" benchmarks/gpu.py "$out" --once > "$out/sanitizer.log" 2>&1
    echo "compute-sanitizer: exit $? (0: nothing found; 9: a bad access; 124: out of time); $(tail -1 "$out/sanitizer.log")"
else
    echo "not run: no compute-sanitizer, or a rehearsal"
fi

echo "== times"
timeout -k 15 265 "$python" benchmarks/gpu.py "$out" $tiny --deadline 235
status=$?
[ $tests_status = 0 ] || echo "tests: FAILED (exit $tests_status), see tests.log"
exit $((tests_status != 0 || status != 0))
