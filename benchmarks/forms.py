"""What operators without a published CPU form are timed against: the forms a practitioner would write in torch.

Legend: B batch, T time, C channels, W window, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from statewise.testing.peers import join

__all__ = ["FORMS"]


def _bi_wkv_two_passes(inputs: Mapping[str, Tensor]) -> Tensor:
    """Bi-WKV as two loops over time, each carrying (num, den, maximum), joined at every token."""
    k, v, log_w, u = (inputs[name] for name in ("k", "v", "log_w", "u"))

    def sums(keys: list[Tensor], values: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        num = den = torch.zeros_like(keys[0])
        top = torch.full_like(num, -1e38)
        before = []
        for key, value in zip(keys, values, strict=True):
            before.append((num, den, top))
            faded = top + log_w
            top = torch.maximum(faded, key)
            old, now = torch.exp(faded - top), torch.exp(key - top)
            num, den = old * num + now * value, old * den + now
        return before

    keys, values = list(k.unbind(1)), list(v.unbind(1))
    left, right = sums(keys, values), sums(keys[::-1], values[::-1])[::-1]
    outputs = []
    for key, value, (n1, d1, t1), (n2, d2, t2) in zip(keys, values, left, right, strict=True):
        bonus = u + key
        top = torch.maximum(torch.maximum(t1, t2), bonus)
        e1, e2, e = torch.exp(t1 - top), torch.exp(t2 - top), torch.exp(bonus - top)
        outputs.append((e1 * n1 + e2 * n2 + e * value) / (e1 * d1 + e2 * d2 + e))
    return torch.stack(outputs, 1)


def _wkv6_chunks(inputs: Mapping[str, Tensor]) -> Tensor:
    """WKV-6 with one constant decay a head, as RWKV-5.0 has it, in matrix products over chunks of up to 512 tokens: the
    form nanoRWKV trains with."""
    r, k, v = (inputs[name].transpose(1, 2) for name in ("r", "k", "v"))  # (B, H, T, N)
    log_w, u = inputs["log_w"][:, None], inputs["u"][:, None]
    length = min(512, r.shape[2])
    steps = torch.arange(length, device=r.device)
    apart = steps[:, None] - steps - 1
    within = torch.exp(log_w[:, None] * apart.clamp(min=0)) * (apart >= 0)
    since, until = torch.exp(log_w * steps)[..., None], torch.exp(log_w * (length - 1 - steps))[..., None]
    state = torch.zeros(*r.shape[:2], r.shape[3], v.shape[3])
    outputs = []
    for r_, k_, v_ in zip(r.split(length, 2), k.split(length, 2), v.split(length, 2), strict=True):
        now = (r_ * u * k_).sum(-1, keepdim=True) * v_
        outputs.append((r_ @ k_.mT * within) @ v_ + (r_ * since) @ state + now)
        state = torch.exp(log_w * length)[..., None] * state + (k_ * until).mT @ v_
    return torch.cat(outputs, 2).transpose(1, 2)


def _conv_torch(inputs: Mapping[str, Tensor]) -> Tensor:
    """torch's own grouped convolution, then SiLU."""
    x, weight = inputs["x"], inputs["weight"]
    channels, width = weight.shape
    y = F.conv1d(x.transpose(1, 2), weight[:, None], inputs["bias"], padding=width - 1, groups=channels)
    return F.silu(y[..., : x.shape[1]].transpose(1, 2))


def _conv_shifted(inputs: Mapping[str, Tensor]) -> Tensor:
    """A multiply-add for every place in the window, then SiLU."""
    x, weight = inputs["x"], inputs["weight"]
    width, time = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    y = inputs["bias"] + sum(padded[:, j : j + time] * weight[:, j] for j in range(width))
    return F.silu(y)


def _mix_shifted(inputs: Mapping[str, Tensor]) -> Tensor:
    """A shift, then one interpolation a mixture."""
    x = inputs["x"]
    change = F.pad(x, (0, 0, 1, -1)) - x
    return join([x + change * mix for mix in inputs["mix"].unbind(0)])


#: Operator of the benchmark → name → form.
FORMS: dict[str, dict[str, Callable[[Mapping[str, Tensor]], Tensor]]] = {
    "bi_wkv": {"two loops": _bi_wkv_two_passes},
    "causal_conv1d": {"torch conv1d": _conv_torch, "shifted adds": _conv_shifted},
    "token_mix": {"torch": _mix_shifted},
    "wkv6-head": {"chunks of 512": _wkv6_chunks},
}
