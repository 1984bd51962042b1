"""RWKV-7: the published package's logits and states, the published trainer's gradients, its initialisation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from statewise.models.rwkv7 import RWKV7, RWKV7Config
from statewise.state import ModelState, RWKV7LayerState

UNUSED = {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


def largest(x: Tensor, y: Tensor) -> float:
    return float((x.detach().double() - y.double()).abs().max())


def published(shared: Path, dtype: torch.dtype) -> RWKV7:
    tensors: dict[str, Tensor] = torch.load(shared / "golden/rwkv/v7_a.pth", weights_only=True)
    model = RWKV7(RWKV7Config(vocab_size=128, num_layers=3, width=64, head_size=32)).to(dtype)
    model.load_state_dict({name: t.to(dtype) for name, t in tensors.items() if name not in UNUSED}, strict=True)
    return model


def small(**fields: Any) -> RWKV7:
    """A model none of whose branches is switched off."""
    sizes = {"vocab_size": 31, "num_layers": 3, "width": 32, "head_size": 16}
    model = RWKV7(RWKV7Config(**(sizes | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_package(shared: Path, dtype: torch.dtype) -> None:
    golden = load_file(shared / "golden/rwkv/v7_a.pip.safetensors")
    model = published(shared, dtype)

    def hold(logits: Tensor, state: ModelState, name: str) -> None:
        assert largest(logits[0], golden[f"logits_{name}"]) <= 5e-5
        for got, (layer, slot) in zip(
            state.to_layout("rwkv-pip"), [(i, j) for i in range(3) for j in range(3)], strict=True
        ):
            assert largest(got, golden[f"state_{name}.{layer}.{slot}"]) <= 1e-4

    def stepwise(ids: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        outputs = []
        for token in ids.unbind(1):
            logits, state = model.step(token, state)
            outputs.append(logits)
        return torch.stack(outputs, 1), state

    prompt, chunk, singles = (golden[name].long()[None] for name in ("prompt", "chunk2", "singles"))
    logits, state = model(prompt)
    hold(logits, state, "prompt")
    logits, stepped = stepwise(prompt, model.init_state(1))
    assert largest(logits[0], golden["logits_stepwise"]) <= 5e-5
    hold(logits, stepped, "prompt")
    logits, state = model(chunk, state)
    hold(logits, state, "chunk2")
    hold(*stepwise(singles, state), "singles")
    hold(*model(singles, state), "singles")


@pytest.mark.parametrize(
    ("dtype", "logit_bound", "gradient_bound"), [(torch.float32, 5e-5, 1e-4), (torch.float64, 1e-6, 5e-7)]
)
def test_training_step(shared: Path, dtype: torch.dtype, logit_bound: float, gradient_bound: float) -> None:
    golden = load_file(shared / "golden/rwkv/v7_a.train.safetensors")
    model = published(shared, dtype)
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


def test_trained_model(shared: Path) -> None:
    """BlinkDL's digit reverser: trained weights, so decays, gates and removals at the sizes training leads to.

    It differs from RWKV-7 by a constant added after each `att`, a bias on the head, and no `ln0`.
    """
    folder = shared / "weights/rwkv7_reverse"
    published = load_file(folder / "260123_reverse_L2_only_rwkv7.rosa_bias_only.safetensors")
    golden = load_file(folder / "golden.safetensors")
    ranks = {f"{name}_rank": 8 for name in ("decay", "iclr", "value", "gate")}
    model = RWKV7(RWKV7Config(vocab_size=12, num_layers=2, width=32, head_size=16, **ranks)).double()
    model.blocks[0].ln0 = torch.nn.Identity()
    parts = {"rwkv{}": "att", "ffn{}": "ffn", "ln{}a": "ln1", "ln{}b": "ln2"}
    names = {"e": "emb", "lno": "ln_out", "o": "head"} | {
        theirs.format(i + 1): f"blocks.{i}.{ours}" for theirs, ours in parts.items() for i in range(2)
    }
    own = {}
    for key, tensor in published.items():
        module, _, rest = key.partition(".")
        if module in names and f"{names[module]}.{rest}" not in (UNUSED | {"head.bias"}):
            own[f"{names[module]}.{rest}"] = tensor.double()
    model.load_state_dict(own, strict=True)
    for index, block in enumerate(model.blocks):
        bias = published[f"rosa{index + 1}.o.bias"].double()
        block.att.register_forward_hook(lambda _m, _i, out, bias=bias: (out[0] + bias, *out[1:]))
    with torch.no_grad():
        logits = model(golden["ids"][:, :-1])[0] + published["o.bias"]
    # Logits reach 41, and float32 alone moves them by 3e-4 (7e-6 of that): a float32 golden cannot be met closer.
    assert largest(logits, golden["logits"]) <= 1e-5 * float(golden["logits"].abs().max())
    assert torch.equal(logits.argmax(-1), golden["logits"].argmax(-1))


def test_names_are_the_published_ones(shared: Path) -> None:
    tensors = torch.load(shared / "golden/rwkv/v7_a.pth", weights_only=True)
    own = published(shared, torch.float32).state_dict()
    assert set(own) == set(tensors) - UNUSED
    assert all(own[name].shape == tensors[name].shape for name in own)


@pytest.mark.parametrize(
    ("width", "ranks"), [(768, (64, 64, 32, 128)), (2048, (96, 96, 64, 256)), (64, (32, 32, 32, 32))]
)
def test_ranks_of_released_sizes(width: int, ranks: tuple[int, ...]) -> None:
    config = RWKV7Config(vocab_size=2, num_layers=1, width=width)
    assert tuple(config.rank(name) for name in ("decay", "iclr", "value", "gate")) == ranks


def test_given_sizes_are_taken() -> None:
    model = small(ffn_width=40, decay_rank=3, iclr_rank=4, value_rank=5, gate_rank=6)
    att, ffn = model.blocks[1].att, model.blocks[1].ffn
    assert [att.w1.shape[1], att.a1.shape[1], att.v1.shape[1], att.g1.shape[1]] == [3, 4, 5, 6]
    assert att.g2.shape == (6, 32)
    assert ffn.key.weight.shape == (40, 32)


def test_initialisation() -> None:
    """Spot values worked out from the published formulas: C = 8, N = 4, layer 1 of 2."""
    model = RWKV7(RWKV7Config(vocab_size=20, num_layers=2, width=8, head_size=4))
    first, second = model.blocks[0].att, model.blocks[1].att
    # channel 5: q = 5/8, ramp = 5/7, zigzag = -(1/3)² (n mod 4 = 1); rising = 1, falling = 1/2
    at = {
        name: float(getattr(second, name).detach()[0, 0, 5]) for name in ("x_r", "x_w", "x_k", "w0", "a0", "k_k", "v0")
    }
    assert at["x_r"] == pytest.approx(1 - 0.625**0.1)
    assert at["x_w"] == pytest.approx(1 - 0.625**0.45)
    assert at["x_k"] == pytest.approx(1 - 0.625**0.35)
    assert at["w0"] == pytest.approx(-5.5 + 6 * (5 / 7) ** 2 - 2.5 / 9)
    assert at["a0"] == pytest.approx(-0.19 - 0.3 / 9 + 0.4 * (5 / 7 - 0.5))
    assert at["k_k"] == pytest.approx(0.71 - 0.1 * (5 / 7 - 0.5))
    assert at["v0"] == pytest.approx(0.73 - 0.4 * (5 / 7 - 0.5))
    assert float(model.blocks[1].ffn.x_k.detach()[0, 0, 5]) == pytest.approx(1 - 0.625 ** (0.5**4))
    assert float(first.w0.detach()[0, 0, 5]) == pytest.approx(-5.5 + 6 * (5 / 7) - 2.5 / 9)
    assert first.ln_x.weight.detach().tolist() == pytest.approx([0.5**0.7] * 8)
    assert second.ln_x.weight.detach().tolist() == pytest.approx([1.0] * 8)
    eye = torch.eye(8)
    torch.testing.assert_close(second.receptance.weight @ second.receptance.weight.T, eye)
    torch.testing.assert_close(second.key.weight @ second.key.weight.T, 0.01 * eye)
    torch.testing.assert_close(model.blocks[0].ffn.key.weight.T @ model.blocks[0].ffn.key.weight, eye)
    torch.testing.assert_close(second.w2.T @ second.w2, 0.01 * (32 / 8) * eye)
    torch.testing.assert_close(model.head.weight.T @ model.head.weight, 0.25 * (20 / 8) * eye)
    zeros = (second.output.weight, second.w1, second.a1, second.v1, second.g1, model.blocks[1].ffn.value.weight)
    assert all(not tensor.any() for tensor in zeros)
    assert float(model.emb.weight.detach().abs().max()) <= 1e-4
    assert torch.equal(second.r_k, torch.full((2, 4), -0.04))
    assert torch.equal(second.k_a, torch.full((1, 1, 8), 1.02))


def test_one_layer_starts_finite() -> None:
    model = RWKV7(RWKV7Config(vocab_size=5, num_layers=1, width=4, head_size=1))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    logits, _ = model(torch.tensor([[1, 2, 3]]))
    assert torch.isfinite(logits).all()


def test_optimiser_groups() -> None:
    model = small()
    groups = model.parameter_groups(0.1)
    by_name = {name: group for group in groups for name in group["names"]}
    assert by_name["blocks.1.att.w0"]["lr_scale"] == 2.0
    assert {group["lr_scale"] for name, group in by_name.items() if not name.endswith("att.w0")} == {1.0}
    decayed = {name for name, group in by_name.items() if group["weight_decay"] == 0.1}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    matrices = ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    expected = {f"blocks.{i}.{m}.weight" for i in range(3) for m in matrices} | {"emb.weight", "head.weight"}
    assert decayed == expected


def test_forms_agree_under_padding_and_packing() -> None:
    model = small().double()
    ids = torch.randint(0, 31, (3, 19))
    lengths = torch.tensor([19, 0, 7])
    ids = torch.where(torch.arange(19) < lengths[:, None], ids, 10**9)
    padded, state = model(ids, lengths=lengths)
    packed = torch.cat([row[:n] for row, n in zip(ids, lengths.tolist(), strict=True)])[None]
    logits, ends = model(packed, cu_seqlens=torch.tensor([0, 19, 19, 26]))
    torch.testing.assert_close(logits[0], torch.cat([padded[0], padded[2, :7]]), rtol=1e-10, atol=1e-10)
    step_state = model.init_state(1)
    for token in ids[2, :7]:
        y, step_state = model.step(token[None], step_state)
    torch.testing.assert_close(y[0], padded[2, 6], rtol=1e-10, atol=1e-10)
    for layer in range(3):
        for got, other, stepped in zip(state.layers[layer], ends.layers[layer], step_state.layers[layer], strict=True):
            torch.testing.assert_close(got, other, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(got[2:], stepped, rtol=1e-10, atol=1e-10)
            assert not got[1].any()


@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_half_precision(how: str) -> None:
    model = small()
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
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())


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
    model = small().eval()
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


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="width 40 is not a multiple of head_size 64"):
        RWKV7Config(vocab_size=5, num_layers=1, width=40)
    for wrong in (0, -1, 1.5, True, "4"):
        with pytest.raises(ValueError, match="num_layers"):
            RWKV7Config(vocab_size=5, num_layers=wrong, width=64)  # type: ignore[arg-type]
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
    with pytest.raises(ValueError, match="3 RWKV7LayerState"):
        model(torch.tensor([[1]]), ModelState(model.init_state(1).layers[:2]))
    with pytest.raises(ValueError, match="state has shape"):
        model(torch.tensor([[1]]), model.init_state(2))
    with pytest.raises(ValueError, match="3 RWKV7LayerState"):
        model(torch.tensor([[1]]), [RWKV7LayerState(*layer) for layer in model.init_state(1).layers])
    assert math.isfinite(float(model(torch.tensor([[30]]))[0].sum().detach()))
