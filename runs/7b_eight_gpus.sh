#!/bin/sh
# Qwen2.5-VL-7B on one box with 8 GPUs of 80 GB: cold start on both paths, then GRPO. Interrupted, it goes on.
#   MODEL, SFT_DATA, RL_DATA, OUT, SFT_STEPS, RL_STEPS     (the mixtures name their sets' places)
# More boxes: TORCHRUN="torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500"
#
# python plan.py --model Qwen/Qwen2.5-VL-7B-Instruct --gpus 8 --prompts 512 --group 5 --prompt-tokens 2048 \
#   --new-tokens 2048     GB: weights 16.6, master and moments 11.4, reference 1.9, gradients 12.2,
#   activations 7.8, logits 3.3, cache 21.4, prefill 1.8, peak 53.4, left 26.6;
#   --shard always --checkpointing always --micro-tokens 16384 (130 samples at a time; their cache goes before the update)
# cold start (--train all --prompts 0 --new-tokens 256): peak 39.0, left 41.0
#
# The paper (NVILA 8B, 64 GPUs): SFT 2 epochs, lr 5e-6, cosine, 3 % warm-up, no decay, all parts learn. RL: 512
# prompts x 5, four updates of 128, at most 2,048 + 2,048 tokens, lr 1e-6 constant, decay .01, clip 1, KL .01
# (k3), clip .2/.3, dual clip 3, T 1, top_p .99, language model alone, at most 600 steps. Here: top_p 1, and
# groups filtered by accuracy, not refilled to 512; the rest is the paper's. On GPUs not run yet.
set -eu
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct} OUT=${OUT:-out/7b}
SFT_DATA=${SFT_DATA:-runs/sft_mixture.toml} RL_DATA=${RL_DATA:-runs/rl_mixture.toml}
SFT_STEPS=${SFT_STEPS:-2000} RL_STEPS=${RL_STEPS:-200} TORCHRUN=${TORCHRUN:-python -m training.torchrun --nproc_per_node 8}

$TORCHRUN train_sft.py --model "$MODEL" --data "$SFT_DATA" --out "$OUT/sft" --steps "$SFT_STEPS" --batch 512 \
    --lr 5e-6 --schedule cosine --warmup $((SFT_STEPS * 3 / 100)) --save-every 100 --keep 2 --resume
$TORCHRUN train_rl.py --model "$OUT/sft/step-$(printf %06d "$SFT_STEPS")" --data "$RL_DATA" --out "$OUT/rl" \
    --steps "$RL_STEPS" --prompts 512 --group 5 --updates 4 --max-new-tokens 2048 --lr 1e-6 --kl 0.01 \
    --save-every 20 --keep 2 --resume
