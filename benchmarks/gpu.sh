#!/usr/bin/env bash
# Tests and measures every op on a machine with a GPU, in at most 9 minutes:
#   bash benchmarks/gpu.sh [FOLDER]           raw rows, table and logs go to FOLDER (default: benchmarks/results/gpu)
#   bash benchmarks/gpu.sh [FOLDER] --tiny    rehearses all of it without a GPU, under Triton's interpreter, at tiny sizes
# Nothing is installed: our packages are found through links in a temporary folder, and peers in wheels/ are unpacked
# into it. PYTHON chooses the interpreter; SECONDS_TESTS, SECONDS_CHECKER and SECONDS_SUITES share the time.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=${PYTHON:-python3} out=benchmarks/results/gpu tiny=
for argument in "$@"; do
    case $argument in --tiny) tiny=1 ;; -*) echo "gpu.sh: unknown option $argument; expected [FOLDER] [--tiny]" >&2; exit 2 ;; *) out=$argument ;; esac
done
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1

links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$root/steerfast" "$links/steerfast"
ln -s "$root/kernels" "$links/steerfast_kernels" # the folder must never be importable as `kernels`
for wheel in wheels/*.whl; do # peers, where somebody carried them here
    if [ -f "$wheel" ]; then "$python" -m zipfile -e "$wheel" "$links" || echo "not unpacked: $wheel"; fi
done
printf '[pytest]\nmarkers =\n%s\n' "$(sed -n '/^markers = \[/,/^\]/s/^ *"\(.*\)",$/    \1/p' pyproject.toml)" > "$links/pytest.ini"
export PYTHONPATH=$links:$root/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
unset STEERFAST_BACKEND
pytest=("$python" -m pytest -c "$links/pytest.ini" --rootdir "$root" --import-mode=importlib -p no:cacheprovider -q)
"$python" -c "import pytest, pytest_benchmark" || { echo "gpu.sh: needs pytest and pytest-benchmark; without them: $python -m steerfast bench" >&2; exit 2; }

if [ -n "$tiny" ]; then
    export TRITON_INTERPRET=1 STEERFAST_BENCH=tiny
    marker=interpreter tests=(tests/test_sae_ops.py -k decode)
else
    unset TRITON_INTERPRET STEERFAST_BENCH
    "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
        echo "gpu.sh: PyTorch sees no GPU here; --tiny rehearses the run without one" >&2
        exit 2
    }
    marker=gpu tests=(tests)
    "$python" -c 'import xdist' 2> /dev/null && tests+=(-n 8)
fi

echo "== tests on the device"
timeout -k 10 "${SECONDS_TESTS:-160}" "${pytest[@]}" --continue-on-collection-errors -m $marker "${tests[@]}" > "$out/tests.log" 2>&1
tests_status=$?
grep -E '^(FAILED|ERROR)|(passed|failed|error|skipped|no tests ran).* in ' "$out/tests.log" | tail -20
[ $tests_status = 124 ] && echo "the tests ran out of time; see tests.log for those that ran"

echo "== memory and race checker"
checker_status=0
if [ -n "$tiny" ]; then
    "$python" benchmarks/once.py > "$out/once.log" 2>&1
    checker_status=$?
    echo "every op once, without a checker: exit $checker_status; $(tail -1 "$out/once.log")"
elif command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        timeout $((${SECONDS_CHECKER:-70} / 2)) compute-sanitizer --tool $tool --error-exitcode 9 \
            "$python" benchmarks/once.py > "$out/$tool.log" 2>&1
        status=$?
        [ $status = 9 ] && checker_status=9
        echo "$tool: exit $status (0: nothing found; 9: something found; 124: out of time); $(tail -1 "$out/$tool.log")"
    done
else
    echo "not run: there is no compute-sanitizer"
fi

echo "== suites"
budget=${SECONDS_SUITES:-270}
timeout -k 30 $((budget + 20)) "${pytest[@]}" benchmarks --rows "$out" --deadline "$budget" \
    -m "not slow" --benchmark-disable-gc --benchmark-columns=median,iqr,rounds > "$out/suites.log" 2>&1
status=$?
sed -n '/^=* steerfast =*$/,/^raw rows/p' "$out/suites.log"
[ $status = 0 ] || { echo "suites: exit $status"; grep -E '^(FAILED|ERROR|INTERNALERROR)' "$out/suites.log" | head -20; }
[ $tests_status = 0 ] || echo "tests: exit $tests_status, see tests.log"
exit $((tests_status != 0 || checker_status != 0 || status != 0))
