#!/bin/sh
# Qwen3.5-2B on one 80 GB GPU: cold start on both paths, then GRPO. Interrupted, it goes on where it stopped.
#   MODEL, SFT_DATA, RL_DATA, OUT, SFT_STEPS, RL_STEPS, LORA     (the mixtures name their sets' places)
# pip install fla-core einops: without it the delta rule is slow, and takes several times the memory.
#
# python plan.py --model Qwen/Qwen3.5-2B --gpus 1     GB: weights 4.4, master and moments 22.6, gradients 8.5,
#   activations 4.1, logits 3.1, cache 14.2, peak 42.9, left 37.1; --checkpointing always (352 samples at a time;
#   their cache stays: 58.2 GB), 4.3 GB of host memory for the reference
# Qwen3.5-4B fits with adapters: LORA=32 MODEL=Qwen/Qwen3.5-4B sh runs/qwen35_one_gpu.sh; plan.py --lora 32: peak
#   25.0 (30.9 with the cache kept). All of it takes 88.1, so one H200.
# On a GPU not run yet.
set -eu
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen3.5-2B} OUT=${OUT:-out/qwen35} LORA=${LORA:-0}
SFT_DATA=${SFT_DATA:-runs/sft_mixture.toml} RL_DATA=${RL_DATA:-runs/rl_mixture.toml}
SFT_STEPS=${SFT_STEPS:-2000} RL_STEPS=${RL_STEPS:-200}

python train_sft.py --model "$MODEL" --data "$SFT_DATA" --out "$OUT/sft" --steps "$SFT_STEPS" --batch 64 \
    --lora "$LORA" --lr 5e-6 --schedule cosine --warmup $((SFT_STEPS * 3 / 100)) --save-every 500 --keep 2 --resume
python train_rl.py --model "$OUT/sft/step-$(printf %06d "$SFT_STEPS")" --data "$RL_DATA" --out "$OUT/rl" \
    --lora "$LORA" --steps "$RL_STEPS" --prompts 64 --group 8 --max-new-tokens 1024 --lr 1e-6 --kl 0.01 \
    --save-every 50 --keep 2 --resume
