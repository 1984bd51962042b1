"""Small models that others trained: opened without being told what they are, and as good as they were."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import statewise

TINY = {"rwkv6": "tiny-rwkv-6v0-3m-from-Q5_1", "rwkv7": "tiny-rwkv-7v0-834K-from-FP32"}


@pytest.fixture(name="tiny", params=sorted(TINY))
def _tiny(request: pytest.FixtureRequest, shared: Path) -> tuple[str, Any, dict[str, Tensor]]:
    folder = shared / "weights" / "rwkv_cpp_tiny"
    model = statewise.load(folder / f"{TINY[request.param]}.safetensors")
    return request.param, model, load_file(folder / f"{TINY[request.param]}.golden.safetensors")


@torch.no_grad()
def test_logits_and_state_of_the_prompt(tiny: tuple[str, Any, dict[str, Tensor]]) -> None:
    name, model, want = tiny
    assert type(model).__name__.lower() == name
    logits, state = model(want["prompt_ids"][None])
    assert float((logits[0] - want["prompt_logits"]).abs().max()) <= 1e-4
    for index, tensor in enumerate(state.to_layout("rwkv-pip")):
        kept = want[f"state.{index}"]
        assert float((tensor - kept).abs().max()) <= 1e-4 * max(1.0, float(kept.abs().max())), f"slot {index}"


@torch.no_grad()
def test_greedy_text(tiny: tuple[str, Any, dict[str, Tensor]]) -> None:
    """The RWKV-6 was trained on 16-bit characters: a zero follows every byte, and is sampled like any other token."""
    _, model, want = tiny
    expected = want["greedy_ids"].tolist()
    found = list(statewise.generate(model, want["prompt_ids"].tolist(), max_tokens=len(expected), temperature=0))
    assert found == expected


@torch.no_grad()
def test_it_reads_as_well_as_it_did(shared: Path) -> None:
    """3.367 bits per byte were measured on the first four thousand bytes or so: where they end is not recorded, hence
    one percent of room. (Order-0 entropy of this text is near 4.7.)"""
    model: Any = statewise.load(shared / "weights" / "rwkv_cpp_tiny" / f"{TINY['rwkv6']}.safetensors")
    text = (shared / "data" / "text" / "wikitext2_test.txt").read_bytes()[:4096]
    ids = torch.tensor([unit for byte in text for unit in (byte, 0)])[None]
    logits, _ = model(ids[:, :-1])
    nats = nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum")
    assert float(nats) / math.log(2) / (len(text) - 1) == pytest.approx(3.3674, rel=0.01)


@pytest.fixture(name="reverser")
def _reverser(shared: Path) -> Any:
    """Two RWKV-7 blocks that are ours, in a residual stream that is not: no ``ln0``, and a constant a block."""
    folder = shared / "weights" / "rwkv7_reverse"
    theirs = load_file(folder / "260123_reverse_L2_only_rwkv7.rosa_bias_only.safetensors")
    ranks = dict.fromkeys(("decay_rank", "iclr_rank", "value_rank", "gate_rank"), 8)
    model: Any = statewise.create("rwkv7", vocab_size=12, num_layers=2, width=32, head_size=16, ffn_width=128, **ranks)
    parts = {"att": "rwkv{}.", "ffn": "ffn{}.", "ln1": "ln{}a.", "ln2": "ln{}b."}
    tensors = {"emb.weight": theirs["e.weight"], "head.weight": theirs["o.weight"]}
    tensors |= {f"ln_out.{name}": theirs[f"lno.{name}"] for name in ("weight", "bias")}
    for block in (0, 1):
        for ours, prefix in parts.items():
            start = prefix.format(block + 1)
            tensors |= {
                f"blocks.{block}.{ours}.{name.removeprefix(start)}": tensor
                for name, tensor in theirs.items()
                if name.startswith(start)
            }
    own = model.state_dict()
    assert set(own) - set(tensors) == {"blocks.0.ln0.weight", "blocks.0.ln0.bias"}
    model.load_state_dict({name: tensors.get(name, own[name]) for name in own})
    model.blocks[0].ln0 = nn.Identity()
    for block in (0, 1):
        constant = theirs[f"rosa{block + 1}.o.bias"]
        model.blocks[block].att.register_forward_hook(
            lambda _, __, result, constant=constant: (result[0] + constant, *result[1:])
        )
    model.head.register_forward_hook(lambda _, __, logits: logits + theirs["o.bias"])
    return model


@torch.no_grad()
def test_numbers_come_out_reversed(reverser: Any, shared: Path) -> None:
    golden = load_file(shared / "weights" / "rwkv7_reverse" / "golden.safetensors")
    ids, want = golden["ids"], golden["logits"]
    logits, _ = reverser(ids[:, :-1])
    assert float((logits - want).abs().max()) <= 1e-4 * float(want.abs().max())
    # "123,321###": what follows the comma is told by what stands before it.
    right = total = 0
    for row, guessed in zip(ids.tolist(), logits.argmax(-1).tolist(), strict=True):
        start = row.index(10)
        for token, guess in zip(row[start + 1 :], guessed[start:], strict=True):
            if token < 10:
                right, total = right + (token == guess), total + 1
    assert total > 0
    assert right == total
