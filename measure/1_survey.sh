#!/usr/bin/env bash
# First run on a GPU: every new tile beside what is selected today, then the tests of numerics. About 9 minutes, 16 cores.
export PYTHONUNBUFFERED=1
OUT=${OUT:-.}
new=$(tr '\n' ' ' < measure/new_tiles.txt)
timeout 330 python3 bench.py --all --dtype float16 float32 --variants $new --json "$OUT/variants.json" > "$OUT/variants.log" 2>&1
sed -n '/The selected variants/,$p' "$OUT/variants.log"
grep FAILED "$OUT/variants.log" | head -40
timeout 230 python3 -m pytest tests/test_gpu_numerics.py -q -n 14 -x --maxfail 40 > "$OUT/numerics.log" 2>&1
tail -60 "$OUT/numerics.log"
