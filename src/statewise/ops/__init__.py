"""Operators: pure functions, tensors in, ``(y, state)`` out.

Every causal operator has a whole-sequence form, the same form continued from any state, and a ``_step`` form for one
token; all return the same numbers. :func:`backends` tells what runs where.
"""

from statewise.ops.bi_wkv import bi_wkv, bi_wkv_step
from statewise.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from statewise.ops.dispatch import backends
from statewise.ops.mamba3 import mamba3, mamba3_step
from statewise.ops.selective_scan import selective_scan, selective_scan_step
from statewise.ops.ssd import ssd, ssd_step
from statewise.ops.token_mix import token_mix, token_mix_step
from statewise.ops.token_shift import token_shift, token_shift_step
from statewise.ops.wkv4 import wkv4, wkv4_step
from statewise.ops.wkv6 import wkv6, wkv6_step
from statewise.ops.wkv7 import wkv7, wkv7_step

__all__ = [
    "backends",
    "bi_wkv",
    "bi_wkv_step",
    "causal_conv1d",
    "causal_conv1d_step",
    "mamba3",
    "mamba3_step",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "token_mix",
    "token_mix_step",
    "token_shift",
    "token_shift_step",
    "wkv4",
    "wkv4_step",
    "wkv6",
    "wkv6_step",
    "wkv7",
    "wkv7_step",
]
