"""Operators: pure functions, tensors in, ``(y, state)`` out.

Every causal operator has a whole-sequence form, the same form continued from any state, and a ``_step`` form for one
token; all return the same numbers. :func:`backends` tells what runs where. Of some there is a ``_step_`` form beside
these, which advances rows of a pool of states in place: :mod:`statewise.ops.pool`.
"""

from statewise.ops.bi_wkv import bi_wkv, bi_wkv_step
from statewise.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from statewise.ops.dispatch import backends
from statewise.ops.mamba3 import mamba3, mamba3_step
from statewise.ops.pool import (
    causal_conv1d_step_,
    selective_scan_step_,
    ssd_step_,
    token_mix_step_,
    token_shift_step_,
    wkv4_step_,
    wkv6_step_,
    wkv7_step_,
)
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
    "causal_conv1d_step_",
    "mamba3",
    "mamba3_step",
    "selective_scan",
    "selective_scan_step",
    "selective_scan_step_",
    "ssd",
    "ssd_step",
    "ssd_step_",
    "token_mix",
    "token_mix_step",
    "token_mix_step_",
    "token_shift",
    "token_shift_step",
    "token_shift_step_",
    "wkv4",
    "wkv4_step",
    "wkv4_step_",
    "wkv6",
    "wkv6_step",
    "wkv6_step_",
    "wkv7",
    "wkv7_step",
    "wkv7_step_",
]
