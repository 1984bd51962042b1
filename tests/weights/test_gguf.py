"""GGUF: a model survives, blocks are decoded exactly, and what a file cannot hold or mean is refused by name."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import statewise
from statewise import WeightsError
from statewise.testing.memory import resident_peak
from statewise.weights import Checkpoint, gguf_names, read, write
from statewise.weights.gguf import read_gguf, write_gguf

SIZES = {"vocab_size": 24, "num_layers": 3, "width": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # fourteen blocks: those from the seventh and the thirteenth on are stored divided
    "rwkv6": ("rwkv6", {"num_layers": 14, "head_size": 8, "ffn_width": 96, "mix_rank": 3, "decay_rank": 5}),
    "rwkv7": (
        "rwkv7",
        {"head_size": 8, "ffn_width": 64, "decay_rank": 5, "iclr_rank": 6, "value_rank": 3, "gate_rank": 7},
    ),
    "mamba": ("mamba", {"state_size": 5, "dt_rank": 3, "norm_eps": 1e-4, "dt_min": 0.0123456789012345}),
    "falcon": ("mamba", {"inner_norm": "weightless", "inner_norm_eps": 2e-6, "tie_embeddings": False}),
    "mamba2": ("mamba2", {"state_size": 6, "head_size": 16, "groups": 2, "residual_in_fp32": False}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def model_of(name: str, **changes: Any) -> Any:
    """A model whose every tensor matters."""
    architecture, fields = MODELS[name]
    model = statewise.create(architecture, **{**SIZES, **fields, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@every_model
def test_a_model_survives(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    statewise.save(model, tmp_path / "model.gguf", "gguf")
    again = statewise.load(tmp_path / "model.gguf")
    assert again.config == model.config
    tokens = torch.randint(24, (2, 7))
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    for key, tensor in again.state_dict().items():
        # A_log is found from A: one with the same A, which may be another
        assert key.endswith("A_log") or torch.equal(tensor, model.state_dict()[key]), key
    statewise.save(again, tmp_path / "again.gguf", "gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_keep_their_dtype(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = model_of(name).to(dtype)
    statewise.save(model, tmp_path / "model.gguf", "gguf")
    _, tensors = read_gguf(tmp_path / "model.gguf")
    kept = {key.rpartition("blk.")[2].lstrip("0123456789.") for key, tensor in tensors.items() if tensor.dtype == dtype}
    assert {"token_embd.weight"} <= kept
    assert not any("norm" in key or key in ("ssm_a", "ssm_d", "time_mix_first.weight") for key in kept)
    assert all(tensor.dtype in (dtype, torch.float32) for tensor in tensors.values())
    again = statewise.load(tmp_path / "model.gguf", dtype=dtype)
    for key, tensor in again.state_dict().items():
        assert key.endswith("A_log") or torch.equal(tensor, model.state_dict()[key]), key


@pytest.mark.parametrize(
    "source",
    ["rwkv/v6_a.pth", "rwkv/v7_a.pth", *(f"mamba/models/{name}/hf" for name in ("mamba1_lm", "falcon_mamba_lm"))],
)
def test_published_layouts_become_gguf_and_stay_what_they_are(shared: Path, tmp_path: Path, source: str) -> None:
    model = statewise.load(shared / "golden" / source)
    statewise.save(model, tmp_path / "model.gguf", "gguf")
    again = statewise.load(tmp_path / "model.gguf")
    tokens = torch.randint(100, (1, 16))
    assert torch.equal(again(tokens)[0], model(tokens)[0])


def test_the_file_needs_no_name(tmp_path: Path) -> None:
    model = model_of("mamba")
    statewise.save(model, tmp_path / "model", "gguf")
    found = read(tmp_path / "model")
    assert (found.architecture, found.layout) == ("mamba", "gguf")


# Blocks


def test_a_block_of_q8_0_by_hand(tmp_path: Path) -> None:
    integers = [-128, 127, 0, 1, -1, *range(2, 29)]
    raw = struct.pack("<e32b", 0.0625, *integers)
    assert packed(tmp_path, 8, (1, 32), raw).tolist() == [[0.0625 * n for n in integers]]


def test_a_block_of_q4_0_by_hand(tmp_path: Path) -> None:
    """Byte n holds value n in its lower half and value n + 16 in its upper."""
    raw = struct.pack("<e16B", -0.5, *(low | (15 - low) << 4 for low in range(16)))
    expected = [-0.5 * (low - 8) for low in range(16)] + [-0.5 * (7 - low) for low in range(16)]
    assert packed(tmp_path, 2, (2, 16, 1), raw, inner_first=(32, 1)).tolist() == [expected]


@pytest.mark.parametrize(("number", "size"), [(8, 34), (2, 18)])
def test_many_blocks_are_one_after_the_other(tmp_path: Path, number: int, size: int) -> None:
    """More than are decoded at a time, the last piece shorter."""
    blocks = 2**15 + 7
    raw = torch.randint(256, (blocks, size), dtype=torch.uint8)
    raw.view(torch.float16)[:, 0] = torch.randn(blocks).half()
    found = packed(tmp_path, number, (blocks, 32), raw.numpy().tobytes())
    for row in (0, 2**15 - 1, 2**15, blocks - 1):
        one = packed(tmp_path, number, (1, 32), raw[row].numpy().tobytes())
        assert torch.equal(found[row], one[0])


def packed(
    tmp_path: Path, number: int, shape: tuple[int, ...], raw: bytes, inner_first: tuple[int, ...] | None = None
) -> Tensor:
    """The tensor of a file that holds one, of type ``number``."""
    axes = inner_first or shape[::-1]
    head = b"GGUF" + struct.pack(f"<IQQQ1sI{len(axes)}QIQ", 3, 1, 0, 1, b"x", len(axes), *axes, number, 0)
    path = tmp_path / "one.gguf"
    path.write_bytes(head + bytes(-len(head) % 32) + raw)
    return read_gguf(path)[1]["x"]


def test_memory_holds_a_file_once(tmp_path: Path) -> None:
    """Plain tensors as they are, blocks as the float32 they stand for."""
    plain = {f"x{i}": torch.ones(2048, 2048) for i in range(12)}  # 192 MiB
    write_gguf(tmp_path / "plain.gguf", {}, plain)
    plain.clear()
    blocks = 2**19
    infos = b"".join(
        struct.pack("<Q1sIQQIQ", 1, b"abcd"[i : i + 1], 2, 32, blocks, 8, i * blocks * 34) for i in range(4)
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, 4, 0) + infos
    (tmp_path / "blocks.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(4 * blocks * 34))
    for name in ("plain.gguf", "blocks.gguf"):
        before = resident_peak(reset=True)
        _, tensors = read_gguf(tmp_path / name)
        after = resident_peak(reset=False)
        size = sum(tensor.nbytes for tensor in tensors.values())
        del tensors
        if before is not None and after is not None:
            assert after - before <= 1.15 * size


# A = -exp(A_log)


@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=64))
def test_a_comes_back_to_the_bit(logarithms: list[float]) -> None:
    read_A, written_A = (getattr(gguf_names, name) for name in ("_log_of", "_exp_of"))
    A = written_A(torch.tensor(logarithms))
    assert torch.equal(written_A(read_A(A)), A)


def test_an_a_that_nothing_is_the_exponential_of_comes_within_its_spacing() -> None:
    A = -torch.rand(4096) * 100
    again = gguf_names._exp_of(gguf_names._log_of(A))
    assert ((again - A).abs() <= 4 * torch.finfo(torch.float32).eps * A.abs()).all()


def test_edges_of_a() -> None:
    edges = torch.tensor([-0.0, 0.0, -torch.inf, -1e-45])
    assert torch.equal(gguf_names._exp_of(gguf_names._log_of(edges)), edges)


# What a file may say otherwise


def rewrite(source: Path, target: Path, metadata: dict[str, Any], tensors: dict[str, Tensor | None]) -> Path:
    """``source`` with other metadata and tensors; ``None`` takes one away."""
    old, held = read_gguf(source)
    said = {**{"tokenizer.ggml.model": "none"}, **old, **metadata}
    kept = {name: tensor for name, tensor in {**held, **tensors}.items() if tensor is not None}
    write_gguf(target, {key: value for key, value in said.items() if value is not None}, kept)
    return target


def saved(tmp_path: Path, name: str, **changes: Any) -> Path:
    statewise.save(model_of(name, **changes), tmp_path / "model.gguf", "gguf")
    return tmp_path / "model.gguf"


def test_shares_may_stand_in_a_tensor_each(tmp_path: Path) -> None:
    """As conversions of RWKV-6 had them before they were fused."""
    source = saved(tmp_path, "rwkv6", num_layers=1)
    fused = read_gguf(source)[1]["blk.0.time_mix_lerp_fused.weight"]
    assert fused.shape == (5, 1, 1, 32)
    apart = {f"blk.0.time_mix_lerp_{x}.weight": fused[i].flatten() for i, x in enumerate("wkvrg")}
    target = rewrite(source, tmp_path / "early.gguf", {}, {**apart, "blk.0.time_mix_lerp_fused.weight": None})
    same(source, target)


def test_axes_of_one_may_be_dropped(tmp_path: Path) -> None:
    """ggml does not count outer axes of one when it writes a file anew."""
    source = saved(tmp_path, "mamba2", groups=1)
    norm = read_gguf(source)[1]["blk.1.ssm_norm.weight"]
    assert norm.shape == (1, 64)
    same(source, rewrite(source, tmp_path / "anew.gguf", {}, {"blk.1.ssm_norm.weight": norm.flatten()}))


def test_rwkv6_may_be_stored_undivided(tmp_path: Path) -> None:
    source = saved(tmp_path, "rwkv6")
    whole = {
        f"blk.{i}.{name}.weight": read_gguf(source)[1][f"blk.{i}.{name}.weight"] * 2 ** (i // 6)
        for i in range(14)
        for name in ("time_mix_output", "channel_mix_value")
    }
    for zero in (0, None):
        same(source, rewrite(source, tmp_path / "whole.gguf", {"rwkv6.rescale_every_n_layers": zero}, whole))


def test_numbers_too_small_to_be_halved_are_stored_undivided(tmp_path: Path) -> None:
    model = model_of("rwkv6").half()
    with torch.no_grad():
        model.blocks[13].att.output.weight[0, 0] = 2.0**-24  # float16's smallest
    statewise.save(model, tmp_path / "model.gguf", "gguf")
    assert read_gguf(tmp_path / "model.gguf")[0]["rwkv6.rescale_every_n_layers"] == 0
    again = statewise.load(tmp_path / "model.gguf", dtype=torch.float16)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def same(source: Path, target: Path) -> None:
    ours, theirs = statewise.load(source), statewise.load(target)
    assert theirs.config == ours.config
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())


def test_a_foreign_file_has_no_key_of_ours(tmp_path: Path) -> None:
    """Then fields that neither tensors nor llama.cpp's keys tell are the usual ones, or the caller's."""
    target = rewrite(saved(tmp_path, "falcon"), tmp_path / "foreign.gguf", {"statewise.config": None}, {})
    config = statewise.load(target).config
    assert (config.inner_norm, config.inner_norm_eps) == ("weightless", 1e-6)
    assert statewise.load(target, inner_norm_eps=1e-5).config.inner_norm_eps == 1e-5


def test_what_nothing_reads_is_not_kept(tmp_path: Path) -> None:
    """llama.cpp wants v0, v1 and v2 in RWKV-7's first block and reads none: copies of a0, a1 and a2 stand there."""
    model = model_of("rwkv7", keeps_unused=True, num_layers=1)
    statewise.save(model, tmp_path / "model.gguf", "gguf")
    metadata, tensors = read_gguf(tmp_path / "model.gguf")
    for n in range(3):
        assert torch.equal(tensors[f"blk.0.time_mix_v{n}.weight"], tensors[f"blk.0.time_mix_a{n}.weight"])
    assert metadata["rwkv7.attention.value_residual_mix_lora_rank"] == 6
    again = statewise.load(tmp_path / "model.gguf")
    assert not again.config.keeps_unused
    tokens = torch.randint(24, (1, 5))
    assert torch.equal(again(tokens)[0], model(tokens)[0])


WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("mamba", {"general.architecture": "llama"}, {}, "'llama'; accepted are rwkv6, rwkv7, mamba, mamba2"),
    ("mamba", {"general.architecture": 7}, {}, "general.architecture is 7"),
    ("mamba", {"general.architecture": "rwkv6"}, {}, "unknown tensor blk.0.ssm_"),
    ("mamba", {"mamba.block_count": 4}, {}, "mamba.block_count is 4, but the tensors have 3"),
    ("mamba", {"mamba.ssm.state_size": 16}, {}, "mamba.ssm.state_size is 16, but the tensors have 5"),
    ("mamba", {"mamba.ssm.time_step_rank": 2}, {}, "time_step_rank is 2, but the tensors have 3"),
    ("mamba", {"mamba.attention.layer_norm_rms_epsilon": "small"}, {}, "epsilon is None; expected a number"),
    ("mamba", {"mamba.attention.layer_norm_rms_epsilon": 2.0}, {}, "is 2.0; expected a number between 0 and 1"),
    ("mamba", {}, {"blk.0.ssm_a": torch.ones(64, 5)}, "blk.0.ssm_a of shape (64, 5) cannot be read: values above zero"),
    ("mamba", {}, {"blk.0.ssm_a": -torch.ones(64, 5, 1)}, "ssm_a has shape (64, 5, 1); expected 2 axes"),
    ("mamba", {}, {"blk.2.ssm_x.weight": None}, "layers.2.mixer.x_proj.weight is missing"),
    ("mamba", {}, {"blk.0.ssm_dt_norm.weight": torch.ones(3)}, "unknown tensor blk.0.ssm_dt_norm.weight"),
    ("mamba", {}, {"rope_freqs.weight": torch.ones(3)}, "unknown tensor rope_freqs.weight"),
    ("mamba", {"statewise.config": "{"}, {}, "statewise.config is not JSON"),
    ("mamba", {"statewise.config": "[" * 50_000}, {}, "statewise.config is not JSON"),
    ("mamba", {"statewise.config": '{"num_layers": 2}'}, {}, "accepted fields: inner_norm_eps"),
    ("mamba", {"statewise.config": '{"dt_min": "no"}'}, {}, "has dt_min='no'; accepted are truth values and numbers"),
    ("mamba", {"statewise.config": '{"dt_min": 1' + "0" * 400 + "}"}, {}, "has dt_min=1000"),
    ("mamba", {"statewise.config": '{"dt_min": 0}'}, {}, "dt_min is 0"),
    ("mamba", {"statewise.config": '{"dt_min": NaN}'}, {}, "has dt_min=nan"),
    ("mamba", {"statewise.config": '{"pad_vocab_multiple": 0}'}, {}, "has pad_vocab_multiple=0"),
    ("mamba", {"statewise.config": '{"pad_vocab_multiple": 7}'}, {}, "pads 24 rows to a multiple of 7"),
    ("mamba", {"mamba.ssm.dt_b_c_rms": 1}, {}, "dt_b_c_rms is 1; expected a truth value"),
    ("mamba2", {"mamba2.ssm.group_count": 3}, {}, "group_count is 3; expected with ssm.state_size 24 rows for B and C"),
    ("mamba2", {"mamba2.ssm.group_count": 4}, {}, "expected with ssm.state_size 24 rows"),
    ("mamba2", {"mamba2.ssm.group_count": 0}, {}, "group_count is 0; expected an integer from 1"),
    ("rwkv6", {"rwkv6.attention.layer_norm_epsilon": 1e-3}, {}, "; expected 1e-05"),
    ("rwkv6", {"rwkv6.rescale_every_n_layers": "often"}, {}, "layers is None; expected an integer from 0"),
    ("rwkv6", {"rwkv6.token_shift_count": 1}, {}, "token_shift_count is 1; expected 2"),
    ("rwkv6", {"rwkv6.time_mix_extra_dim": 32}, {}, "time_mix_extra_dim is 32, but the tensors have 3"),
    ("rwkv6", {}, {"blk.0.time_mix_lerp_w.weight": torch.ones(32)}, "says again what our blocks.0.att.time_maa_w is"),
    ("rwkv6", {}, {"blk.0.time_mix_w2.weight": torch.ones(32, 3)}, "has shape (32, 3); expected 3 axes"),
    (
        "rwkv6",
        {"rwkv6.rescale_every_n_layers": 1},
        {"blk.13.time_mix_output.weight": torch.full((32, 32), 1e38)},
        "finite",
    ),
    ("rwkv7", {"rwkv7.wkv.head_size": 7}, {}, "blk.0.time_mix_r_k.weight of shape (32,) cannot be read"),
    ("rwkv7", {"rwkv7.wkv.head_size": True}, {}, "head_size is True; expected an integer from 1"),
    ("rwkv7", {"rwkv7.attention.gate_lora_rank": 8}, {}, "gate_lora_rank is 8, but the tensors have 7"),
    ("rwkv7", {}, {"blk.1.time_mix_lerp_fused.weight": torch.ones(5, 1, 1, 32)}, "expected 6 mixtures"),
    ("rwkv7", {}, {"blk.1.time_mix_v1.weight": None}, "blocks.1.att.v1"),
]


@pytest.mark.parametrize(("name", "metadata", "tensors", "message"), WRONG, ids=lambda value: None)
def test_contradictions_are_named(
    tmp_path: Path, name: str, metadata: dict[str, Any], tensors: dict[str, Tensor | None], message: str
) -> None:
    target = rewrite(saved(tmp_path, name), tmp_path / "wrong.gguf", metadata, tensors)
    with pytest.raises(WeightsError) as caught:
        statewise.load(target)
    assert message in str(caught.value)
    assert str(target) in str(caught.value)


# What a file cannot hold


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mamba", {"expand": 3}, "no place for expand=3; it holds 2"),
        ("mamba", {"bias": True}, "no place for bias=True"),
        ("mamba", {"conv_bias": False}, "no place for conv_bias=False"),
        ("mamba", {"rms_norm": False}, "no place for rms_norm=False"),
        ("mamba", {"inner_norm": "weighted"}, "no place for inner_norm='weighted'"),
        ("mamba2", {"dt_limit": (0.0, 1.0)}, "no place for dt_limit"),
        ("mamba2", {"gated_norm": "before"}, "no place for gated_norm='before'"),
        ("mamba2", {"mlp_width": 128}, "no place for mlp_width=128"),
        ("mamba2", {"norm_groups": 1}, "no place for norm_groups=1"),
        ("rwkv7", {"group_norm_eps": 1e-5}, "no place for group_norm_eps"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_not_written(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="format 'gguf' has " + message.replace("(", r"\(")):
        statewise.save(model_of(name, **changes), tmp_path / "model.gguf", "gguf")
    assert not list(tmp_path.iterdir())


def test_other_architectures_and_dtypes_are_not_written(tmp_path: Path) -> None:
    other = statewise.create("rwkv4", vocab_size=8, num_layers=1, width=8)
    with pytest.raises(ValueError, match="cannot hold a rwkv4"):
        statewise.save(other, tmp_path / "model.gguf", "gguf")
    with pytest.raises(ValueError, match=r"tensor .* is torch\.float64"):
        statewise.save(model_of("mamba").double(), tmp_path / "model.gguf", "gguf")
    found = read(saved(tmp_path, "rwkv7"))
    more = Checkpoint(
        "rwkv7", {**dataclasses.asdict(model_of("rwkv7").config)}, {**found.tensors, "more": torch.ones(1)}, ""
    )
    with pytest.raises(ValueError, match="no place for tensor more"):
        write(tmp_path / "more.gguf", more, "gguf")
    with pytest.raises(ValueError, match=r"is a file, but .* is a directory"):
        statewise.save(model_of("mamba"), tmp_path, "gguf")


def test_our_own_key_holds_what_nothing_else_does(tmp_path: Path) -> None:
    metadata, _ = read_gguf(saved(tmp_path, "mamba"))
    assert isinstance(metadata["statewise.config"], str)
    assert json.loads(metadata["statewise.config"])["dt_min"] == 0.0123456789012345
