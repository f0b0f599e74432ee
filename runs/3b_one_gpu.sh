#!/bin/sh
# Qwen2.5-VL-3B on one 80 GB GPU: cold start on both paths, then GRPO. Interrupted, it goes on where it stopped.
#   MODEL, SFT_DATA, RL_DATA, OUT, SFT_STEPS, RL_STEPS     (the mixtures name their sets' places)
#
# python plan.py --model Qwen/Qwen2.5-VL-3B-Instruct --gpus 1     GB: weights 7.5, master and moments 37.0,
#   gradients 13.0, activations 5.0, logits 1.9, cache 9.4, prefill 1.0, peak 64.5, left 15.5;
#   --checkpointing always --micro-tokens 16384 (200 samples at a time; their cache stays: 74.3 GB),
#   8.6 GB of host memory for the reference
# cold start (--train all --prompts 0 --new-tokens 256): master and moments 45.2, peak 74.2, left 5.8
#
# The paper (NVILA 8B, 64 GPUs): SFT 2 epochs, lr 5e-6, cosine, 3 % warm-up, no decay, all parts learn. RL: 512
# prompts x 5, four updates of 128, at most 2,048 + 2,048 tokens, lr 1e-6 constant, decay .01, clip 1, KL .01
# (k3), clip .2/.3, dual clip 3, T 1, top_p .99, language model alone, at most 600 steps. Here: 64 prompts x 8,
# one update, 1,024 new tokens, top_p 1, and groups filtered by accuracy; on a GPU not run yet.
set -eu
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen2.5-VL-3B-Instruct} OUT=${OUT:-out/3b}
SFT_DATA=${SFT_DATA:-runs/sft_mixture.toml} RL_DATA=${RL_DATA:-runs/rl_mixture.toml}
SFT_STEPS=${SFT_STEPS:-2000} RL_STEPS=${RL_STEPS:-200}

python train_sft.py --model "$MODEL" --data "$SFT_DATA" --out "$OUT/sft" --steps "$SFT_STEPS" --batch 64 \
    --lr 5e-6 --schedule cosine --warmup $((SFT_STEPS * 3 / 100)) --save-every 500 --keep 2 --resume
python train_rl.py --model "$OUT/sft/step-$(printf %06d "$SFT_STEPS")" --data "$RL_DATA" --out "$OUT/rl" \
    --steps "$RL_STEPS" --prompts 64 --group 8 --max-new-tokens 1024 --lr 1e-6 --kl 0.01 --save-every 50 --keep 2 --resume
