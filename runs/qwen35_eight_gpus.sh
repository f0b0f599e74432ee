#!/bin/sh
# Qwen3.5-9B (or MODEL=Qwen/Qwen3.5-4B) on one box with 8 GPUs of 80 GB: cold start on both paths, then GRPO.
# Interrupted, it goes on.
#   MODEL, SFT_DATA, RL_DATA, OUT, SFT_STEPS, RL_STEPS     (the mixtures name their sets' places)
# pip install fla-core einops: without it the delta rule is slow, and takes several times the memory.
#
# python plan.py --model Qwen/Qwen3.5-9B --gpus 8     GB: weights 18.9, master and moments 13.4, reference 2.2,
#   gradients 18.4, activations 8.8, logits 6.2, cache 6.8, peak 68.1, left 11.9; --shard always --checkpointing
#   always --micro-tokens 16384 (64 samples at a time)
# python plan.py --model Qwen/Qwen3.5-4B --gpus 8     peak 33.8, left 46.2 (40.8 GB with the cache kept)
#
# The settings are those of runs/8b_eight_gpus.sh. On GPUs not run yet.
set -eu
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen3.5-9B} OUT=${OUT:-out/qwen35-9b}
SFT_DATA=${SFT_DATA:-runs/sft_mixture.toml} RL_DATA=${RL_DATA:-runs/rl_mixture.toml}
SFT_STEPS=${SFT_STEPS:-2000} RL_STEPS=${RL_STEPS:-200} TORCHRUN=${TORCHRUN:-python -m training.torchrun --nproc_per_node 8}

$TORCHRUN train_sft.py --model "$MODEL" --data "$SFT_DATA" --out "$OUT/sft" --steps "$SFT_STEPS" --batch 512 \
    --lr 5e-6 --schedule cosine --warmup $((SFT_STEPS * 3 / 100)) --save-every 100 --keep 2 --resume
$TORCHRUN train_rl.py --model "$OUT/sft/step-$(printf %06d "$SFT_STEPS")" --data "$RL_DATA" --out "$OUT/rl" \
    --steps "$RL_STEPS" --prompts 512 --group 5 --updates 4 --max-new-tokens 2048 --lr 1e-6 --kl 0.01 \
    --save-every 20 --keep 2 --resume
