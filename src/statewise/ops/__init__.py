"""Operators: pure functions, tensors in, ``(y, state)`` out (being assembled)."""

from statewise.ops.dispatch import backends
from statewise.ops.token_shift import token_shift, token_shift_step
from statewise.ops.wkv4 import wkv4, wkv4_step
from statewise.ops.wkv7 import wkv7, wkv7_step

__all__ = ["backends", "token_shift", "token_shift_step", "wkv4", "wkv4_step", "wkv7", "wkv7_step"]
