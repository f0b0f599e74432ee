#!/bin/sh
# The speedrun with three seeds (weights, scenes, order, noise; the test questions stay), one after the other;
# runs/claims.sh goes on from there. `python -m runs.claims out/claims` writes the tables.
set -eu
cd "$(dirname "$0")/.."
for seed in 0 1 2; do
    SEED=$seed OUT=out/claims/seed-$seed sh runs/speedrun.sh
done
