"""Attention over a prompt that many completions share: in training and in decoding.

prefix_attention    packed segments, each with at most one earlier segment as its prefix
decode_attention    one new query a slot, over its prompt's keys and its own
"""

from kernels.decode_attention import Table, decode_attention, reference_decode_attention
from kernels.packed_attention import prefix_attention, reference_prefix_attention

__all__ = [
    "Table",
    "decode_attention",
    "prefix_attention",
    "reference_decode_attention",
    "reference_prefix_attention",
]
