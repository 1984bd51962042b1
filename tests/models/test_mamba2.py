"""Mamba-2: the published blocks' and models' numbers, every option in every form, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from statewise.models.mamba2 import Mamba2, Mamba2Config, Mamba2Mixer
from statewise.state import Mamba2LayerState, load_state, stack
from statewise.weights.mamba2 import detect, to_ours


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    assert torch.isfinite(x).all()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


#: Outputs, and gradients, against upstream's text in float64.
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (5e-6, 5e-5)}
precise = pytest.mark.parametrize("dtype", BOUNDS)

BLOCKS = ("default", "groups_normbeforegate", "no_rmsnorm", "dt_limit", "D_has_hdim", "d_ssm_mlp_split")


def mixer_of(path: Path, dtype: torch.dtype) -> tuple[Mamba2Mixer, dict[str, Tensor]]:
    """The published block beside ``path``, with its weights."""
    file = load_file(path.with_suffix(".safetensors"))
    given = json.loads(path.with_suffix(".json").read_text())["config"]
    norm = None if not given.get("rmsnorm", True) else "before" if given.get("norm_before_gate") else "after"
    config = Mamba2Config(
        vocab_size=8,
        num_layers=1,
        width=given["d_model"],
        state_size=given["d_state"],
        head_size=given["headdim"],
        groups=given.get("ngroups", 1),
        ssm_width=given.get("d_ssm"),
        gated_norm=norm,
        D_per_channel=given.get("D_has_hdim", False),
        dt_limit=given.get("dt_limit", (0.0, math.inf)),
        bias=given.get("bias", False),
    )
    mixer = Mamba2Mixer(config)
    mixer.load_state_dict({name[2:]: value for name, value in file.items() if name.startswith("w.")}, strict=True)
    return mixer.to(dtype), file


@precise
@pytest.mark.parametrize("block", BLOCKS)
def test_published_blocks(shared: Path, block: str, dtype: torch.dtype) -> None:
    mixer, file = mixer_of(shared / f"golden/mamba/blocks/mamba2_{block}", dtype)
    forward, backward = BOUNDS[dtype]
    x = file["in.x"].to(dtype).requires_grad_()
    y, _ = mixer(x)
    assert relative(y, file["f64.out"]) <= forward
    parameters = dict(mixer.named_parameters())
    found = torch.autograd.grad(y, [x, *parameters.values()], file["cot.out"].to(dtype))
    for name, gradient in zip(["x", *parameters], found, strict=True):
        want = file["f64.grad.x" if name == "x" else f"f64.grad.w.{name}"]
        assert relative(gradient, want) <= backward, name

    counts = sorted({int(key.split(".")[1].removeprefix("after_")) for key in file if key.startswith("f64.after_")})
    assert len(counts) == 2
    for count in counts:
        _, state = mixer(x[:, :count])
        assert relative(state.ssm, file[f"f64.after_{count}.ssm_state"]) <= forward
        window = file[f"f64.after_{count}.conv_state"][..., 1:]  # the oldest of W is never read
        assert relative(state.conv.transpose(1, 2), window) <= forward

    _, state = mixer(x[:, : counts[0]])
    for t, want in enumerate(file["f64.out"][:, counts[0] :].unbind(1), start=counts[0]):
        out, state = mixer.step(x[:, t], state)
        assert relative(out, want) <= forward
    assert relative(state.ssm, file[f"f64.after_{counts[1]}.ssm_state"]) <= forward


PUBLISHED = [
    (name, layout)
    for name in ("mamba2_lm", "mamba2_lm_groups", "mamba2_lm_dt_limit")
    for layout in ("state-spaces", "hf")
]
published = pytest.mark.parametrize(("name", "layout"), PUBLISHED)


def published_model(
    shared: Path, name: str, layout: str, dtype: torch.dtype
) -> tuple[Mamba2, dict[str, Tensor], dict[str, Any]]:
    home = shared / "golden/mamba/models" / name
    binary = home / layout / "pytorch_model.bin"
    tensors = (
        torch.load(binary, weights_only=True) if binary.exists() else load_file(home / layout / "model.safetensors")
    )
    config = json.loads((home / layout / "config.json").read_text())
    found = detect(config, set(tensors))
    assert found is not None
    fields, renamed = to_ours(found, config, tensors)
    model = Mamba2(Mamba2Config(**fields))
    model.load_state_dict(renamed, strict=True)
    return model.to(dtype), load_file(home / "golden.safetensors"), json.loads((home / "golden.json").read_text())


@published
@precise
def test_published_models(shared: Path, name: str, layout: str, dtype: torch.dtype) -> None:
    model, file, _ = published_model(shared, name, layout, dtype)
    forward, backward = BOUNDS[dtype]
    ids = file["in.input_ids"]
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, out: seen.append(out[0])) for block in model.backbone.layers]
    handles.append(model.backbone.norm_f.register_forward_hook(lambda _, __, out: seen.append(out)))
    logits, _ = model(ids)
    for handle in handles:
        handle.remove()
    assert relative(logits, file["f64.logits"]) <= forward
    for index, hidden in enumerate(seen):
        assert relative(hidden, file[f"f64.hidden_states.{index}"]) <= forward

    # upstream took the loss of logits rounded to float32, also in float64
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.testing.assert_close(loss.float(), file["f64.loss"], rtol=1e-6, atol=0)
    parameters = dict(model.named_parameters())
    for key, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        assert relative(gradient, file["f64.grad_loss." + key.replace("embedding.", "embeddings.")]) <= backward, key


@precise
@pytest.mark.parametrize("name", ["mamba2_lm", "mamba2_lm_groups", "mamba2_lm_dt_limit"])
def test_published_caches_steps_and_greedy_text(shared: Path, name: str, dtype: torch.dtype) -> None:
    """``dt_limit`` among them: upstream's own steps forget it, the numbers here are those of its whole form."""
    model, file, about = published_model(shared, name, "hf", dtype)
    bound, _ = BOUNDS[dtype]
    ids, count = file["in.input_ids"], about["prefill_len"]

    def cache(project: str, after: int) -> list[Tensor]:
        names = [
            f"f64.{project}_cache_after_{after}.layer{layer}.{leaf}"
            for layer in range(model.config.num_layers)
            for leaf in ("conv_state", "ssm_state")
        ]
        return [file[key] for key in names] if names[0] in file else []

    compared = 0
    for after in (count, ids.shape[1]):
        _, state = model(ids[:, :after])
        for project, layout in (("hf", "transformers"), ("ss", "mamba-ssm")):
            for got, want in zip(state.to_layout(layout), cache(project, after), strict=False):
                if want.dim() == 3:
                    got, want = got[..., 1:], want[..., 1:]  # the oldest column is never read
                assert relative(got, want) <= bound
                compared += 1
    assert compared >= 8

    state = model.init_state(ids.shape[0]).from_layout("transformers", cache("hf", count))
    for token, want in zip(ids[:, count:].unbind(1), file["f64.step_logits"].unbind(1), strict=True):
        logits, state = model.step(token, state)
        assert relative(logits, want) <= bound

    greedy = file["f64.greedy_ids"]
    start = greedy.shape[1] - 12
    logits, state = model(greedy[:, :start])
    token = logits[:, -1].argmax(-1)
    for want in greedy[:, start:].unbind(1):
        assert torch.equal(token, want)
        logits, state = model.step(token, state)
        token = logits.argmax(-1)


SMALL: dict[str, Any] = {"vocab_size": 16, "num_layers": 2, "width": 12, "state_size": 3, "head_size": 4}


def awake(**options: Any) -> Mamba2:
    """A small float64 model none of whose weights are zero or one."""
    model = Mamba2(Mamba2Config(**{**SMALL, **options})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"groups": 3},
    "norm in fewer parts than groups": {"groups": 3, "norm_groups": 1},
    "norm before the gate": {"gated_norm": "before", "groups": 2},
    "no gated norm": {"gated_norm": None},
    "MLP beside the heads": {"ssm_width": 16, "gated_norm": None},
    "normed MLP beside the heads": {"ssm_width": 16},
    "D per channel": {"D_per_channel": True},
    "limits": {"dt_limit": (0.3, 0.9)},
    "smallest step alone": {"dt_limit": (0.5, math.inf)},
    "MLP blocks": {"mlp_width": 5},
    "biases": {"bias": True, "conv_bias": False, "tie_embeddings": False},
    "no window": {"conv_width": 1, "expand": 1},
    "LayerNorm": {"rms_norm": False, "norm_eps": 1e-3},
    "narrow stream": {"residual_in_fp32": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_in_every_form(options: dict[str, Any]) -> None:
    model = awake(**options)
    ids, lengths = torch.randint(0, 16, (3, 17)), [17, 0, 6]
    _, begin = model(torch.randint(0, 16, (3, 5)))
    whole, end = model(ids, begin)

    first, state = model(ids[:, :9], begin)
    second, state = model(ids[:, 9:], state)
    assert relative(torch.cat([first, second], 1), whole) <= 1e-12
    state, outputs = begin, []
    for token in ids.unbind(1):
        logits, state = model.step(token, state)
        outputs.append(logits)
    assert relative(torch.stack(outputs, 1), whole) <= 1e-12
    for one, other in zip(state.layers, end.layers, strict=True):
        assert relative(one.ssm, other.ssm) <= 1e-12
        assert one.conv.numel() == 0 or relative(one.conv, other.conv) <= 1e-12

    padded, at_length = model(
        ids.where(torch.arange(17) < torch.tensor(lengths)[:, None], -7), begin, lengths=torch.tensor(lengths)
    )
    row = torch.cat([ids[index, :length] for index, length in enumerate(lengths)])[None]
    packed, at_end = model(row, begin, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    for index, (length, part) in enumerate(zip(lengths, packed[0].split(lengths), strict=True)):
        alone, after = model(ids[index : index + 1, :length], begin.select([index]))
        if length:
            assert relative(padded[index, :length], alone[0]) <= 1e-12
            assert relative(part, alone[0]) <= 1e-12
        for batch in (at_length, at_end):
            for one, other in zip(batch.select([index]).layers, after.layers, strict=True):
                assert relative(one.ssm, other.ssm) <= 1e-12

    if options not in ({}, {"residual_in_fp32": False}):  # and the option does something
        plain = awake()
        if {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}:
            plain.load_state_dict(model.state_dict())
            assert relative(plain(ids, begin)[0], whole) > 1e-3


def test_norm_groups_are_their_own_option() -> None:
    apart, together = awake(groups=3), awake(groups=3, norm_groups=1)
    together.load_state_dict(apart.state_dict())
    ids = torch.randint(0, 16, (1, 9))
    assert relative(apart(ids)[0], together(ids)[0]) > 1e-3


def test_the_mixer_alone_keeps_the_promise() -> None:
    mixer = awake(groups=2, ssm_width=16).backbone.layers[0].mixer
    x = torch.randn(2, 20, 12).double()
    whole, end = mixer(x)
    first, state = mixer(x[:, :7])
    second, state = mixer(x[:, 7:19], state)
    third, state = mixer.step(x[:, 19], state)
    assert relative(torch.cat([first, second, third[:, None]], 1), whole) <= 1e-12
    assert isinstance(state, Mamba2LayerState)
    assert relative(state.conv, end.conv) <= 1e-12
    assert relative(state.ssm, end.ssm) <= 1e-12
    empty, same = mixer(x[:, :0], state)
    assert empty.shape == (2, 0, 12)
    assert torch.equal(same.ssm, state.ssm)


def test_padding_of_a_mixer_with_biases_may_be_nan() -> None:
    mixer = awake(bias=True).backbone.layers[0].mixer
    x = torch.randn(2, 8, 12).double()
    dirty = x.clone()
    dirty[1, 3:] = torch.nan
    dirty.requires_grad_()
    y, state = mixer(dirty, lengths=torch.tensor([8, 3]))
    alone, end = mixer(x[1:, :3])
    assert relative(y[1, :3], alone[0]) <= 1e-12
    assert relative(state.ssm[1:], end.ssm) <= 1e-12
    gradients = torch.autograd.grad(y[0].sum() + y[1, :3].sum() + state.ssm.sum(), [dirty, *mixer.parameters()])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[0][1, 3:].any()


@settings(max_examples=20, deadline=None)
@given(low=st.floats(0, 2), span=st.floats(0, 2), seed=st.integers(0, 99))
def test_steps_are_clamped(low: float, span: float, seed: int) -> None:
    """One step's state is dt x Bᵀ, so the limits show in it: a limit of one value makes dt that value."""
    torch.manual_seed(seed)
    free, bound = awake(), awake(dt_limit=(low, low + span))
    bound.load_state_dict(free.state_dict())
    ids = torch.randint(0, 16, (2, 1))
    states = [model(ids)[1].layers[0].ssm for model in (free, bound)]
    mixer, x = free.backbone.layers[0].mixer, free.backbone.layers[0].norm(free.backbone.embedding(ids))
    dt = F.softplus(mixer.in_proj(x)[:, 0, -mixer.config.heads :] + mixer.dt_bias)
    scale = (dt.clamp(low, low + span) / dt)[:, :, None, None]
    torch.testing.assert_close(states[1], states[0] * scale, rtol=1e-10, atol=1e-14)
    _, stepped = bound.step(ids[:, 0], bound.init_state(2))
    torch.testing.assert_close(stepped.layers[0].ssm, states[1], rtol=1e-12, atol=1e-15)


@torch.no_grad()
def test_official_initialisation() -> None:
    config = Mamba2Config(
        vocab_size=250, num_layers=2, width=256, state_size=8, head_size=4, mlp_width=100, bias=True, dt_floor=2e-3
    )
    model = Mamba2(config)
    assert model.backbone.embedding.weight.shape == (256, 256)
    assert model.lm_head.weight is model.backbone.embedding.weight
    assert abs(float(model.backbone.embedding.weight.std()) - 0.02) < 1e-3
    layer = model.backbone.layers[1]
    mixer = layer.mixer
    A = mixer.A_log.exp()
    assert 1 <= float(A.min()) < 2.5
    assert 14.5 < float(A.max()) <= 16
    assert abs(float(A.mean()) - 8.5) < 1.5  # uniform itself, not its logarithm
    assert torch.equal(mixer.D, torch.ones(128))
    assert torch.equal(mixer.norm.weight, torch.ones(512))
    dt = F.softplus(mixer.dt_bias)
    assert 2e-3 * 0.999 <= float(dt.min()) < 3e-3
    assert 5e-2 < float(dt.max()) <= 1e-1 * 1.001
    assert not mixer.in_proj.bias.any()
    assert not mixer.out_proj.bias.any()
    assert layer.mlp.fc1.weight.shape == (256, 256)
    for narrow, reads in ((mixer.out_proj, 512), (layer.mlp.fc2, 128)):  # divided by √4: two branches in two blocks
        assert 0.48 < float(narrow.weight.abs().max()) * reads**0.5 <= 0.5
    assert 0.98 < float(mixer.in_proj.weight.abs().max()) * 16 <= 1


def test_what_decays() -> None:
    model = awake(mlp_width=5, bias=True)
    groups = model.parameter_groups(0.1)
    decaying = {name for group in groups for name in group["names"] if group["weight_decay"]}
    parts = ("mixer.in_proj", "mixer.conv1d", "mixer.out_proj", "mlp.fc1", "mlp.fc2")
    projections = {f"backbone.layers.{layer}.{part}.weight" for layer in (0, 1) for part in parts}
    assert decaying == {"backbone.embedding.weight", *projections}
    assert sorted(name for group in groups for name in group["names"]) == sorted(dict(model.named_parameters()))


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    model, ids = awake(mlp_width=5), torch.randint(0, 16, (2, 9))
    _, begin = model(ids)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        logits, _ = model(ids, begin.detach())
        found.append(torch.autograd.grad(logits.square().sum(), list(model.parameters())))
    assert all(relative(one, other) <= 1e-12 for one, other in zip(*found, strict=True))


def test_the_stream_stays_float32_when_asked() -> None:
    streams = {}
    for wide in (True, False):
        model = Mamba2(Mamba2Config(**{**SMALL, "ssm_width": 16, "mlp_width": 5, "residual_in_fp32": wide})).bfloat16()
        model.backbone.layers[0].register_forward_hook(lambda _, __, out, wide=wide: streams.update({wide: out[0]}))
        logits, state = model(torch.randint(0, 16, (1, 5)))
        assert logits.dtype == torch.bfloat16
        assert {leaf.dtype for layer in state.layers for leaf in layer} == {torch.float32}
    assert streams[True].dtype == torch.float32
    assert streams[False].dtype == torch.bfloat16


def test_a_tied_model_stays_tied() -> None:
    model, again = awake(), awake()
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again.load_state_dict(copies, assign=True)
    assert again.lm_head.weight is again.backbone.embedding.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    copies["lm_head.weight"] += 1
    with pytest.raises(RuntimeError, match=r"differs from backbone\.embedding\.weight"):
        again.load_state_dict(copies)


def test_a_state_is_kept_and_taken_apart(tmp_path: Path) -> None:
    model, ids = awake(groups=2), torch.randint(0, 16, (3, 6))
    _, state = model(ids[:, :5])
    state.save(tmp_path / "state")
    again = stack(load_state(tmp_path / "state").split())
    assert torch.equal(model.step(ids[:, 5], again)[0], model.step(ids[:, 5], state)[0])


def test_sizes_that_are_rounded_when_the_configuration_is_made() -> None:
    config = Mamba2Config(vocab_size=50277, num_layers=1, width=64, mlp_width=129, dt_limit=[0, math.inf])  # type: ignore[arg-type]
    assert (config.vocab_size, config.mlp_width, config.dt_limit) == (50288, 256, (0.0, math.inf))
    assert Mamba2Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert Mamba2Config(vocab_size=50277, num_layers=1, width=64, pad_vocab_multiple=8).vocab_size == 50280
    spelt_out = Mamba2Config(vocab_size=8, num_layers=1, width=64, groups=2, ssm_width=128, norm_groups=2)
    assert spelt_out == Mamba2Config(vocab_size=8, num_layers=1, width=64, groups=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0; accepted are integers from 1"),
        ({"state_size": 2.5}, "state_size is 2.5"),
        ({"mlp_width": 0}, "mlp_width is 0"),
        ({"groups": None}, "groups is None"),
        ({"bias": 1}, "bias is 1; accepted are True and False"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0; accepted are positive numbers"),
        ({"gated_norm": "both"}, "gated_norm is 'both'; accepted are None, 'after', 'before'"),
        ({"dt_limit": (0.1,)}, r"dt_limit is \(0.1,\); accepted are two numbers"),
        ({"dt_limit": (0.2, 0.1)}, "0 ≤ smallest ≤ largest"),
        ({"dt_limit": (-1.0, 1.0)}, "0 ≤ smallest ≤ largest"),
        ({"dt_limit": (math.inf, math.inf)}, "dt_limit is"),
        ({"dt_limit": (0.0, math.nan)}, "dt_limit is"),
        ({"dt_min": 1.0}, "dt_min 1.0 is larger than dt_max 0.1"),
        ({"A_max": 0.5}, "A_min 1.0 is larger than A_max 0.5"),
        ({"ssm_width": 40}, "ssm_width is 40; accepted are at most 32"),
        ({"head_size": 5}, "head_size is 5; accepted are divisors of 32"),
        ({"groups": 3}, "groups is 3; accepted are divisors of 4"),
        ({"norm_groups": 3}, "norm_groups is 3; accepted are divisors of 32"),
    ],
)
def test_configurations_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2Config(**{"vocab_size": 8, "num_layers": 1, "width": 16, "head_size": 8, **change})


def test_arguments_refused() -> None:
    model = Mamba2(Mamba2Config(**SMALL))
    mixer = model.backbone.layers[0].mixer
    ids = torch.zeros(2, 3, dtype=torch.long)
    for call, message in (
        (lambda: model(ids[0]), r"tokens have shape \(3,\)"),
        (lambda: model(ids.float()), "dtype torch.float32"),
        (lambda: model(ids + 16), r"token 16 is outside the vocabulary; accepted are 0\.\.15"),
        (lambda: model.step(ids, model.init_state(2)), r"token has shape \(2, 3\)"),
        (lambda: model(ids, model.init_state(2).layers), "ModelState of 2 Mamba2LayerState"),
        (lambda: model(ids, model.init_state(3)), "state has shape"),
        (lambda: mixer(torch.zeros(2, 3, 11)), "width=12"),
        (lambda: mixer.step(torch.zeros(2, 3, 12)), "width=12"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
