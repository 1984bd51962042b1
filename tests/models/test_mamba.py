"""Mamba: the published blocks' and models' numbers, the mixer alone, both ways in time, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import statewise
from statewise.models.mamba import Mamba, MambaConfig, MambaMixer
from statewise.state import MambaLayerState


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    assert torch.isfinite(x).all()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


precise = pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])


def mixer_of(path: Path, dtype: torch.dtype) -> tuple[MambaMixer, dict[str, Tensor]]:
    """The published block beside ``path``, with its weights."""
    file = load_file(path.with_suffix(".safetensors"))
    given = json.loads(path.with_suffix(".json").read_text())["config"]
    config = MambaConfig(
        vocab_size=8,
        num_layers=1,
        width=given["d_model"],
        state_size=given.get("d_state", 16),
        conv_width=given.get("d_conv", 4),
        expand=given.get("expand", 2),
        dt_rank=given.get("dt_rank"),
        bias=given.get("bias", False),
        conv_bias=given.get("conv_bias", True),
        inner_norm="weighted" if given.get("inner_layernorms") else None,
        inner_norm_eps=given.get("rms_norm_eps", 1e-6),
    )
    mixer = MambaMixer(
        config,
        bidirectional="bimamba_type" in given,
        divide_out=given.get("if_divide_out", False),
        layer_scale=given.get("init_layer_scale"),
    )
    own = {"B_layernorm": "b_layernorm", "C_layernorm": "c_layernorm"}
    weights = {}
    for name, tensor in file.items():
        if name.startswith("w."):
            first, *rest = name[2:].split(".")
            weights[".".join([own.get(first, first), *rest])] = tensor
    mixer.load_state_dict(weights, strict=True)
    return mixer.to(dtype), file


@precise
@pytest.mark.parametrize(
    "block",
    [
        "mamba1_default",
        "mamba1_dconv3_bias_noconvbias",
        "mamba1_prompt_shorter_than_window",
        "jamba_inner_layernorms",
        "vim_bimamba_v2_sum",
        "vim_bimamba_v2_div",
        "vim_bimamba_v2_layerscale",
    ],
)
def test_published_blocks(shared: Path, block: str, dtype: torch.dtype, bound: float) -> None:
    mixer, file = mixer_of(shared / "golden/mamba/blocks" / block, dtype)
    if block.startswith("jamba"):
        # Made with a float64 A_log that was stored rounded to float32 (found by solving for it from one row's state:
        # it explains the other row to 5e-13 and rounds to what is stored).
        bound = max(bound, 5e-7)
    x = file["in.x"].to(dtype).requires_grad_()
    y, end = mixer(x)
    assert relative(y, file["f64.out"]) <= bound
    assert (end is None) == block.startswith("vim")
    parameters = dict(mixer.named_parameters())
    found = torch.autograd.grad(y, [x, *parameters.values()], file["cot.out"].to(dtype))
    for name, gradient in zip(["x", *parameters], found, strict=True):
        name = name.replace("b_layernorm", "B_layernorm").replace("c_layernorm", "C_layernorm")
        want = file["f64.grad.x" if name == "x" else f"f64.grad.w.{name}"]
        assert relative(gradient, want) <= bound, name

    for key in [key for key in file if key.startswith("f64.after_")]:
        _, after, leaf = key.split(".")
        count = int(after.removeprefix("after_"))
        _, state = mixer(x[:, :count])
        if leaf in ("ssm_state", "h"):
            assert relative(state.ssm, file[key]) <= bound
        else:  # (batch, channels, W or W-1); the oldest of W is never read
            size = mixer.config.conv_width - 1
            assert relative(state.conv.transpose(1, 2), file[key][..., -size:]) <= bound
    if "f64.step_out" in file:
        count = x.shape[1] - file["f64.step_out"].shape[1]
        _, state = mixer(x[:, :count])
        for t, want in enumerate(file["f64.step_out"].unbind(1), start=count):
            out, state = mixer.step(x[:, t], state)
            assert relative(out, want) <= bound


PUBLISHED = [
    ("mamba1_lm", "hf"),
    ("mamba1_lm", "state-spaces"),
    ("mamba1_lm", "mambapy"),
    ("mamba1_lm_odd", "hf"),
    ("mamba1_lm_odd", "state-spaces"),
    ("mamba1_lm_odd", "mambapy"),
    ("falcon_mamba_lm", "hf"),
]
published = pytest.mark.parametrize(("name", "layout"), PUBLISHED)


def load(shared: Path, name: str, layout: str, dtype: torch.dtype) -> tuple[Mamba, dict[str, Tensor], dict[str, Any]]:
    home = shared / "golden/mamba/models" / name
    model = statewise.load(home / layout, dtype=dtype)
    assert isinstance(model, Mamba)
    return model, load_file(home / "golden.safetensors"), json.loads((home / "golden.json").read_text())


@published
def test_published_models_in_float64(shared: Path, name: str, layout: str) -> None:
    model, file, about = load(shared, name, layout, torch.float64)
    ids = file["in.input_ids"]
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, out: seen.append(out[0])) for block in model.backbone.layers]
    handles.append(model.backbone.norm_f.register_forward_hook(lambda _, __, out: seen.append(out)))
    logits, _ = model(ids)
    for handle in handles:
        handle.remove()
    assert relative(logits, file["f64.logits"]) <= 1e-10
    for index, hidden in enumerate(seen):
        assert relative(hidden, file[f"f64.hidden_states.{index}"]) <= 1e-10

    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.testing.assert_close(loss.float(), file["f64.loss"], rtol=1e-6, atol=0)
    parameters = dict(model.named_parameters())
    tied = model.config.tie_embeddings
    for key, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        if about.get("tie") and not tied and key in ("lm_head.weight", "backbone.embedding.weight"):
            continue  # mamba.py never ties: upstream's one gradient is the sum of our two
        want = file["f64.grad_loss." + key.replace("embedding.", "embeddings.")]
        assert relative(gradient, want) <= 1e-10, key


@published
def test_published_models_in_float32(shared: Path, name: str, layout: str) -> None:
    model, file, _ = load(shared, name, layout, torch.float32)
    logits, _ = model(file["in.input_ids"])
    assert float((logits.detach() - file["f64.logits"]).abs().max()) <= 5e-5


CACHES = {"hf": "transformers", "ss": "mamba-ssm", "mambapy": "mamba.py"}


@pytest.mark.parametrize("name", ["mamba1_lm", "mamba1_lm_odd", "falcon_mamba_lm"])
def test_published_caches_steps_and_greedy_text(shared: Path, name: str) -> None:
    model, file, about = load(shared, name, "hf", torch.float64)
    ids, count = file["in.input_ids"], about["prefill_len"]

    def cache(project: str, after: int) -> list[Tensor]:
        leaves = ("h", "inputs") if project == "mambapy" else ("conv_state", "ssm_state")
        names = [
            f"f64.{project}_cache_after_{after}.layer{layer}.{leaf}"
            for layer in range(model.config.num_layers)
            for leaf in leaves
        ]
        return [file[name] for name in names] if names[0] in file else []

    compared = 0
    for after in (count, ids.shape[1]):
        _, state = model(ids[:, :after])
        for project, layout in CACHES.items():
            for got, want in zip(state.to_layout(layout), cache(project, after), strict=False):
                size = model.config.conv_width
                if want.shape[-1] == size and project != "mambapy" and got.shape[-1] == size:
                    got, want = got[..., 1:], want[..., 1:]  # the oldest column is never read
                assert relative(got, want) <= 1e-10
                compared += 1
    assert compared >= 8

    for project, layout in CACHES.items():  # and on from their caches
        if not cache(project, count):
            continue
        state = model.init_state(ids.shape[0]).from_layout(layout, cache(project, count))
        for token, want in zip(ids[:, count:].unbind(1), file["f64.step_logits"].unbind(1), strict=True):
            logits, state = model.step(token, state)
            assert relative(logits, want) <= 1e-10

    greedy = file["f64.greedy_ids"]
    start = greedy.shape[1] - 12
    logits, state = model(greedy[:, :start])
    token = logits[:, -1].argmax(-1)
    for want in greedy[:, start:].unbind(1):
        assert torch.equal(token, want)
        logits, state = model.step(token, state)
        token = logits.argmax(-1)


SMALL = MambaConfig(vocab_size=16, num_layers=2, width=12, state_size=3, bias=True)


def test_the_mixer_alone_keeps_the_promise() -> None:
    mixer = MambaMixer(SMALL).double()
    x = torch.randn(2, 20, 12).double()
    whole, end = mixer(x)
    first, state = mixer(x[:, :7])
    second, state = mixer(x[:, 7:19], state)
    third, state = mixer.step(x[:, 19], state)
    assert relative(torch.cat([first, second, third[:, None]], 1), whole) <= 1e-12
    assert isinstance(state, MambaLayerState)
    assert relative(state.conv, end.conv) <= 1e-12
    assert relative(state.ssm, end.ssm) <= 1e-12


@pytest.mark.parametrize("norm", [None, "weighted", "weightless"])
def test_bidirectional_is_two_mixers_one_of_them_reversed(norm: str | None) -> None:
    config = MambaConfig(vocab_size=16, num_layers=2, width=12, state_size=3, inner_norm=norm)
    both = MambaMixer(config, bidirectional=True).double()
    own = {"A_log": "A_b_log", "D": "D_b"}
    weights = both.state_dict()
    one, other = (MambaMixer(config).double() for _ in range(2))
    one.load_state_dict({name: weights[name] for name in one.state_dict()})
    back = {}
    for name in other.state_dict():
        head, dot, rest = name.partition(".")
        theirs = own.get(head, f"{head}_b{dot}{rest}") if head not in ("in_proj", "out_proj") else name
        back[name] = weights[theirs]
    other.load_state_dict(back)
    x = torch.randn(2, 20, 12).double()
    y, state = both(x)
    assert state is None
    assert relative(y, one(x)[0] + other(x.flip(1))[0].flip(1)) <= 1e-12


def test_bidirectional_padding_and_packing_change_nothing() -> None:
    mixer = MambaMixer(SMALL, bidirectional=True, divide_out=True).double()
    lengths = [9, 0, 1, 5]
    x = torch.randn(4, 9, 12).double()
    dirty = x.clone()
    for row, length in enumerate(lengths):
        dirty[row, length:] = torch.nan
    y, _ = mixer(dirty, lengths=torch.tensor(lengths))
    packed = torch.cat([x[row, :length] for row, length in enumerate(lengths)])[None]
    z, _ = mixer(packed, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    at = 0
    valid = []
    for row, length in enumerate(lengths):
        alone, _ = mixer(x[row : row + 1, :length])
        valid.append(y[row, :length])
        if length:
            assert relative(y[row, :length], alone[0]) <= 1e-12
            assert relative(z[0, at : at + length], alone[0]) <= 1e-12
        at += length
    gradients = torch.autograd.grad(torch.cat(valid).sum(), list(mixer.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_bidirectional_has_no_steps_and_no_state() -> None:
    mixer = MambaMixer(SMALL, bidirectional=True)
    with pytest.raises(ValueError, match="backward scan starts at the last"):
        mixer.step(torch.zeros(2, 12))
    _, state = MambaMixer(SMALL)(torch.zeros(2, 3, 12))
    with pytest.raises(ValueError, match="has no state"):
        mixer(torch.zeros(2, 3, 12), state)


@torch.no_grad()
def test_official_initialisation() -> None:
    config = MambaConfig(vocab_size=250, num_layers=4, width=64)
    model = Mamba(config)
    assert model.backbone.embedding.weight.shape == (256, 64)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert abs(float(model.backbone.embedding.weight.std()) - 0.02) < 1e-3
    mixer = model.backbone.layers[1].mixer
    assert torch.equal(mixer.A_log[5], torch.arange(1, 17).log())
    assert torch.equal(mixer.D, torch.ones(128))
    dt = F.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.999 <= float(dt.min()) < 3e-3
    assert 3e-2 < float(dt.max()) <= 1e-1 * 1.001
    assert 0.4 < float(mixer.dt_proj.weight.abs().max()) <= 0.5
    kaiming = 128**-0.5  # of out_proj, before it is divided by √4
    assert 0.45 * kaiming < float(mixer.out_proj.weight.abs().max()) <= 0.5 * kaiming
    slow = Mamba(MambaConfig(vocab_size=8, num_layers=1, width=16, dt_min=1e-3, dt_max=2e-3, dt_floor=5e-3))
    dt = F.softplus(slow.backbone.layers[0].mixer.dt_proj.bias)
    torch.testing.assert_close(dt, torch.full_like(dt, 5e-3))


def test_what_decays() -> None:
    groups = Mamba(MambaConfig(vocab_size=8, num_layers=1, width=16, bias=True)).parameter_groups(0.1)
    decaying = {name for group in groups for name in group["names"] if group["weight_decay"]}
    layer = "backbone.layers.0.mixer."
    projections = {f"{layer}{part}.weight" for part in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}
    assert decaying == {"backbone.embedding.weight", *projections}


@pytest.mark.parametrize(
    "options",
    [
        {"rms_norm": False},
        {"residual_in_fp32": False},
        {"inner_norm": "weighted"},
        {"inner_norm": "weightless"},
        {"tie_embeddings": False, "bias": True, "conv_bias": False, "conv_width": 1, "dt_rank": 3, "expand": 1},
    ],
)
def test_options_change_every_form_alike(options: dict[str, Any]) -> None:
    model = Mamba(MambaConfig(vocab_size=16, num_layers=2, width=12, state_size=3, **options)).double()
    ids = torch.randint(0, 16, (2, 11))
    whole, end = model(ids)
    state, outputs = model.init_state(2), []
    for token in ids.unbind(1):
        logits, state = model.step(token, state)
        outputs.append(logits)
    assert relative(torch.stack(outputs, 1), whole) <= 1e-12
    assert relative(state.layers[1].ssm, end.layers[1].ssm) <= 1e-12
    plain = Mamba(MambaConfig(vocab_size=16, num_layers=2, width=12, state_size=3)).double()
    if set(model.state_dict()) == set(plain.state_dict()) and options != {"residual_in_fp32": False}:
        plain.load_state_dict(model.state_dict())
        assert relative(plain(ids)[0], whole) > 1e-3


def test_the_stream_stays_float32_when_asked() -> None:
    streams = {}
    for wide in (True, False):
        config = MambaConfig(vocab_size=16, num_layers=1, width=12, residual_in_fp32=wide)
        model = Mamba(config).bfloat16()
        model.backbone.layers[0].register_forward_hook(lambda _, __, out, wide=wide: streams.update({wide: out[0]}))
        logits, _ = model(torch.randint(0, 16, (1, 5)))
        assert logits.dtype == torch.bfloat16
    assert streams[True].dtype == torch.float32
    assert streams[False].dtype == torch.bfloat16


def test_a_tied_model_stays_tied() -> None:
    model = Mamba(SMALL)
    again = Mamba(SMALL)
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again.load_state_dict(copies, assign=True)
    assert again.lm_head.weight is again.backbone.embedding.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    copies["lm_head.weight"] += 1
    with pytest.raises(RuntimeError, match=r"differs from backbone\.embedding\.weight"):
        again.load_state_dict(copies)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0; accepted are integers from 1"),
        ({"state_size": 2.5}, "state_size is 2.5"),
        ({"dt_rank": 0}, "dt_rank is 0"),
        ({"bias": 1}, "bias is 1; accepted are True and False"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; accepted are positive numbers"),
        ({"inner_norm": "rms"}, "inner_norm is 'rms'; accepted are None, 'weighted', 'weightless'"),
        ({"dt_min": 1.0}, "dt_min 1.0 is larger than dt_max 0.1"),
    ],
)
def test_configurations_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MambaConfig(**{"vocab_size": 8, "num_layers": 1, "width": 16, **change})


def test_arguments_refused() -> None:
    model = Mamba(SMALL)
    ids = torch.zeros(2, 3, dtype=torch.long)
    for call, message in (
        (lambda: model(ids[0]), r"tokens have shape \(3,\)"),
        (lambda: model(ids.float()), "dtype torch.float32"),
        (lambda: model.step(ids, model.init_state(2)), r"token has shape \(2, 3\)"),
        (lambda: model(ids, model.init_state(2).layers), "ModelState of 2 MambaLayerState"),
        (lambda: model(ids, model.init_state(3)), "state has shape"),
        (lambda: MambaMixer(SMALL)(torch.zeros(2, 3, 11)), "width=12"),
        (lambda: MambaMixer(SMALL).step(torch.zeros(2, 3, 12)), "width=12"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
