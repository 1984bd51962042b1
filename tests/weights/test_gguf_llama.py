"""What llama.cpp computes from a GGUF of ours are our logits: its graphs, written out from src/models there."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statewise
from statewise.weights.gguf import read_gguf

# What llama.cpp computes from a file, one token after the other, in float64 and by its own names: src/models there.

zeros = partial(torch.zeros, dtype=torch.float64)


def multiplied(weight: Tensor, x: Tensor) -> Tensor:
    """`ggml_mul_mat`: sums over the innermost axis of both."""
    return weight @ x


def layer_norm(x: Tensor, weight: Tensor | int, bias: Tensor | int, eps: float = 1e-5) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * weight + bias


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def head_norm(y: Tensor, N: int, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(y.view(-1, N), 1, 0, 64e-5).reshape(-1) * weight + bias


def llama_rwkv6(meta: dict[str, Any], t: dict[str, Tensor], tokens: list[int]) -> Tensor:
    N, C, every = meta["rwkv6.wkv.head_size"], meta["rwkv6.embedding_length"], meta["rwkv6.rescale_every_n_layers"]
    states: dict[int, list[Tensor]] = {
        i: [zeros(C), zeros(C), zeros(C // N, N, N)] for i in range(meta["rwkv6.block_count"])
    }
    for token in tokens:
        x = layer_norm(t["token_embd.weight"][token], t["token_embd_norm.weight"], t["token_embd_norm.bias"])
        for i, state in states.items():
            # The stream was halved this often. llama.cpp leaves the epsilon as it is, which is all that differs from
            # the model: here it is halved along, so that the rest can be compared to the last digits.
            eps = 1e-5 / 4 ** (i // every)
            w = {key.removeprefix(f"blk.{i}."): tensor for key, tensor in t.items() if key.startswith(f"blk.{i}.")}
            here = layer_norm(x, w["attn_norm.weight"], w["attn_norm.bias"], eps)
            change, state[0] = state[0] - here, here
            hidden = torch.tanh(multiplied(w["time_mix_w1.weight"], here + change * w["time_mix_lerp_x.weight"])).view(
                5, -1
            )
            shares = torch.stack([multiplied(a, b) for a, b in zip(w["time_mix_w2.weight"], hidden, strict=True)])
            xw, xk, xv, xr, xg = here + change * (w["time_mix_lerp_fused.weight"].view(5, C) + shares)
            r, k, v = (
                multiplied(w[f"time_mix_{n}.weight"], z).view(-1, N)
                for n, z in (("receptance", xr), ("key", xk), ("value", xv))
            )
            g = torch.nn.functional.silu(multiplied(w["time_mix_gate.weight"], xg))
            d = multiplied(w["time_mix_decay_w2.weight"], torch.tanh(multiplied(w["time_mix_decay_w1.weight"], xw)))
            decay = torch.exp(-torch.exp(d + w["time_mix_decay.weight"])).view(-1, N)
            kv = k[:, :, None] * v[:, None, :]
            y = torch.einsum("hk,hkv->hv", r, state[2] + w["time_mix_first.weight"][:, :, None] * kv)
            state[2] = decay[:, :, None] * state[2] + kv
            y = head_norm(y, N, w["time_mix_ln.weight"], w["time_mix_ln.bias"])
            x = x + multiplied(w["time_mix_output.weight"], y * g)
            here = layer_norm(x, w["attn_norm_2.weight"], w["attn_norm_2.bias"], eps)
            change, state[1] = state[1] - here, here
            r = torch.sigmoid(
                multiplied(w["channel_mix_receptance.weight"], here + change * w["channel_mix_lerp_r.weight"])
            )
            k = multiplied(w["channel_mix_key.weight"], here + change * w["channel_mix_lerp_k.weight"]).relu().square()
            x = x + r * multiplied(w["channel_mix_value.weight"], k)
            if (i + 1) % every == 0:
                x = x / 2
    eps = 1e-5 / 4 ** (len(states) // every)
    return multiplied(t["output.weight"], layer_norm(x, t["output_norm.weight"], t["output_norm.bias"], eps))


def llama_rwkv7(meta: dict[str, Any], t: dict[str, Tensor], tokens: list[int]) -> Tensor:
    N, C = meta["rwkv7.wkv.head_size"], meta["rwkv7.embedding_length"]
    states: dict[int, list[Tensor]] = {
        i: [zeros(C), zeros(C), zeros(C // N, N, N)] for i in range(meta["rwkv7.block_count"])
    }
    for token in tokens:
        x = layer_norm(t["token_embd.weight"][token], t["token_embd_norm.weight"], t["token_embd_norm.bias"])
        first = None
        for i, state in states.items():
            w = {key.removeprefix(f"blk.{i}."): tensor for key, tensor in t.items() if key.startswith(f"blk.{i}.")}

            def low(name: str, z: Tensor, between: Any = lambda h: h, w: dict[str, Tensor] = w) -> Tensor:
                h = between(multiplied(w[f"time_mix_{name}1.weight"], z))
                return multiplied(w[f"time_mix_{name}2.weight"], h)

            here = layer_norm(x, w["attn_norm.weight"], w["attn_norm.bias"])
            xr, xw, xk, xv, xa, xg = here + (state[0] - here) * w["time_mix_lerp_fused.weight"].view(6, C)
            state[0] = here
            r, k, v = (
                multiplied(w[f"time_mix_{n}.weight"], z) for n, z in (("receptance", xr), ("key", xk), ("value", xv))
            )
            decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(low("w", xw, torch.tanh) + w["time_mix_w0.weight"]))
            if first is None:
                first = v
            else:
                v = v + (first - v) * torch.sigmoid(low("v", xv) + w["time_mix_v0.weight"])
            g = low("g", xg, torch.sigmoid)
            a = torch.sigmoid(low("a", xa) + w["time_mix_a0.weight"])
            kk = torch.nn.functional.normalize((k * w["time_mix_k_k.weight"]).view(-1, N), dim=-1, eps=1e-12)
            ka = k * w["time_mix_k_a.weight"]
            k = (k + a * ka - ka).view(-1, N)
            r, v, decay, a = (z.view(-1, N) for z in (r, v, decay, a))
            S = state[2]  # (heads, value, key)
            S = S * decay[:, None, :] + torch.einsum("hvk,hk->hv", S, -kk)[:, :, None] * (kk * a)[:, None, :]
            state[2] = S = S + v[:, :, None] * k[:, None, :]
            y = torch.einsum("hvk,hk->hv", S, r)
            y = head_norm(y, N, w["time_mix_ln.weight"], w["time_mix_ln.bias"])
            y = y + (v * (k * r * w["time_mix_r_k.weight"].view(-1, N)).sum(-1, keepdim=True)).reshape(-1)
            x = x + multiplied(w["time_mix_output.weight"], y * g)
            here = layer_norm(x, w["attn_norm_2.weight"], w["attn_norm_2.bias"])
            k = multiplied(w["channel_mix_key.weight"], here + (state[1] - here) * w["channel_mix_lerp_k.weight"])
            state[1] = here
            x = x + multiplied(w["channel_mix_value.weight"], k.relu().square())
    return multiplied(t["output.weight"], layer_norm(x, t["output_norm.weight"], t["output_norm.bias"]))


def llama_mamba(meta: dict[str, Any], t: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Mamba and Mamba-2; the latter's state is that of the former with one A, dt and D for all channels of a head."""
    kind = meta["general.architecture"]
    inner, N, rank = (meta[f"{kind}.ssm.{key}"] for key in ("inner_size", "state_size", "time_step_rank"))
    groups, eps = meta.get(f"{kind}.ssm.group_count", 1), meta[f"{kind}.attention.layer_norm_rms_epsilon"]
    window, layers = meta[f"{kind}.ssm.conv_kernel"], meta[f"{kind}.block_count"]
    channels = t["blk.0.ssm_conv1d.weight"].shape[0]
    states = {i: [zeros(channels, window - 1), zeros(inner, N)] for i in range(layers)}
    for token in tokens:
        x = t["token_embd.weight"][token]
        for i, state in states.items():
            w = {key.removeprefix(f"blk.{i}."): tensor for key, tensor in t.items() if key.startswith(f"blk.{i}.")}
            made = multiplied(w["ssm_in.weight"], rms_norm(x, eps) * w["attn_norm.weight"])
            if kind == "mamba":
                h, z = made.split([inner, inner])
            else:
                z, h, dt = made.split([inner, channels, rank])
            seen = torch.cat([state[0], h[:, None]], 1)
            state[0] = seen[:, 1:]
            h = torch.nn.functional.silu((seen * w["ssm_conv1d.weight"]).sum(1) + w["ssm_conv1d.bias"])
            if kind == "mamba":
                dt, B, C = multiplied(w["ssm_x.weight"], h).split([rank, N, N])
                if meta["mamba.ssm.dt_b_c_rms"]:
                    dt, B, C = (rms_norm(z, eps) for z in (dt, B, C))
                dt = multiplied(w["ssm_dt.weight"], dt) + w["ssm_dt.bias"]
                A, D, B, C = w["ssm_a"], w["ssm_d"], B.expand(inner, N), C.expand(inner, N)
            else:
                h, B, C = h.split([inner, groups * N, groups * N])
                B, C = (z.view(groups, N).repeat_interleave(inner // groups, 0) for z in (B, C))
                dt = (dt + w["ssm_dt.bias"]).repeat_interleave(inner // rank)
                A, D = (
                    w["ssm_a"].repeat_interleave(inner // rank, 0),
                    w["ssm_d"].view(-1).repeat_interleave(inner // rank),
                )
            dt = torch.nn.functional.softplus(dt)[:, None]
            state[1] = torch.exp(dt * A) * state[1] + dt * B * h[:, None]
            y = ((state[1] * C).sum(1) + D * h) * torch.nn.functional.silu(z)
            if kind == "mamba2":
                y = (rms_norm(y.view(groups, -1), eps) * w["ssm_norm.weight"]).view(-1)
            x = x + multiplied(w["ssm_out.weight"], y)
    return multiplied(t.get("output.weight", t["token_embd.weight"]), rms_norm(x, eps) * t["output_norm.weight"])


MODELS: dict[str, tuple[str, dict[str, Any], float]] = {
    # of fourteen blocks the last eight are stored divided
    "rwkv6": ("rwkv6", {"num_layers": 14, "head_size": 8, "mix_rank": 3, "decay_rank": 5}, 1e-11),
    "rwkv7": ("rwkv7", {"head_size": 8, "decay_rank": 5, "iclr_rank": 6, "value_rank": 3, "gate_rank": 7}, 1e-11),
    # the file's A is -exp(A_log) rounded to float32
    "mamba": ("mamba", {"state_size": 5, "dt_rank": 3}, 1e-6),
    "falcon": ("mamba", {"inner_norm": "weightless", "inner_norm_eps": 1e-5, "tie_embeddings": False}, 1e-6),
    "mamba2": ("mamba2", {"state_size": 6, "head_size": 16, "groups": 2}, 1e-6),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_ours(tmp_path: Path, name: str) -> None:
    architecture, fields, limit = MODELS[name]
    model = statewise.create(architecture, **{"vocab_size": 24, "num_layers": 3, "width": 32, **fields})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    statewise.save(model, tmp_path / "model.gguf", "gguf")
    metadata, tensors = read_gguf(tmp_path / "model.gguf")
    tokens = [3, 1, 4, 1, 5, 9, 2]
    compute = {"rwkv6": llama_rwkv6, "rwkv7": llama_rwkv7}.get(name, llama_mamba)
    theirs = compute(metadata, {key: tensor.double() for key, tensor in tensors.items()}, tokens)
    with torch.no_grad():
        ours = model.double()(torch.tensor([tokens]))[0][0, -1]
    assert (theirs - ours).abs().max() <= limit * ours.abs().max()
