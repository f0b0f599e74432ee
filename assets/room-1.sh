#!/bin/sh
# The answer is B. More flags may follow.
"${PYTHON:-python}" ask.py --model assets/tiny --out "${OUT:-out/ask}" \
    --image assets/room-1.png --depth assets/room-1-depth.png \
    --intrinsics 260.8 260.8 127.5 95.5 \
    --region 127 9 161 108 \
    --region 135 66 158 89 \
    --region 122 105 162 169 \
    --question "Tell me what is closer to the lamp (yellow bbox <mask>): the ball (red bbox <mask>) or the cone (green bbox <mask>)? A. green B. red" "$@"
