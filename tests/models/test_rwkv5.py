"""RWKV-5: the published package's logits and states, the published trainer's gradients, its initialisation."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from statewise.models.rwkv5 import RWKV5, RWKV5Config
from statewise.state import ModelState, RWKV5LayerState, RWKV7LayerState

GOLDENS = {"5.0": "v50_a", "5.1": "v51_a", "5.2": "v52_a"}
every_version = pytest.mark.parametrize("version", sorted(GOLDENS))


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


def largest(x: Tensor, y: Tensor) -> float:
    return float((x.detach().double() - y.double()).abs().max())


def same(one: tuple[Tensor, ModelState], other: tuple[Tensor, ModelState], limit: float = 1e-10) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=limit, atol=limit)
    for layer, twin in zip(one[1].layers, other[1].layers, strict=True):
        for leaf, match in zip(layer, twin, strict=True):
            torch.testing.assert_close(leaf, match, rtol=limit, atol=limit)


def stepwise(model: RWKV5, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
    outputs = []
    for token in ids.unbind(1):
        logits, state = model.step(token, state)
        outputs.append(logits)
    return torch.stack(outputs, 1), state


def published(shared: Path, version: str, dtype: torch.dtype) -> RWKV5:
    tensors: dict[str, Tensor] = torch.load(shared / f"golden/rwkv/{GOLDENS[version]}.pth", weights_only=True)
    width, head_size = (64, 32) if version == "5.2" else (32, 16)
    sizes = {"width": width, "head_size": head_size, "ffn_width": 7 * width // 2}
    model = RWKV5(RWKV5Config(vocab_size=128, num_layers=2, version=version, **sizes)).to(dtype)
    model.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, strict=True)
    return model


def small(version: str = "5.2", **fields: Any) -> RWKV5:
    """A model none of whose branches is switched off."""
    sizes = {"vocab_size": 31, "num_layers": 3, "width": 32, "head_size": 16, "version": version}
    model = RWKV5(RWKV5Config(**(sizes | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def hold(golden: dict[str, Tensor], name: str, logits: Tensor, state: ModelState) -> None:
    assert largest(logits[0], golden[f"logits_{name}"]) <= 5e-5
    slots = [(i, j) for i in range(len(state.layers)) for j in range(3)]
    for got, (layer, slot) in zip(state.to_layout("rwkv-pip"), slots, strict=True):
        assert largest(got, golden[f"state_{name}.{layer}.{slot}"]) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_version
def test_recurrent_package(shared: Path, version: str, dtype: torch.dtype) -> None:
    golden = load_file(shared / f"golden/rwkv/{GOLDENS[version]}.pip.safetensors")
    model = published(shared, version, dtype)
    prompt, chunk = (golden[name].long()[None] for name in ("prompt", "chunk2"))
    logits, state = model(prompt)
    hold(golden, "prompt", logits, state)
    logits, stepped = stepwise(model, prompt, model.init_state(1))
    assert largest(logits[0], golden["logits_stepwise"]) <= 5e-5
    hold(golden, "prompt", logits, stepped)
    hold(golden, "chunk2", *stepwise(model, chunk, state))
    logits, state = model(chunk, state)
    hold(golden, "chunk2", logits, state)
    if version == "5.2":
        singles = golden["singles"].long()[None]
        hold(golden, "singles", *stepwise(model, singles, state))
        hold(golden, "singles", *model(singles, state))


@pytest.mark.parametrize(
    ("dtype", "logit_bound", "gradient_bound"), [(torch.float32, 5e-5, 1e-4), (torch.float64, 1e-6, 5e-7)]
)
def test_training_step(shared: Path, dtype: torch.dtype, logit_bound: float, gradient_bound: float) -> None:
    golden = load_file(shared / "golden/rwkv/v52_a.train.safetensors")
    model = published(shared, "5.2", dtype)
    logits, _ = model(golden["idx"].long())
    loss = F.cross_entropy(logits.flatten(0, 1), golden["targets"].long().flatten())
    assert abs(float(loss.detach()) - float(golden["loss"])) <= (2e-6 if dtype == torch.float32 else 1e-12)
    assert largest(logits, golden["logits"]) <= logit_bound
    # L2Wrap: each position's largest logit is pulled towards zero.
    top, where = logits.detach().max(-1, keepdim=True)
    wrap = torch.zeros_like(logits).scatter(-1, where, top * 1e-4 / where.numel())
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad([loss, logits], list(model.parameters()), [torch.ones_like(loss), wrap])
    assert {f"grad.{name}" for name in names} == {name for name in golden if name.startswith("grad.")}
    for name, gradient in zip(names, found, strict=True):
        assert relative(gradient, golden[f"grad.{name}"]) <= gradient_bound, name


@every_version
def test_names_are_the_published_ones(shared: Path, version: str) -> None:
    tensors = torch.load(shared / f"golden/rwkv/{GOLDENS[version]}.pth", weights_only=True)
    own = published(shared, version, torch.float32).state_dict()
    assert {name: t.shape for name, t in own.items()} == {name: t.shape for name, t in tensors.items()}


def test_given_sizes_are_taken() -> None:
    assert small(ffn_width=40).blocks[1].ffn.key.weight.shape == (40, 32)
    assert small(width=48).blocks[1].ffn.key.weight.shape == (160, 48)  # 3.5 · 48 = 168


@every_version
def test_initialisation(version: str) -> None:
    """Spot values worked out from the published formulas: C = 8, N = 4, layer 1 of 2."""
    model = RWKV5(RWKV5Config(vocab_size=20, num_layers=2, width=8, head_size=4, version=version))
    first, second, ffn = model.blocks[0].att, model.blocks[1].att, model.blocks[1].ffn
    # channel 5: q = 5/8, ramp = 5/7; rising = 1, falling = 1/2
    at = {name: float(p.detach()[0, 0, 5]) for name, p in second.named_parameters() if name.startswith("time_mix")}
    assert at["time_mix_k"] == pytest.approx(0.625**0.5)
    assert at["time_mix_v"] == pytest.approx(0.625**0.5 + 0.3)
    assert at["time_mix_r"] == pytest.approx(0.625**0.25)
    assert float(ffn.time_mix_k.detach()[0, 0, 5]) == pytest.approx(0.625**0.5)
    assert float(ffn.time_mix_r.detach()[0, 0, 5]) == pytest.approx(0.625**0.5)
    if version == "5.2":
        assert float(second.time_decay.detach()[1, 1]) == pytest.approx(-6 + 5 * (5 / 7) ** 2)
        assert float(first.time_decay.detach()[1, 1]) == pytest.approx(-6 + 5 * (5 / 7) ** 0.7)
        assert float(second.time_faaaa.detach()[1, 1]) == pytest.approx(2 / 7 - 0.1)  # (5 + 1) % 3 - 1 = -1
    else:
        assert second.time_decay.tolist() == [-6, -1]
    if version == "5.1":
        assert second.time_faaaa.tolist() == [1, 0]
        assert first.time_faaaa.tolist() == [0, 0]
    if version == "5.0":
        assert second.time_first.tolist() == [-3, -3]
        assert "time_mix_g" not in at
    eye = torch.eye(8)
    if version != "5.0":
        assert at["time_mix_g"] == pytest.approx(0.625**0.25)
        torch.testing.assert_close(second.gate.weight @ second.gate.weight.T, 0.01 * eye)
    assert first.ln_x.weight.detach().tolist() == pytest.approx([0.5**0.7] * 8)
    torch.testing.assert_close(second.receptance.weight @ second.receptance.weight.T, eye)
    torch.testing.assert_close(second.value.weight @ second.value.weight.T, eye)
    torch.testing.assert_close(second.key.weight @ second.key.weight.T, 0.01 * eye)
    torch.testing.assert_close(ffn.key.weight.T @ ffn.key.weight, eye)
    torch.testing.assert_close(model.head.weight.T @ model.head.weight, 0.25 * (20 / 8) * eye)
    assert not any(m.weight.any() for m in (second.output, ffn.value, ffn.receptance))
    assert float(model.emb.weight.detach().abs().max()) <= 1e-4


@every_version
def test_optimiser_groups(version: str) -> None:
    model = small(version)
    groups = model.parameter_groups(0.1)
    by_name = {name: group for group in groups for name in group["names"]}
    scaled = {name.rpartition(".")[2]: g["lr_scale"] for name, g in by_name.items() if g["lr_scale"] != 1}
    assert scaled == ({"time_decay": 2.0, "time_first": 3.0} if version == "5.0" else {"time_decay": 2.0})
    decayed = {name for name, group in by_name.items() if group["weight_decay"] == 0.1}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert decayed == {
        f"{name}.weight" for name, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() > 1
    }


@every_version
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 40), max_size=4))
def test_any_split_is_the_whole(version: str, seed: int, cuts: list[int]) -> None:
    torch.manual_seed(seed)
    model = small(version, num_layers=2).double()
    ids = torch.randint(0, 31, (2, 40))
    edges = [0, *sorted(cuts), 40]
    outputs, state = [], None
    for a, b in itertools.pairwise(edges):
        logits, state = model(ids[:, a:b], state)
        outputs.append(logits)
    assert state is not None
    whole = model(ids)
    same((torch.cat(outputs, 1), state), whole)
    same(stepwise(model, ids, model.init_state(2)), whole)


@every_version
def test_forms_agree_under_padding_and_packing(version: str) -> None:
    model = small(version).double()
    _, begin = model(torch.randint(0, 31, (3, 5)))
    ids = torch.randint(0, 31, (3, 19))
    lengths = torch.tensor([19, 0, 7])
    ids = torch.where(torch.arange(19) < lengths[:, None], ids, 10**9)
    padded, state = model(ids, begin, lengths=lengths)
    packed = torch.cat([row[:n] for row, n in zip(ids, lengths.tolist(), strict=True)])[None]
    logits, ends = model(packed, begin, cu_seqlens=torch.tensor([0, 19, 19, 26]))
    same((logits[0], ends), (torch.cat([padded[0], padded[2, :7]]), state))
    for row, length in ((0, 19), (2, 7)):
        alone = stepwise(model, ids[row : row + 1, :length], begin.select([row]))
        same((padded[row : row + 1, :length], state.select([row])), alone)
    same((padded[:0], state.select([1])), (padded[:0], begin.select([1])), 0.0)


@every_version
def test_gradients_are_those_of_single_steps(version: str) -> None:
    model = small(version).double()
    ids = torch.randint(0, 31, (2, 18))
    weight = torch.randn(2, 18, 31, dtype=torch.float64)
    begin = model(torch.randint(0, 31, (2, 5)))[1].map(lambda leaf: leaf.detach().requires_grad_())
    inputs = [*model.parameters(), *(leaf for layer in begin.layers for leaf in layer)]

    def gradients(logits: Tensor, state: ModelState) -> list[Tensor]:
        loss = (logits * weight).sum() + sum(leaf.square().sum() for layer in state.layers for leaf in layer)
        return list(torch.autograd.grad(loss, inputs))

    whole = gradients(*model(ids, begin))
    for gradient, stepped in zip(whole, gradients(*stepwise(model, ids, begin)), strict=True):
        assert gradient.any()
        assert relative(gradient, stepped) <= 1e-10


@pytest.mark.parametrize("how", ["autocast", "cast"])
@every_version
def test_half_precision(version: str, how: str) -> None:
    model = small(version)
    ids = torch.randint(0, 31, (2, 20))
    want, _ = model(ids)
    if how == "cast":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits, state = model(ids)
        logits.float().square().mean().backward()
        stepped, after = model.step(ids[:, 0], state)
    assert logits.dtype == stepped.dtype == torch.bfloat16
    assert relative(logits, want) <= 0.03
    for layer in (*state.layers, *after.layers, *model.init_state(2).layers):
        assert all(leaf.dtype == torch.float32 for leaf in layer)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_checkpointing_recomputes_and_changes_nothing() -> None:
    model = small().double()
    ids = torch.randint(0, 31, (2, 9))

    def gradients() -> list[Tensor]:
        logits, state = model(ids)
        loss = logits.square().sum() + sum(layer.wkv.sum() for layer in state.layers)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    plain = gradients()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.blocks[1].register_forward_pre_hook(count)
    model.set_grad_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert calls == 2


def test_projections_are_called_as_modules() -> None:
    model = small()
    seen: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: seen.add(name))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    model(torch.tensor([[1, 2]]))
    assert seen == linear
    seen.clear()
    model.step(torch.tensor([1]), model.init_state(1))
    assert seen == linear


def test_step_compiles_and_exports() -> None:
    model = small(num_layers=2).eval()
    state = model.init_state(2)
    token = torch.tensor([3, 4])
    want = model.step(token, state)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token, state)[0], want)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
            return self.model.step(token, state)

    exported = torch.export.export(Step(), (token, state)).module()
    torch.testing.assert_close(exported(token, state)[0], want)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, lengths = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([3, 1])
    torch.testing.assert_close(whole(ids, lengths=lengths)[0][0], model(ids, lengths=lengths)[0][0])


def test_one_layer_of_one_head_starts_finite() -> None:
    for version in GOLDENS:
        model = RWKV5(RWKV5Config(vocab_size=5, num_layers=1, width=4, head_size=4, version=version))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        logits, _ = model(torch.tensor([[1, 2, 3]]))
        assert torch.isfinite(logits).all()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="width 40 is not a multiple of head_size 64"):
        RWKV5Config(vocab_size=5, num_layers=1, width=40)
    for wrong in (0, -1, 1.5, True, "4", None):
        with pytest.raises(ValueError, match="num_layers"):
            RWKV5Config(vocab_size=5, num_layers=wrong, width=64)  # type: ignore[arg-type]
    for wrong in ("5", 5.2, "6.0"):
        with pytest.raises(ValueError, match="version"):
            RWKV5Config(vocab_size=5, num_layers=1, width=64, version=wrong)  # type: ignore[arg-type]
    model = small()
    for bad, name in ((torch.tensor([[1, 31]]), "31"), (torch.tensor([[-1, 3]]), "-1")):
        with pytest.raises(ValueError, match=rf"token {name} is outside the vocabulary; accepted are 0\.\.30"):
            model(bad)
    with pytest.raises(ValueError, match="dtype"):
        model(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"accepted is \(B, T\)"):
        model(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"accepted is \(B,\)"):
        model.step(torch.tensor([[1]]), model.init_state(1))
    with pytest.raises(ValueError, match="state has shape"):
        model(torch.tensor([[1]]), model.init_state(2))
    layers = model.init_state(1).layers
    for other in (ModelState(layers[:2]), list(layers), ModelState(tuple(RWKV7LayerState(*x) for x in layers))):
        with pytest.raises(ValueError, match="3 RWKV5LayerState"):
            model(torch.tensor([[1]]), other)
    assert all(isinstance(layer, RWKV5LayerState) for layer in model(torch.tensor([[30]]))[1].layers)
