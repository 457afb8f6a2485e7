#!/usr/bin/env bash
# Runs on an offline machine with a GPU, over what `make gpu-bundle` collected: tests, sanitizer and
# the benchmarks named as arguments. JSON goes to $OUT; a short table comes last. No GPU is a failure.
set -uo pipefail
cd "$(dirname "$0")/.."
BUNDLE=target/gpu-bundle
OUT=${OUT:-target/gpu-out}
export OUT OVERSPILL_REQUIRE_GPU=1 PYTHONUNBUFFERED=1 COMMIT=${COMMIT:-$(cat $BUNDLE/commit)}
mkdir -p "$OUT"
python3 -c 'import torch; assert torch.cuda.is_available()' || { echo "no GPU"; exit 1; }
python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/overspill-site --upgrade $BUNDLE/*.whl
export PYTHONPATH=/tmp/overspill-site:$PWD/$BUNDLE/peers LINK_SPEED=$PWD/$BUNDLE/link_speed
mkdir -p target/demo && tar -xf $BUNDLE/model.tar.xz -C target/demo
python3 gpu/cut_model.py repeat target/demo/smollm2-135m 30 || exit 1
summary=()
step() {  # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 begin=$SECONDS
  shift 2
  timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
  local status=$?
  summary+=("$(printf '%-18s exit %-3s %4ss  %s' "$name" "$status" $((SECONDS - begin)) "$(grep -vE '^\s*$' "$OUT/$name.log" | tail -n 1 | cut -c1-110)")")
  [ $status = 0 ] || tail -n 25 "$OUT/$name.log"
}
for what in "$@"; do
  case $what in
    conformance) step conformance 200 $BUNDLE/conformance_cuda ;;
    sanitizer) step sanitizer 300 compute-sanitizer --tool memcheck --error-exitcode 9 $BUNDLE/conformance_cuda kernel ;;
    matrix) step matrix 400 python3 -m pytest -q -x -p no:cacheprovider python/tests/test_storm_matrix.py -k cuda ;;
    sessions) step sessions 200 python3 -m pytest -q -x -p no:cacheprovider python/tests/test_djinn_families.py -k gpu ;;
    doctor) step doctor 60 python3 -m overspill doctor --json; cp "$OUT/doctor.log" "$OUT/doctor.json" ;;
    demo) step demo 300 python3 -m overspill.demo --out target/demo; cp target/demo/report.json "$OUT/demo.json" ;;
    *) step "$what" 420 python3 bench/"$what".py ;;
  esac
done
printf '\n%s\n' "${summary[@]}"
