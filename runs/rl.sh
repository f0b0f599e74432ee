#!/bin/sh
# GRPO from the checkpoint in assets/, on rendered rooms, in minutes on a CPU: `make rl` runs this.
# Interrupted, it goes on where it stopped; `rm -rf out/rl` starts over.
#   OUT=out/rl  SEED=0  STEPS=60
set -eu
cd "$(dirname "$0")/.."
OUT=${OUT:-out/rl} SEED=${SEED:-0} STEPS=${STEPS:-60}
. runs/tiny.sh

stage "1/4 render rooms: those to train on, and 100 to test on"
scenes rl 350 $((SEED * 10000 + 2000))
scenes test 100 3000

stage "2/4 what the checkpoint answers, sampled as in training"
ask eval-before --data "$OUT/scenes/test" --model assets/tiny --temperature 1 --again 0

stage "3/4 GRPO on both paths"
rl . assets/tiny "$STEPS" --data "$OUT/scenes/rl" --prompts 16 --log-groups 2

stage "4/4 the same questions again"
ask eval-after --data "$OUT/scenes/test" --model "$(step . "$STEPS")" --temperature 1 --again 0
"$PYTHON" report.py --run "$OUT" --eval "$OUT/eval-before" "$OUT/eval-after"
"$PYTHON" -m runs.gain --before "$OUT/eval-before" --after "$OUT/eval-after"
