#!/usr/bin/env bash
# Measures and tests every op on a machine with a GPU that is lent for some minutes; each stage is useful if the next is cut.
#   bash benchmarks/gpu.sh [FOLDER] [--call N] [--only STAGE] [--tiny]
# FOLDER gets raw rows and logs (default: benchmarks/results/gpu). --call N runs the stages of one call of at most ten minutes,
# --only STAGE one stage, as often as it is given; without either all but the engines run. --tiny rehearses without a GPU, under
# Triton's interpreter at tiny sizes. Of fifteen minutes the first two calls take about twelve; the engines want a day of their
# own. A warm machine keeps what the first call compiled.
# Nothing is installed: our packages are found through links in a temporary folder, and peers in wheels/ are unpacked into it.
# PYTHON chooses the interpreter; SECONDS_HEADLINE=60 and the like give a stage another limit; STEERFAST_COMMIT names the commit in the
# rows where the folder came without its repository.
set -uo pipefail
cd "$(dirname "$0")/.."

# stage, call, seconds at most
stages="
precompile  1   75
headline    1  180
memcheck    1   75
racecheck   1   75
tests       2  100
suites      2  130
compiled    2   70
engines     3  300
"

usage() { echo "gpu.sh: $1; expected [FOLDER] [--call N] [--only STAGE] [--tiny], a stage being one of" $(awk '{print $1}' <<< "$stages") >&2; exit 2; }
root=$PWD python=${PYTHON:-python3} out=benchmarks/results/gpu tiny= wanted=
while [ $# -gt 0 ]; do
    case $1 in
        --tiny) tiny=1 ;;
        --only) grep -q "^${2:-none} " <<< "$stages" || usage "no stage ${2:-given} after --only"; wanted+=" $2"; shift ;;
        --call) found=$(awk -v call="${2:-}" '$2 == call {print $1}' <<< "$stages"); [ -n "$found" ] || usage "no call ${2:-given} after --call"
                wanted+=" $found"; shift ;;
        -*) usage "unknown option $1" ;;
        *) out=$1 ;;
    esac
    shift
done
: "${wanted:=$(awk '$2 && $1 != "engines" {print $1}' <<< "$stages")}"
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1

links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$root/steerfast" "$links/steerfast"
ln -s "$root/kernels" "$links/steerfast_kernels" # the folder must never be importable as `kernels`
for wheel in wheels/*.whl; do # peers, where somebody carried them here
    if [ -f "$wheel" ]; then "$python" -m zipfile -e "$wheel" "$links" || echo "not unpacked: $wheel"; fi
done
printf '[pytest]\nmarkers =\n%s\n' "$(sed -n '/^markers = \[/,/^\]/s/^ *"\(.*\)",$/    \1/p' pyproject.toml)" > "$links/pytest.ini"
export PYTHONPATH=$links:$root/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONUTF8=1 TRITON_DEFAULT_FP_FUSION=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$root/.cache/gpu}
unset STEERFAST_BACKEND
pytest=("$python" -m pytest -c "$links/pytest.ini" --rootdir "$root" --import-mode=importlib -p no:cacheprovider -q)

if [ -n "$tiny" ]; then
    export TRITON_INTERPRET=1 STEERFAST_BENCH=tiny
    ahead=(add "once d=40 0" --capability 90 --processes 2) marker=interpreter tests=(tests/test_sae_ops.py -k decode)
else
    unset TRITON_INTERPRET STEERFAST_BENCH
    "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
        echo "gpu.sh: PyTorch sees no GPU here; --tiny rehearses the run without one" >&2
        exit 2
    }
    ahead=() marker=gpu tests=($(grep -lE 'mark\.gpu|^from places' tests/test_*.py)) # collecting the others takes a minute
    "$python" -c 'import xdist' 2> /dev/null && tests+=(-n 8)
fi

# A stage gets its limit in seconds, writes a log beside the rows and says in few lines what came of it.

precompile() { # the interpreter compiles nothing, so this stage runs without it
    timeout -k 10 "$1" env -u TRITON_INTERPRET "$python" benchmarks/precompile.py "${ahead[@]}" > "$out/precompile.log" 2>&1
    local status=$?
    grep -E '(Error|Exception|exit):? ' "$out/precompile.log" | head -10
    grep ' launches in ' "$out/precompile.log"
    return $status
}

headline() {
    timeout -k 10 "$1" "$python" benchmarks/headline.py --out "$out" --seconds $(($1 - 15)) 2>&1 | tee "$out/headline.log"
    local status=${PIPESTATUS[0]}
    "$python" benchmarks/bars.py "$out" --measured # said, not judged: a missed number is no failure of the run
    return "$status"
}

checker() { # our own kernels alone: what PyTorch launches is not ours to check, and takes most of the time
    local tool=$1 log=$out/$1.log names=() name
    if [ -n "$tiny" ]; then
        timeout -k 10 "$2" "$python" benchmarks/once.py > "$log" 2>&1
    elif command -v compute-sanitizer > /dev/null; then
        for name in $(grep -ho '^def _[a-z0-9_]*_kernel\b' kernels/*.py | sed 's/^def //'); do names+=(--kernel-name "kns=$name"); done
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 "$2" compute-sanitizer --tool "$tool" "${names[@]}" --error-exitcode 9 \
            "$python" benchmarks/once.py > "$log" 2>&1
    else
        echo "not run: there is no compute-sanitizer"
        return 0
    fi
    local status=$?
    grep -E 'RED|failed: |SUMMARY' "$log" | head -10
    echo "$(grep -c 'of what is allowed' "$log") ops ran; 9: the checker found something; 124: out of time"
    return $status
}
memcheck() { checker memcheck "$1"; }
racecheck() { checker racecheck "$1"; }

tests() {
    timeout -k 10 "$1" "${pytest[@]}" --continue-on-collection-errors -m $marker "${tests[@]}" > "$out/tests.log" 2>&1
    local status=$?
    grep -E '^(FAILED|ERROR)|(passed|failed|error|skipped|no tests ran).* in ' "$out/tests.log" | tail -20
    return $status
}

suite() { # log, seconds, what pytest is given
    local log=$out/$1.log seconds=$2
    shift 2
    timeout -k 20 "$seconds" "${pytest[@]}" "$@" --rows "$out" --deadline $((seconds - 20)) -m "not slow" \
        --benchmark-disable-gc --benchmark-columns=median,iqr,rounds > "$log" 2>&1
    local status=$?
    sed -n '/^=* steerfast =*$/,/^raw rows/p' "$log"
    [ $status = 0 ] || grep -E '^(FAILED|ERROR|INTERNALERROR)' "$log" | head -20
    return $status
}
suites() { suite suites "$1" benchmarks --ignore benchmarks/test_engines.py --eager; }
compiled() { suite compiled "$1" benchmarks --ignore benchmarks/test_engines.py; } # torch.compile takes seconds a baseline
engines() { suite engines "$1" benchmarks/test_engines.py; }

failed=
for stage in $wanted; do
    limit=SECONDS_${stage^^}
    seconds=${!limit:-$(awk -v stage="$stage" '$1 == stage {print $3}' <<< "$stages")}
    echo "== $stage: at most $seconds s"
    begin=$SECONDS
    "$stage" "$seconds"
    status=$?
    echo "-- $stage: exit $status after $((SECONDS - begin)) s"
    [ $status = 0 ] || failed+=" $stage"
done
[ -z "$failed" ] || { echo "not all is well:$failed; see their logs in $out"; exit 1; }
