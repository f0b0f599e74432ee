#!/bin/sh
# From an empty directory to an RL-trained dual-path model, on a CPU or a GPU: `make speedrun` runs this.
# Interrupted (Ctrl-C, kill), it saves, and goes on where it stopped; `rm -rf out/speedrun` starts over.
#   OUT=out/speedrun  SEED=0, and the numbers of steps in runs/tiny.sh
set -eu
cd "$(dirname "$0")/.."
OUT=${OUT:-out/speedrun} SEED=${SEED:-0}
. runs/tiny.sh

stage "1/6 render rooms: no two of these sets share a scene"
# Text alone: what the rooms look like doesn't matter, only where things stand.
scenes told 2400 $((SEED * 10000 + 6000)) --told --size 128 96
rooms ""
TEST="--data $OUT/scenes/test"

stage "2/6 a tiny random Qwen3-VL checkpoint"
[ -f "$OUT/tiny/spatial.safetensors" ] || "$PYTHON" -m model.tiny --family qwen3_vl --out "$OUT/tiny" --seed "$SEED"

stage "3/6 cold start: reckon in text, then SFT on both paths, at last on rationales of mixed quality"
# The tiny checkpoint has read nothing; a pretrained one knows that 2.0 is less than 3.5.
sft read "$OUT/tiny" "$READ_STEPS" --data "$OUT/scenes/told" --batch 24 --questions-per-image 12 --lr 2e-3 --warmup 50 --head-weight 0
sft worked "$(step read "$READ_STEPS")" "$SFT_STEPS" --data "$OUT/scenes/train" $SEE --head-weight 0.5 --lr 2e-3 --warmup 50
# RL has something to choose from: to work an answer out, or to guess it.
sft sft "$(step worked "$SFT_STEPS")" "$MIX_STEPS" --data "$OUT/scenes/mixed" $SEE --head-weight 0.5 --lr 1e-3 --warmup 10
SFT=$(step sft "$MIX_STEPS")

stage "4/6 test it: without images, with them, and sampled"
ask eval-blind $TEST --model "$SFT" --blind --again 0 --limit 500
ask eval-sft $TEST --model "$SFT"
ask eval-sft-sampled $TEST --model "$SFT" --temperature 1 --again 0 --limit 500

stage "5/6 GRPO on both paths"
rl rl "$SFT" "$RL_STEPS" --data "$OUT/scenes/rl" --prompts 16

stage "6/6 test it again, on the same questions"
RL=$(step rl "$RL_STEPS")
ask eval-rl-sampled $TEST --model "$RL" --temperature 1 --again 0 --limit 500
ask eval-rl $TEST --model "$RL"
"$PYTHON" report.py --run "$OUT"
