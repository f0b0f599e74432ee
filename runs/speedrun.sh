#!/bin/sh
# From an empty directory to an RL-trained dual-path model, on a CPU or a GPU: `make speedrun` runs this.
# Interrupted (Ctrl-C, kill), it saves, and goes on where it stopped; `rm -rf out/speedrun` starts over.
#   OUT=out/speedrun  SEED=0  READ_STEPS=1000  SFT_STEPS=2200  MIX_STEPS=120  RL_STEPS=160
#   RANKS=GPUs, or cores (at most 4)
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-out/speedrun} SEED=${SEED:-0}
READ_STEPS=${READ_STEPS:-1000} SFT_STEPS=${SFT_STEPS:-2200}
MIX_STEPS=${MIX_STEPS:-120} RL_STEPS=${RL_STEPS:-160}
CORES='len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()'
RANKS=${RANKS:-$("$PYTHON" -c "import os, torch; print(torch.cuda.device_count() or min($CORES, 4))")}
# Idle threads sleep instead of spinning: on a busy machine spinning costs more than it saves.
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TRANSFORMERS_VERBOSITY=error

# Ctrl-C reaches the ranks without us, which then finish a step and save; what is sent to this script alone is passed on.
child=
trap : INT
trap 'kill -TERM "$child" 2>/dev/null || exit 143' TERM
ranks() {
    "$PYTHON" -m training.torchrun --standalone --nproc_per_node "$RANKS" "$@" &
    child=$! code=0
    wait "$child" || code=$?
    # A signal ends the wait, not the ranks.
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    child=
    return "$code"
}
stage() { printf '\n== %s\n' "$*"; }
scenes() {
    [ -f "$OUT/scenes/$1/rows.jsonl" ] || {
        name=$1 n=$2 seed=$3
        shift 3
        "$PYTHON" -m data.scenes --out "$OUT/scenes/$name" --n "$n" --seed "$seed" "$@"
    }
}
ask() { [ -f "$OUT/$1/summary.json" ] || ranks eval.py --data "$OUT/scenes/test" --max-new-tokens 200 --out "$OUT/$@"; }

step() { printf '%s/step-%06d' "$OUT/$1" "$2"; }

stage "1/6 render rooms: no two of these sets share a scene"
scenes told 3000 $((SEED * 10000 + 6000)) --lor 0.5 --told  # text alone
scenes train 4000 $((SEED * 10000 + 1000)) --lor 0.8  # a centre takes more learning than an answer
scenes mixed 700 $((SEED * 10000 + 5000)) --guess 0.65  # two thirds of the rationales guess: "By eye, ..."
scenes rl 900 $((SEED * 10000 + 2000))
scenes test 190 3000  # the same test questions for every seed

stage "2/6 a tiny random Qwen3-VL checkpoint"
[ -f "$OUT/tiny/spatial.safetensors" ] || "$PYTHON" -m model.tiny --family qwen3_vl --out "$OUT/tiny" --seed "$SEED"

stage "3/6 cold start: reckon in text, then SFT on both paths, at last on rationales of mixed quality"
sft() {
    name=$1 model=$2 steps=$3
    shift 3
    ranks train_sft.py --model "$model" --out "$OUT/$name" --steps "$steps" --optimizer muon --beta2 0.98 \
        --schedule linear --save-every 50 --keep 2 --seed "$SEED" --resume "$@"
}
SEE="--batch 16 --questions-per-image 6 --head-weight 0.5 --drop-depth 0.05"
# The tiny checkpoint has read nothing. A pretrained one knows that 2.0 is less than 3.5.
sft read "$OUT/tiny" "$READ_STEPS" --data "$OUT/scenes/told" --batch 24 --lr 2e-3 --warmup 50 --head-weight 0
sft worked "$(step read "$READ_STEPS")" "$SFT_STEPS" --data "$OUT/scenes/train" $SEE --lr 2e-3 --warmup 50
# Two thirds of these rationales guess ("By eye, ..."): RL has something to choose from.
sft sft "$(step worked "$SFT_STEPS")" "$MIX_STEPS" --data "$OUT/scenes/mixed" $SEE --lr 1e-3 --warmup 10
SFT=$(step sft "$MIX_STEPS")

stage "4/6 test it: without images, with them, and sampled"
ask eval-blind --model "$SFT" --blind --again 0
ask eval-sft --model "$SFT"
ask eval-sft-sampled --model "$SFT" --temperature 1 --again 0

stage "5/6 GRPO on both paths"
# Norms learn 120 times as fast as matrices, whose updates are mostly noise, which the KL holds back: see LOG.md.
ranks train_rl.py --model "$SFT" --data "$OUT/scenes/rl" --out "$OUT/rl" --steps "$RL_STEPS" \
    --prompts 16 --group 16 --lr 7e-5 --vector-rate 120 --kl 0.05 --schedule linear --warmup 5 \
    --max-new-tokens 200 --save-every 10 --keep 2 --seed "$SEED" --resume

stage "6/6 test it again, on the same questions"
RL=$(step rl "$RL_STEPS")
ask eval-rl-sampled --model "$RL" --temperature 1 --again 0
ask eval-rl --model "$RL"
"$PYTHON" report.py --run "$OUT"
