#!/usr/bin/env bash
# After selecting: the records. Two runs of up to 10 minutes: `2_record.sh tests`, `2_record.sh rest`.
export PYTHONUNBUFFERED=1
OUT=${OUT:-.}
case $1 in
  tests)
    python3 -m pytest -m gpu -n 14 -q --record > "$OUT/tests.log" 2>&1; tail -40 "$OUT/tests.log"
    timeout 330 python3 bench.py --all --record > "$OUT/bench.log" 2>&1; tail -30 "$OUT/bench.log" ;;
  rest)
    timeout 200 python3 bench.py --model all --record > "$OUT/models.log" 2>&1; tail -20 "$OUT/models.log"
    timeout 120 python3 -m pytest tests/test_sanitizer.py --sanitize --record -q > "$OUT/sanitizer.log" 2>&1; tail -15 "$OUT/sanitizer.log"
    timeout 200 python3 -m pytest tests/test_fuzz.py --fuzz 5000 --record -q > "$OUT/fuzz.log" 2>&1; tail -8 "$OUT/fuzz.log"
    timeout 60 python3 examples/execute.py --inplace > "$OUT/notebook.log" 2>&1; tail -5 "$OUT/notebook.log"; cp examples/quickstart.ipynb "$OUT/" ;;
  two)  # a machine with two GPUs
    python3 -m pytest tests/test_conventions.py tests/test_gpu_operators.py tests/test_gpu_modules.py -m gpu -q -k "two or second or parallel" ;;
esac
cp results/*.json "$OUT/" 2>/dev/null
