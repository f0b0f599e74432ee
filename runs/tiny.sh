# What the runs of the tiny model share; a script sets OUT and SEED, then reads this file.
#   PYTHON=.venv/bin/python  RANKS=GPUs, or cores (at most 4)
# Every function skips what is done, so an interrupted script goes on where it stopped.

PYTHON=${PYTHON:-.venv/bin/python}
CORES='len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()'
RANKS=${RANKS:-$("$PYTHON" -c "import os, torch; print(torch.cuda.device_count() or min($CORES, 4))")}
# The speedrun's steps: text alone, rooms, rationales of mixed quality, RL.
READ_STEPS=${READ_STEPS:-1000} SFT_STEPS=${SFT_STEPS:-1800} MIX_STEPS=${MIX_STEPS:-120} RL_STEPS=${RL_STEPS:-100}
# Idle threads sleep instead of spinning: on a busy machine spinning costs more than it saves.
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TRANSFORMERS_VERBOSITY=error

# Ctrl-C reaches the ranks without us, which then finish a step and save; what is sent to this script alone is passed on.
child=
trap : INT
trap 'kill -TERM "$child" 2>/dev/null || exit 143' TERM

# ranks SCRIPT FLAGS...: run a script on all ranks.
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

# step NAME STEPS: the checkpoint of a run.
step() { printf '%s/%s/step-%06d' "$OUT" "$1" "$2"; }

# scenes NAME SCENES SEED FLAGS...: render a set.
scenes() {
    [ -f "$OUT/scenes/$1/rows.jsonl" ] || {
        name=$1 n=$2 seed=$3
        shift 3
        "$PYTHON" -m data.scenes --out "$OUT/scenes/$name" --n "$n" --seed "$seed" "$@"
    }
}

# rooms ENDING FLAGS...: the speedrun's sets of rooms, under these names with that ending. No two share a scene.
rooms() {
    ending=$1
    shift
    scenes "train$ending" 2600 $((SEED * 10000 + 1000)) "$@"
    # Two thirds of the rationales guess: "By eye, ..."
    scenes "mixed$ending" 250 $((SEED * 10000 + 5000)) --guess 0.65 "$@"
    scenes "rl$ending" 350 $((SEED * 10000 + 2000)) "$@"
    scenes "test$ending" 190 3000 "$@"  # the same test questions for every seed
}

# sft NAME MODEL STEPS FLAGS...: train from scratch, so with Muon.
sft() {
    name=$1 model=$2 steps=$3
    shift 3
    ranks train_sft.py --model "$model" --out "$OUT/$name" --steps "$steps" --optimizer muon --beta2 0.98 \
        --schedule linear --save-every 50 --keep 2 --seed "$SEED" --resume "$@"
}
# Of those that look at images.
SEE="--batch 16 --questions-per-image 6 --drop-depth 0.05"

# rl NAME MODEL STEPS FLAGS...: GRPO. Norms learn 120 times as fast as matrices, whose updates are
# mostly noise, which the KL holds back: see LOG.md.
rl() {
    name=$1 model=$2 steps=$3
    shift 3
    ranks train_rl.py --model "$model" --out "$OUT/$name" --steps "$steps" --group 16 --lr 7e-5 \
        --vector-rate 120 --kl 0.05 --schedule linear --warmup 5 --max-new-tokens 200 \
        --save-every 10 --keep 2 --seed "$SEED" --resume "$@"
}

# ask NAME FLAGS...: answer a set, of rooms that training never saw.
ask() {
    [ -f "$OUT/$1/summary.json" ] || {
        name=$1
        shift
        ranks eval.py --out "$OUT/$name" --max-new-tokens 200 "$@"
    }
}
