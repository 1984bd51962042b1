"""mamba3: the published package's blocks and models, equal forms, the official start, files both ways."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from statewise.models.mamba3 import Mamba3, Mamba3Config, Mamba3Mixer
from statewise.ops import mamba3
from statewise.state import Mamba3State, ModelState
from statewise.weights import mamba3 as weights

precise = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 5e-6)], ids=["float64", "float32"]
)
LEAVES = {"angle": "angle_state", "ssm": "ssm_state", "k": "k_state", "v": "v_state"}


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    assert x.shape == y.shape
    assert torch.isfinite(x).all()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


def mixer_of(path: Path, dtype: torch.dtype) -> tuple[Mamba3Mixer, dict[str, Tensor]]:
    file, told = load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())
    theirs = told["config"]
    config = Mamba3Config(
        vocab_size=16,
        num_layers=1,
        width=theirs["d_model"],
        state_size=theirs["d_state"],
        head_size=theirs["headdim"],
        groups=theirs.get("ngroups", 1),
        rope_fraction=theirs.get("rope_fraction", 0.5),
        is_outproj_norm=theirs.get("is_outproj_norm", False),
        a_activation=told["A_activation"].split()[0],
    )
    mixer = Mamba3Mixer(config).to(dtype)
    mixer.load_state_dict({name[2:]: x.to(dtype) for name, x in file.items() if name.startswith("w.")})
    return mixer, file


@precise
@pytest.mark.parametrize("block", ["siso", "siso_softplusA", "siso_outnorm_fullrope_groups"])
def test_published_blocks(shared: Path, block: str, dtype: torch.dtype, bound: float) -> None:
    mixer, file = mixer_of(shared / f"golden/mamba/blocks/mamba3_{block}", dtype)
    x = file["in.x"].to(dtype).requires_grad_()
    y, _ = mixer(x)
    assert relative(y, file["f64.out"]) <= bound
    parameters = dict(mixer.named_parameters())
    found = torch.autograd.grad(y, [x, *parameters.values()], file["cot.out"].to(dtype))
    for name, gradient in zip(["x", *parameters], found, strict=True):
        want = file["f64.grad.x" if name == "x" else f"f64.grad.w.{name}"]
        assert relative(gradient, want) <= (bound if dtype == torch.float64 else 5e-5), name
    stepped, state = [], None
    for t, token in enumerate(x.unbind(1), start=1):
        out, state = mixer.step(token, state)
        stepped.append(out)
        if f"f64.after_{t}.k_state" in file:
            _, whole = mixer(x[:, :t])
            for leaf, theirs in LEAVES.items():
                for end in (state, whole):
                    assert relative(getattr(end, leaf), file[f"f64.after_{t}.{theirs}"]) <= bound, leaf
    assert relative(torch.stack(stepped, 1), file["f64.out"]) <= bound


def load(home: Path, dtype: torch.dtype, **given: Any) -> Mamba3:
    config = json.loads((home / "config.json").read_text())
    tensors = torch.load(home / "pytorch_model.bin", weights_only=True)
    assert weights.detect(config, set(tensors)) == "state-spaces"
    fields, renamed = weights.to_ours("state-spaces", config, tensors)
    model = Mamba3(Mamba3Config(**{**fields, **given}))
    model.load_state_dict(renamed)
    return model.to(dtype)


PUBLISHED = {"mamba3_lm": {}, "mamba3_lm_mlp_outnorm": {}, "mamba3_lm_softplusA": {"a_activation": "softplus"}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_in_float64(shared: Path, name: str) -> None:
    home = shared / "golden/mamba/models" / name
    model, file = load(home / "state-spaces", torch.float64, **PUBLISHED[name]), load_file(home / "golden.safetensors")
    ids = file["in.input_ids"]
    logits, _ = model(ids)
    assert relative(logits, file["f64.logits"]) <= 1e-12
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert relative(loss, file["f64.loss"]) <= 1e-12
    parameters = dict(model.named_parameters())
    for key, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        assert relative(gradient, file[f"f64.grad_loss.{key}"]) <= 1e-10, key

    after = json.loads((home / "golden.json").read_text())["prefill_len"]
    _, state = model(ids[:, :after])
    for index, layer in enumerate(state.layers):
        for leaf, theirs in LEAVES.items():
            want = file[f"f64.ss_cache_after_{after}.layer{index}.{theirs}"]
            assert relative(getattr(layer, leaf), want) <= 1e-12, leaf
    for t in range(after, ids.shape[1]):
        one, state = model.step(ids[:, t], state)
        assert relative(one, file["f64.logits"][:, t]) <= 1e-12


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_in_float32(shared: Path, name: str) -> None:
    home = shared / "golden/mamba/models" / name
    model, file = load(home / "state-spaces", torch.float32, **PUBLISHED[name]), load_file(home / "golden.safetensors")
    logits, _ = model(file["in.input_ids"])
    assert float((logits.detach() - file["f64.logits"]).abs().max()) <= 5e-5


def test_the_activation_of_A_matters(shared: Path) -> None:
    home = shared / "golden/mamba/models/mamba3_lm_softplusA"
    logits, _ = load(home / "state-spaces", torch.float64)(load_file(home / "golden.safetensors")["in.input_ids"])
    assert relative(logits, load_file(home / "golden.safetensors")["f64.logits"]) > 0.01


SMALL = {"vocab_size": 64, "num_layers": 2, "width": 24, "state_size": 6, "head_size": 12}
OPTIONS: dict[str, dict[str, Any]] = {
    "siso": {},
    "softplus-full-rope": {"a_activation": "softplus", "rope_fraction": 1.0},
    "norm-mlp-groups": {"is_outproj_norm": True, "mlp_width": 30, "groups": 2},
    "mimo": {"mimo_rank": 3, "groups": 2},
    "mimo-norm-full-rope": {"mimo_rank": 2, "is_outproj_norm": True, "rope_fraction": 1.0},
    "untied-layernorm": {"tie_embeddings": False, "rms_norm": False},
}
every_option = pytest.mark.parametrize("option", OPTIONS)


def small(option: str) -> Mamba3:
    """A float64 model none of whose weights are zero or alike."""
    torch.manual_seed(3)
    model = Mamba3(Mamba3Config(**{**SMALL, **OPTIONS[option]})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def same(one: tuple[Tensor, ModelState], other: tuple[Tensor, ModelState]) -> None:
    assert relative(one[0], other[0]) <= 1e-12
    for a, b in zip(one[1].layers, other[1].layers, strict=True):
        assert all(relative(x, y) <= 1e-12 for x, y in zip(a, b, strict=True))


@every_option
def test_every_form_is_the_whole(option: str) -> None:
    model = small(option)
    ids = torch.randint(0, 64, (2, 23))
    whole = model(ids)
    state, outputs = model.init_state(2), []
    for token in ids.unbind(1):
        logits, state = model.step(token, state)
        outputs.append(logits)
    same((torch.stack(outputs, 1), state), whole)
    first, state = model(ids[:, :9])
    rest, state = model(ids[:, 9:], state)
    same((torch.cat([first, rest], 1), state), whole)

    lengths = torch.tensor([23, 7])
    padded = ids.masked_fill(torch.arange(23) >= lengths[:, None], -1)
    logits, state = model(padded, lengths=lengths)
    alone = model(ids[1:, :7])
    same((logits[1:, :7], state.select([1])), alone)
    packed, state = model(torch.cat([ids[:1], ids[1:, :7]], 1), cu_seqlens=torch.tensor([0, 23, 30]))
    same((packed[:, 23:], state.select([1])), alone)


@every_option
def test_a_fresh_state_and_the_sizes_told(option: str) -> None:
    model = small(option)
    ids = torch.randint(0, 64, (2, 5))
    same(model(ids, model.init_state(2)), model(ids))
    _, state = model(ids)
    for layer, fresh in zip(state.layers, model.init_state(2).layers, strict=True):
        assert isinstance(layer, Mamba3State)
        assert [leaf.shape for leaf in layer] == [leaf.shape for leaf in fresh]


@every_option
def test_files_both_ways(option: str) -> None:
    model = small(option)
    tensors = dict(model.state_dict())
    config, renamed = weights.from_ours("state-spaces", dataclasses.asdict(model.config), tensors)
    assert weights.detect(config, set(renamed)) == "state-spaces"
    fields, again = weights.to_ours("state-spaces", json.loads(json.dumps(config)), renamed)
    assert Mamba3Config(**fields) == model.config
    assert list(again) == list(tensors)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    bare, _ = weights.to_ours("state-spaces", {}, renamed)  # sizes need no configuration
    assert Mamba3(Mamba3Config(**bare)).load_state_dict(again) is not None


def test_what_contradicts_itself_is_refused(shared: Path) -> None:
    home = shared / "golden/mamba/models/mamba3_lm/state-spaces"
    config = json.loads((home / "config.json").read_text())
    tensors = torch.load(home / "pytorch_model.bin", weights_only=True)

    def read(change: dict[str, Any], ssm: dict[str, Any], without: str = "", **replaced: Tensor) -> None:
        altered = {**config, **change, "ssm_cfg": {**config["ssm_cfg"], **ssm}}
        mixer = {f"backbone.layers.0.mixer.{name}.weight": tensor for name, tensor in replaced.items()}
        weights.to_ours("state-spaces", altered, {k: v for k, v in {**tensors, **mixer}.items() if k != without})

    read({}, {})
    wrong: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("ssm_cfg.layer is 'Mamba2'", {}, {"layer": "Mamba2"}),
        ("attn_layer_idx", {"attn_layer_idx": [1]}, {}),
        ("n_layer is 3", {"n_layer": 3}, {}),
        ("rope_fraction is 1.0", {}, {"rope_fraction": 1.0}),
        ("d_intermediate is 128", {"d_intermediate": 96}, {}),
        ("is_mimo is True", {}, {"is_mimo": True}),
        ("is_outproj_norm is True", {}, {"is_outproj_norm": True}),
        ("vocab_size is 300", {"vocab_size": 300}, {}),
    ]
    for message, change, ssm in wrong:
        with pytest.raises(ValueError, match=message):
            read(change, ssm)
    with pytest.raises(ValueError, match=r"out_proj\.weight is missing"):
        read({}, {}, "backbone.layers.0.mixer.out_proj.weight")
    with pytest.raises(ValueError, match="fit no Mamba-3"):
        read({}, {}, in_proj=torch.zeros(315, 64))
    with pytest.raises(ValueError, match="tied"):
        weights.to_ours("state-spaces", config, {**tensors, "lm_head.weight": torch.zeros(256, 64)})
    with pytest.raises(ValueError, match="norm_eps"):
        weights.from_ours("state-spaces", {**dataclasses.asdict(Mamba3Config(**SMALL)), "norm_eps": 1e-6}, tensors)
    assert weights.detect(config, {name for name in tensors if "B_bias" not in name}) is None


def test_the_mixer_of_many_ranks_by_the_operator() -> None:
    """Ranks side by side in in_proj, as (R, G, N), each normalised by itself."""
    torch.manual_seed(0)
    config = Mamba3Config(**{**SMALL, "mimo_rank": 3, "groups": 2})
    mixer = small("mimo").backbone.layers[0].mixer
    assert isinstance(mixer, Mamba3Mixer)
    x = torch.randn(2, 5, 24).double()
    parts = F.linear(x, mixer.in_proj.weight).split([48, 48, 36, 36, 4, 4, 4, config.angles], -1)
    z, v, B, C, dt, A, trap, angles = parts
    B, C = (
        F.rms_norm(m.view(2, 5, 3, 2, 6), (6,), norm.weight, 1e-5) for m, norm in ((B, mixer.B_norm), (C, mixer.C_norm))
    )
    dt = F.softplus(dt + mixer.dt_bias)
    rate = torch.where(A > 0, 1 + A, 1 / (1 - A)).clamp(min=1e-4)
    y, _ = mamba3(
        C,
        B,
        v.view(2, 5, 4, 12),
        -rate * dt,
        dt,
        trap,
        angles[:, :, None].repeat(1, 1, 4, 1),
        mixer.C_bias,
        mixer.B_bias,
        mixer.D,
        z.view(2, 5, 4, 12),
        mimo_x=mixer.mimo_x,
        mimo_z=mixer.mimo_z,
        mimo_o=mixer.mimo_o,
    )
    assert relative(mixer(x)[0], F.linear(y.flatten(-2), mixer.out_proj.weight)) <= 1e-12


def test_the_official_start() -> None:
    torch.manual_seed(0)
    config = Mamba3Config(vocab_size=250, num_layers=3, width=128, state_size=16, mimo_rank=4, mlp_width=100)
    assert (config.vocab_size, config.mlp_width, config.heads, config.angles) == (256, 128, 4, 4)
    for block in Mamba3(config).backbone.layers:
        mixer = block.mixer
        dt = F.softplus(mixer.dt_bias)
        assert (dt >= 1e-3 * 0.999).all()
        assert (dt <= 1e-1 * 1.001).all()
        assert all((x == 1).all() for x in (mixer.B_bias, mixer.C_bias, mixer.D, mixer.mimo_z, mixer.B_norm.weight))
        assert all((x == 0.25).all() for x in (mixer.mimo_x, mixer.mimo_o))
        for projection, shrunk in ((mixer.in_proj, 1), (mixer.out_proj, 6), (block.mlp.fc2, 6)):
            largest = 1 / math.sqrt(projection.in_features * shrunk)
            assert 0.98 * largest <= float(projection.weight.detach().abs().max()) <= largest


def test_what_never_decays() -> None:
    decays = {
        name: group["weight_decay"]
        for group in small("mimo-norm-full-rope").parameter_groups(0.1)
        for name in group["names"]
    }
    mixer = "backbone.layers.0.mixer."
    for name in ("D", "dt_bias", "B_bias", "C_bias", "B_norm.weight", "norm.weight"):
        assert decays[mixer + name] == 0, name
    for name in ("in_proj.weight", "out_proj.weight", "mimo_x", "mimo_z", "mimo_o"):
        assert decays[mixer + name] == 0.1, name


def test_half_precision_keeps_a_float32_state() -> None:
    model = small("mimo").float()
    ids = torch.randint(0, 64, (2, 20))
    want, _ = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        got, state = model(ids)
    assert relative(got, want) <= 0.05
    assert all(leaf.dtype == torch.float32 for layer in state.layers for leaf in layer)
    got, state = model.to(torch.bfloat16)(ids)
    assert relative(got, want) <= 0.05
    assert all(leaf.dtype == torch.float32 for layer in state.layers for leaf in layer)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("a_activation", "relu"),
        ("rope_fraction", 0.25),
        ("mimo_rank", 0),
        ("head_size", 7),
        ("groups", 3),
        ("state_size", 3),
        ("is_outproj_norm", 1),
        ("dt_min", 0.5),
        ("a_floor", 0.0),
    ],
)
def test_fields_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        Mamba3Config(**{**SMALL, field: value})


def test_a_state_of_another_model_is_refused() -> None:
    model = small("siso")
    ids = torch.randint(0, 64, (2, 5))
    with pytest.raises(ValueError, match="2 Mamba3State"):
        model(ids, ModelState(model.init_state(2).layers[:1]))
    with pytest.raises(ValueError, match=r"state\.angle"):
        model(ids, model.init_state(3))
