#!/bin/sh
# The answer is 1.6. More flags may follow.
"${PYTHON:-python}" ask.py --model assets/tiny --out "${OUT:-out/ask}" \
    --image assets/room-3.png --depth assets/room-3-depth.png \
    --intrinsics 211.9 211.9 127.5 95.5 \
    --region 139 90 248 186 \
    --region 131 44 169 99 \
    --question "What is the distance from the table (yellow bbox <mask>) to the chair (blue bbox <mask>), in metres?" "$@"
