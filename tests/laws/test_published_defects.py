"""What published packages get wrong, one test a defect: what the user saw there must not be seen here.

Each docstring says where the defect was met and what it cost (largest error of a logit, small random models). That a
package of today still has it, so that these checks can fail, is shown in tests/parity/test_parity_defects.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statewise
from statewise.ops import wkv7

SIZES: dict[str, dict[str, Any]] = {
    "rwkv4": {"width": 32},
    "rwkv5": {"width": 32, "head_size": 8},
    "rwkv6": {"width": 32, "head_size": 8},
    "rwkv7": {"width": 32, "head_size": 8},
    "mamba": {"width": 24, "bias": True},
    "mamba2": {"width": 32, "head_size": 8, "state_size": 8},
    "mamba3": {"width": 32, "head_size": 8, "state_size": 8},
}
VOCAB = 50


def made(name: str, **fields: Any) -> Any:
    torch.manual_seed(3)
    model = statewise.create(name, vocab_size=VOCAB, num_layers=3, **SIZES[name], **fields).double()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts as zero must count too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ids(batch: int, time: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(batch * 100 + time))


def same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= 1e-10 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("name", sorted(SIZES))
@torch.no_grad()
def test_a_second_chunk_continues_from_the_first(name: str) -> None:
    """transformers 5.23, Mamba and FalconMamba: the second chunk drops the SSM state (2.38, 1.38)."""
    model, tokens = made(name), ids(2, 21)
    whole, _ = model(tokens)
    _, state = model(tokens[:, :9])
    second, state = model(tokens[:, 9:18], state)
    third, _ = model(tokens[:, 18:], state)
    same(torch.cat((second, third), dim=1), whole[:, 9:])


@pytest.mark.parametrize("name", sorted(SIZES))
@torch.no_grad()
def test_a_step_after_a_right_padded_prompt(name: str) -> None:
    """transformers 5.23, Mamba and Mamba-2: padding runs through the state (10.3, 12.5), biases leak (0.2)."""
    model, tokens, lengths = made(name), ids(3, 13), torch.tensor([13, 5, 1])
    _, state = model(tokens, lengths=lengths)
    after, _ = model.step(ids(3, 1)[:, 0], state)
    for row, length in enumerate(lengths.tolist()):
        _, alone = model(tokens[row : row + 1, :length])
        want, _ = model.step(ids(3, 1)[row], alone)
        same(after[row : row + 1], want)


@pytest.mark.parametrize("limit", [(0.05, 0.2), (0.0, 0.1)])
@torch.no_grad()
def test_a_limit_on_dt_holds_in_a_step(limit: tuple[float, float]) -> None:
    """transformers 5.23 and state-spaces, Mamba-2: ``step`` ignores ``dt_limit`` (0.68, 1.39)."""
    model, tokens = made("mamba2", dt_limit=limit), ids(2, 11)
    whole, _ = model(tokens)
    unlimited, _ = made("mamba2")(tokens)
    assert float((whole - unlimited).abs().max()) > 1e-3, "a limit that never bites tests nothing"
    state = model.init_state(2)
    for time in range(11):
        logits, state = model.step(tokens[:, time], state)
        same(logits, whole[:, time])


@torch.no_grad()
def test_one_token_for_a_batch_of_rwkv4() -> None:
    """transformers 5.23, RWKV-4: one token for two rows gives ``(2, 2, vocab)``, the second row wrong (0.27)."""
    model, tokens = made("rwkv4"), ids(4, 8)
    whole, _ = model(tokens)
    _, state = model(tokens[:, :7])
    got, _ = model(tokens[:, 7:], state)
    same(got, whole[:, 7:])
    stepped, _ = model.step(tokens[:, 7], state)
    same(stepped, whole[:, 7])


@pytest.mark.parametrize("name", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
@torch.no_grad()
def test_a_bfloat16_file_run_in_float32(tmp_path: Path, name: str) -> None:
    """The rwkv package, RWKV-4 to 6: ``ln0(emb)`` is worked out in the file's bfloat16 (0.009 to 0.015)."""
    model = made(name).to(torch.bfloat16)
    statewise.save(model, tmp_path / "model.pth", format="rwkv")
    loaded: Any = statewise.load(tmp_path / "model.pth", dtype=torch.float32)
    exact: Any = statewise.load(tmp_path / "model.pth", dtype=torch.float64)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    tokens = ids(1, 12)
    got, want = loaded(tokens)[0].double(), exact(tokens)[0]
    assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", sorted(SIZES))
@torch.no_grad()
def test_a_callers_state_is_left_alone(name: str) -> None:
    """The rwkv package (4 to 6), transformers' RWKV-4 and every Mamba cache: the state passed in is overwritten."""
    model = made(name)
    _, state = model(ids(2, 5))
    kept = state.clone()
    model(ids(2, 6), state)
    model(ids(2, 6), state, lengths=torch.tensor([6, 2]))
    model.step(ids(2, 1)[:, 0], state)
    if name != "mamba3":
        state.to_layout("mamba-ssm" if name.startswith("mamba") else "rwkv-lm")
    for now, before in zip(torch.utils._pytree.tree_leaves(state), torch.utils._pytree.tree_leaves(kept), strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize(
    ("name", "layout", "turned"),
    [
        ("rwkv5", "rwkv-pip", False),
        ("rwkv5", "rwkv-lm", True),
        ("rwkv6", "rwkv-pip", False),
        ("rwkv6", "rwkv-lm", True),
        ("rwkv6", "fla", False),
        ("rwkv6", "ggml", False),
        ("rwkv7", "rwkv-pip", True),
        ("rwkv7", "rwkv-lm", True),
        ("rwkv7", "fla", False),
        ("rwkv7", "ggml", True),
    ],
)
@torch.no_grad()
def test_a_square_state_is_turned_by_name(name: str, layout: str, turned: bool) -> None:
    """fla against RWKV-LM, pip and ggml changing sides between 6 and 7: read as it lies, a fifth of y is wrong."""
    model, token = made(name), ids(1, 1)[:, 0]
    _, state = model(ids(1, 9))
    wkv = state.layers[1].wkv
    assert not torch.allclose(wkv, wkv.mT, atol=1e-3), "a symmetric state tests nothing"
    flat = state.to_layout(layout)
    want, _ = model.step(token, state)
    got, _ = model.step(token, model.init_state(1).from_layout(layout, flat))
    same(got, want)
    # What that project holds: [K, V] or [V, K], told apart by its contents.
    held = next(part for part in flat if part.numel() == wkv.numel() and part.shape[-2:] == wkv.shape[-2:])
    first = state.layers[0].wkv.reshape(held.shape)
    assert torch.equal(held.to(first.dtype), first.mT if turned else first)


@torch.no_grad()
def test_wkv7_reads_its_state_as_it_says() -> None:
    """The same, at the operator and with K different from V, where the wrong way round cannot pass."""
    torch.manual_seed(0)
    r, log_w, k, a, b = torch.randn(5, 1, 1, 2, 3, dtype=torch.float64)
    v, begin = torch.randn(1, 1, 2, 4, dtype=torch.float64), torch.randn(1, 2, 3, 4, dtype=torch.float64)
    y, _ = wkv7(r, -log_w.exp(), k, v, a, b, begin)
    step = torch.diag_embed((-log_w.exp()).exp()[0, 0]) + b[0, 0].unsqueeze(-1) * a[0, 0].unsqueeze(-2)
    after = step @ begin[0] + k[0, 0].unsqueeze(-1) * v[0, 0].unsqueeze(-2)
    same(y[0, 0], (after.mT @ r[0, 0].unsqueeze(-1)).squeeze(-1))


@torch.no_grad()
def test_mamba3_steps_as_it_reads() -> None:
    """state-spaces at its head, Mamba-3: ``step`` differs from ``forward`` and from itself (#1024)."""
    model, tokens = made("mamba3"), ids(2, 10)
    whole, _ = model(tokens)
    for _ in range(2):
        state = model.init_state(2)
        for time in range(10):
            logits, state = model.step(tokens[:, time], state)
            same(logits, whole[:, time])


@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_state_carries_gradients(name: str) -> None:
    """state-spaces: "gradient of last_state not implemented"; here a prompt learns through the state it leaves."""
    model = made(name)
    _, state = model(ids(1, 4))
    logits, _ = model(ids(1, 5), state)
    prompt_embedding = model.get_parameter("emb.weight" if name.startswith("rwkv") else "backbone.embedding.weight")
    (grad,) = torch.autograd.grad(logits.logsumexp(-1).sum(), prompt_embedding)
    only_in_prompt = sorted(set(ids(1, 4)[0].tolist()) - set(ids(1, 5)[0].tolist()))
    assert only_in_prompt, "the second part repeats the first: nothing would come through the state alone"
    assert float(grad[only_in_prompt].abs().max()) > 1e-6


@pytest.mark.parametrize("name", sorted(SIZES))
def test_bfloat16_runs_whole_and_by_steps(name: str) -> None:
    """mambapy 1.2.0: half precision raises dtype errors in ``forward`` and ``step`` alike."""
    model, tokens = made(name).to(torch.bfloat16), ids(2, 6)
    whole, _ = model(tokens)
    whole.float().square().mean().backward()
    state = model.init_state(2)
    with torch.no_grad():
        for time in range(6):
            logits, state = model.step(tokens[:, time], state)
    assert whole.dtype == logits.dtype == torch.bfloat16
    assert float((logits - whole[:, -1]).abs().max()) <= 0.06 * float(whole.abs().max())


@pytest.mark.parametrize("name", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_one_layer_starts(name: str) -> None:
    """RWKV-LM: every initialisation divides by ``num_layers - 1``."""
    model = statewise.create(name, vocab_size=VOCAB, num_layers=1, **SIZES[name])
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_mamba_starts_with_its_own_steps_in_time() -> None:
    """mambapy 1.2.0: the language model zeroes ``dt_proj.bias``, so dt starts at 0.69 instead of 0.001 to 0.1."""
    model = statewise.create("mamba", vocab_size=VOCAB, num_layers=2, width=64)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_proj.bias"):
            dt = torch.nn.functional.softplus(parameter.detach())
            assert bool(((dt >= 9e-5) & (dt <= 0.11)).all())
