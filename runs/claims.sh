#!/bin/sh
# The paper's claims in miniature, each with three seeds; docs/results.md says what came of them.
# Interrupted, it goes on where it stopped; `python -m runs.claims out/claims` writes the tables of what is there.
#   OUT=out/claims  SEEDS="0 1 2"
set -eu
cd "$(dirname "$0")/.."
ALL=${OUT:-out/claims} SEEDS=${SEEDS:-0 1 2}
OUT=$ALL SEED=0
. runs/tiny.sh
export PYTHON RANKS READ_STEPS SFT_STEPS MIX_STEPS RL_STEPS

# rl_variant NAME FLAGS...: RL from the speedrun's cold start, and its test.
rl_variant() {
    variant=$1
    shift
    rl "rl-$variant" "$(step sft "$MIX_STEPS")" "$RL_STEPS" "$@"
    ask "eval-rl-$variant" $TEST --model "$(step "rl-$variant" "$RL_STEPS")" --again 0
}

# cold_variant NAME SETS PATHS FLAGS...: another cold start, then RL on both paths as in the speedrun.
# SETS: the ending of the names of the sets (""; "-flat"); PATHS: what the cold start teaches (""; ",path=lor").
cold_variant() {
    variant=$1 sets=$2 paths=$3
    shift 3
    sft "$variant-worked" "$(step read "$READ_STEPS")" "$SFT_STEPS" --data "$OUT/scenes/train$sets$paths" $SEE --lr 2e-3 --warmup 50 "$@"
    sft "$variant-sft" "$(step "$variant-worked" "$SFT_STEPS")" "$MIX_STEPS" --data "$OUT/scenes/mixed$sets$paths" $SEE --lr 1e-3 --warmup 10 "$@"
    ask "$variant-eval-sft" --data "$OUT/scenes/test$sets" --model "$(step "$variant-sft" "$MIX_STEPS")" --again 0 $REGIONS
    rl "$variant-rl" "$(step "$variant-sft" "$MIX_STEPS")" "$RL_STEPS" --data "$OUT/scenes/rl$sets" --prompts 16 $REGIONS
    ask "$variant-eval-rl" --data "$OUT/scenes/test$sets" --model "$(step "$variant-rl" "$RL_STEPS")" --again 0 $REGIONS
}

# The claims in turn, each for all seeds: what there is after an interruption has as many seeds as it can.
of_seed() { OUT=$ALL/seed-$1 TEST="--data $ALL/seed-$1/scenes/test" REGIONS=; }

for SEED in $SEEDS; do
    of_seed "$SEED"
    stage "seed $SEED: the speedrun"
    SEED=$SEED OUT=$OUT sh runs/speedrun.sh
done

for SEED in $SEEDS; do
    of_seed "$SEED"
    stage "seed $SEED: one path alone, as many rollouts of it"
    rl_variant lor-only --data "$OUT/scenes/rl,path=lor" --prompts 8
    rl_variant dtr-only --data "$OUT/scenes/rl,path=dtr" --prompts 8

    stage "seed $SEED: rooms of a style that training never saw"
    scenes loft 190 4000 --style loft --size 288 176
    ask eval-sft-loft --data "$OUT/scenes/loft" --model "$(step sft "$MIX_STEPS")" --again 0
    ask eval-rl-loft --data "$OUT/scenes/loft" --model "$(step rl "$RL_STEPS")" --again 0

    stage "seed $SEED: the weight of the detection reward, and the official rules"
    rl_variant detect-0 --data "$OUT/scenes/rl" --prompts 16 --reward-weights detect=0
    rl_variant detect-3 --data "$OUT/scenes/rl" --prompts 16 --reward-weights detect=0.3
    rl_variant official --data "$OUT/scenes/rl" --prompts 16 --rules official
done

for SEED in $SEEDS; do
    of_seed "$SEED"
    stage "seed $SEED: cold starts on one path"
    cold_variant lor "" ,path=lor --head-weight 0.5
    cold_variant dtr "" ,path=dtr --head-weight 0.5
done

for SEED in $SEEDS; do
    of_seed "$SEED"
    stage "seed $SEED: without the 3D head, which is all grounding that there is here"
    cold_variant headless "" "" --head-weight 0

    stage "seed $SEED: without region tokens: boxes in words"
    REGIONS="--regions text"
    cold_variant text "" "" --head-weight 0 $REGIONS
    REGIONS=

    stage "seed $SEED: without depth"
    rooms -flat --no-depth
    cold_variant flat -flat "" --head-weight 0.5
done
"$PYTHON" -m runs.claims "$ALL"
