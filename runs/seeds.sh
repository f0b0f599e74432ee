#!/bin/sh
# The speedrun with three seeds (weights, scenes, order, noise; the test questions stay), one after the other.
set -eu
cd "$(dirname "$0")/.."
for seed in 0 1 2; do
    SEED=$seed OUT=out/seed-$seed sh runs/speedrun.sh
done
