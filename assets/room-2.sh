#!/bin/sh
# The answer is B. More flags may follow.
"${PYTHON:-python}" ask.py --model assets/tiny --out "${OUT:-out/ask}" \
    --image assets/room-2.png --depth assets/room-2-depth.png \
    --intrinsics 253.2 253.2 127.5 95.5 \
    --region 108 8 156 142 \
    --region 95 73 112 98 \
    --question "Seen from the camera, is the lamp (yellow bbox <mask>) left of or right of the vase (blue bbox <mask>)? A. left of B. right of" "$@"
