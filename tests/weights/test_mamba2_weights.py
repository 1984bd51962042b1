"""Mamba-2's layouts: files come back as they were, models survive both, contradictions are named."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor

import statewise
from statewise.models.mamba2 import Mamba2, Mamba2Config
from statewise.weights import mamba
from statewise.weights.mamba2 import LAYOUTS, detect, from_ours, to_ours

FOLDER = {"state-spaces": "state-spaces", "hf": "transformers"}


def published(shared: Path, name: str, folder: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    home = shared / "golden/mamba/models" / name / folder
    binary = home / "pytorch_model.bin"
    tensors = torch.load(binary, weights_only=True) if binary.exists() else load_file(home / "model.safetensors")
    return json.loads((home / "config.json").read_text()), tensors


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without its inner object, infinities as numbers."""
    config = {**config, **config.get("ssm_cfg", {})}
    for key in ("time_step_limit", "dt_limit"):
        if key in config:
            config[key] = [float(end["__float__"]) if isinstance(end, dict) else end for end in config[key]]
    return config


@pytest.mark.parametrize("name", ["mamba2_lm", "mamba2_lm_groups", "mamba2_lm_dt_limit"])
@pytest.mark.parametrize("folder", FOLDER)
def test_published_files_come_back(shared: Path, name: str, folder: str) -> None:
    stated, before = published(shared, name, folder)
    layout = detect(stated, set(before))
    assert layout == FOLDER[folder]
    assert mamba.detect(stated, set(before)) is None
    fields, ours = to_ours(layout, stated, before)
    config = Mamba2Config(**fields)
    written, after = from_ours(layout, dataclasses.asdict(config), ours)
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    old, new = flat(stated), flat(json.loads(json.dumps(written)))
    for key in set(old) & set(new) - {"ssm_cfg", "vocab_size"}:
        assert old[key] == new[key], key
    assert new["vocab_size"] == before[next(key for key in before if "embedding" in key)].shape[0]
    unread = {"chunk_size", "initializer_range", "rescale_prenorm_residual", "transformers_version", "use_cache"}
    assert set(old) - set(new) <= unread | {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert Mamba2Config(**to_ours(layout, written, after)[0]) == config


@pytest.mark.parametrize("name", ["mamba2_lm", "mamba2_lm_groups", "mamba2_lm_dt_limit"])
def test_both_layouts_give_the_same_model(shared: Path, name: str) -> None:
    read = []
    for folder, layout in FOLDER.items():
        fields, ours = to_ours(layout, *published(shared, name, folder))
        read.append((Mamba2Config(**fields), ours))
    (one, these), (other, those) = read
    assert one == other
    assert set(these) == set(those)
    assert all(torch.equal(these[key], those[key]) for key in these)


FORMAT = {"state-spaces": "mamba-ssm", "transformers": "hf"}


@pytest.mark.parametrize("name", ["mamba2_lm", "mamba2_lm_groups", "mamba2_lm_dt_limit"])
@pytest.mark.parametrize("folder", FOLDER)
def test_published_directories_open_and_are_written_again(shared: Path, tmp_path: Path, name: str, folder: str) -> None:
    source = shared / "golden/mamba/models" / name / folder
    model = statewise.load(source)
    assert isinstance(model, Mamba2)
    for format in (FORMAT[FOLDER[folder]], "statewise"):
        statewise.save(model, tmp_path / format, format)
        again = statewise.load(tmp_path / format)
        assert again.config == model.config
        assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    kind = "pytorch_model.bin" if folder == "state-spaces" else "model.safetensors"
    read = (lambda path: torch.load(path, weights_only=True)) if folder == "state-spaces" else load_file
    before, after = read(source / kind), read(tmp_path / FORMAT[FOLDER[folder]] / kind)
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_directory_in_several_files(shared: Path, tmp_path: Path) -> None:
    config, tensors = published(shared, "mamba2_lm_groups", "hf")
    names = sorted(tensors)
    pieces = {f"model-0000{n + 1}-of-00003.safetensors": names[n::3] for n in range(3)}
    for file, held in pieces.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    weight_map = {name: file for file, held in pieces.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = statewise.load(shared / "golden/mamba/models/mamba2_lm_groups/hf")
    model = statewise.load(tmp_path)
    assert model.config == whole.config
    assert all(torch.equal(model.state_dict()[key], value) for key, value in whole.state_dict().items())
    del weight_map["backbone.layers.1.mixer.D"]
    for file, held in pieces.items():
        kept = {name: tensors[name] for name in held if name != "backbone.layers.1.mixer.D"}
        save_file(kept, tmp_path / file)
    with pytest.raises(statewise.WeightsError, match=r"tensor backbone\.layers\.1\.mixer\.D is missing"):
        statewise.load(tmp_path)


def test_bare_tensors_are_refused_until_the_groups_are_given(tmp_path: Path) -> None:
    model = Mamba2(Mamba2Config(**{**SMALL, "groups": 2}))
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(statewise.WeightsError, match="has shape"):
        statewise.load(tmp_path / "bare.pth")
    again = statewise.load(tmp_path / "bare.pth", groups=2, state_size=3)
    ids = torch.randint(0, 24, (1, 7))
    assert torch.equal(again(ids)[0], model(ids)[0])


SMALL: dict[str, Any] = {"vocab_size": 24, "num_layers": 2, "width": 20, "state_size": 3, "head_size": 5}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("state-spaces", {"rms_norm": False, "bias": True, "dt_min": 0.01, "pad_vocab_multiple": 1, "vocab_size": 13}),
    ("state-spaces", {"groups": 2, "gated_norm": "before", "dt_limit": (0.01, math.inf), "A_min": 0.5}),
    ("state-spaces", {"gated_norm": None, "D_per_channel": True, "tie_embeddings": False, "conv_bias": False}),
    ("state-spaces", {"ssm_width": 20, "mlp_width": 100, "conv_width": 3, "expand": 3, "dt_limit": (0.0, 0.5)}),
    ("state-spaces", {"ssm_width": 20, "gated_norm": None, "D_per_channel": True, "groups": 4}),
    ("transformers", {"groups": 2, "norm_eps": 1e-4, "tie_embeddings": False, "expand": 3, "vocab_size": 32}),
    ("transformers", {"bias": True, "conv_bias": False, "conv_width": 2, "dt_limit": (0.1, 0.5), "A_max": 3.0}),
]


@pytest.mark.parametrize(("layout", "options"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_survives(layout: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = Mamba2(Mamba2Config(**{**SMALL, **options})).to(dtype)
    config, tensors = from_ours(layout, dataclasses.asdict(model.config), dict(model.state_dict()))
    config = json.loads(json.dumps(config))
    assert detect(config, set(tensors)) == layout
    assert mamba.detect(config, set(tensors)) is None
    fields, renamed = to_ours(layout, config, tensors)
    assert Mamba2Config(**fields) == model.config
    own = model.state_dict()
    assert set(renamed) == set(own)
    assert all(torch.equal(renamed[key], own[key]) and renamed[key].dtype == dtype for key in own)


@st.composite
def configurations(draw: st.DrawFn) -> Mamba2Config:
    """Anything state-spaces' layout holds."""
    head, groups, ratio, expand = (draw(st.integers(1, 3)) for _ in range(4))
    beside = draw(st.integers(0, 2)) * head  # channels of an MLP beside the heads
    channels = head * groups * ratio
    width = -(-(channels + beside) // expand)
    limit = draw(st.sampled_from([(0.0, math.inf), (0.0, 0.25), (0.5, math.inf), (0.125, 0.5)]))
    return Mamba2Config(
        vocab_size=draw(st.integers(1, 20)),
        num_layers=draw(st.integers(1, 2)),
        width=width,
        state_size=draw(st.integers(1, 4)),
        head_size=head,
        groups=groups,
        conv_width=draw(st.integers(1, 4)),
        expand=expand,
        ssm_width=channels,
        gated_norm=draw(st.sampled_from([None, "after", "before"])),
        D_per_channel=draw(st.booleans()),
        dt_limit=limit,
        mlp_width=draw(st.sampled_from([None, 5, 200])),
        bias=draw(st.booleans()),
        conv_bias=draw(st.booleans()),
        rms_norm=draw(st.booleans()),
        residual_in_fp32=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        pad_vocab_multiple=draw(st.sampled_from([1, 8, 16])),
        dt_floor=draw(st.sampled_from([1e-4, 1e-3])),
        A_max=draw(st.sampled_from([1.0, 16.0])),
    )


@settings(max_examples=60, deadline=None)
@given(config=configurations())
def test_whatever_state_spaces_can_hold_comes_back(config: Mamba2Config) -> None:
    own = Mamba2(config).state_dict()
    written, tensors = from_ours("state-spaces", dataclasses.asdict(config), dict(own))
    written = json.loads(json.dumps(written))
    assert detect(written, set(tensors)) == "state-spaces"
    fields, renamed = to_ours("state-spaces", written, tensors)
    assert Mamba2Config(**fields) == config
    assert set(renamed) == set(own)
    assert all(torch.equal(renamed[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("state-spaces", {"norm_eps": 1e-6}, "no place for norm_eps=1e-06; it holds 1e-05"),
        ("state-spaces", {"groups": 2, "norm_groups": 1}, "no place for norm_groups=1; it holds None"),
        ("transformers", {"groups": 2, "norm_groups": 1}, "no place for norm_groups=1"),
        ("transformers", {"gated_norm": "before"}, "no place for gated_norm='before'; it holds 'after'"),
        ("transformers", {"gated_norm": None}, "no place for gated_norm=None"),
        ("transformers", {"ssm_width": 20}, "no place for ssm_width=20"),
        ("transformers", {"D_per_channel": True}, "no place for D_per_channel=True"),
        ("transformers", {"mlp_width": 128}, "no place for mlp_width=128"),
        ("transformers", {"rms_norm": False}, "no place for rms_norm=False"),
        ("mamba.py", {}, "layout is 'mamba.py'; accepted are 'state-spaces', 'transformers'"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(layout: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts(layout, **options)


def parts(layout: str = "transformers", **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A small checkpoint in a layout."""
    model = Mamba2(Mamba2Config(**{**SMALL, **options}))
    return from_ours(layout, dataclasses.asdict(model.config), dict(model.state_dict()))


@pytest.mark.parametrize(
    "spelling",
    [
        '{"__float__": "Infinity"}',  # transformers 5
        "Infinity",  # before, and json's own
        '"Infinity"',
        '"inf"',
        "1e999",
    ],
)
def test_infinity_however_it_is_spelt(spelling: str) -> None:
    config, tensors = parts()
    config["time_step_limit"] = json.loads(f"[0.0, {spelling}]")
    assert to_ours("transformers", config, tensors)[0]["dt_limit"] == (0.0, math.inf)
    config["time_step_limit"] = json.loads(f"[0.001, {spelling}]")
    assert to_ours("transformers", config, tensors)[0]["dt_limit"] == (0.001, math.inf)


def test_a_limit_below_zero_limits_nothing() -> None:
    config, tensors = parts()
    for low in (-math.inf, -1.0, {"__float__": "-Infinity"}):
        fields, _ = to_ours("transformers", {**config, "time_step_limit": [low, 0.5]}, tensors)
        assert fields["dt_limit"] == (0.0, 0.5)


@pytest.mark.parametrize("limit", [3, [0.0], [0.0, None], [0.0, "much"], [0.0, {"__float__": []}], [0.0, math.nan]])
def test_what_is_no_limit(limit: Any) -> None:
    config, tensors = parts()
    with pytest.raises(ValueError, match="time_step_limit is"):
        to_ours("transformers", {**config, "time_step_limit": limit}, tensors)


def test_what_an_early_configuration_leaves_out() -> None:
    """state-spaces' published ones say ``{"layer": "Mamba2"}`` and no more; the rest are its defaults."""
    model = Mamba2(Mamba2Config(vocab_size=50, num_layers=1, width=64))
    _, tensors = from_ours("state-spaces", dataclasses.asdict(model.config), dict(model.state_dict()))
    config = {"d_model": 64, "n_layer": 1, "vocab_size": 50, "ssm_cfg": {"layer": "Mamba2"}}
    config |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16}
    assert Mamba2Config(**to_ours("state-spaces", config, tensors)[0]) == model.config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bare_tensors_tell_all_but_the_groups(layout: str) -> None:
    _, tensors = parts(layout, groups=2, conv_width=3, bias=True, conv_bias=False)
    assert detect(None, set(tensors)) == layout
    fields, renamed = to_ours(layout, {}, tensors)
    assert not {"groups", "state_size"} & set(fields)
    config = Mamba2Config(**fields, groups=2, state_size=3)
    expected = Mamba2(config).state_dict()
    assert {key: value.shape for key, value in renamed.items()} == {k: v.shape for k, v in expected.items()}
    assert (config.bias, config.conv_bias, config.conv_width, config.tie_embeddings) == (True, False, 3, True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_untied_head_is_found_without_being_told(layout: str) -> None:
    config, tensors = parts(layout, tie_embeddings=False)
    assert not to_ours(layout, {}, tensors)[0]["tie_embeddings"]
    config.pop("tie_embeddings", None)
    if config.pop("tie_word_embeddings", None) is not None:
        assert not to_ours(layout, config, tensors)[0]["tie_embeddings"]
    else:  # state-spaces ties unless told otherwise
        with pytest.raises(ValueError, match=r"tied, but lm_head\.weight differs"):
            to_ours(layout, config, tensors)


MAMBA2 = {f"backbone.layers.0.mixer.{part}" for part in ("A_log", "dt_bias", "in_proj.weight", "conv1d.weight")}


@pytest.mark.parametrize(
    "names",
    [
        {"backbone.embedding.weight", "backbone.layers.0.mixer.x_proj.weight", *MAMBA2},  # no generation's
        {"backbone.embedding.weight", *MAMBA2} - {"backbone.layers.0.mixer.conv1d.weight"},  # Mamba-3 has none
        {"emb.weight", "blocks.0.att.time_decay"},
        MAMBA2,  # a mixer, no language model
        set(),
    ],
)
def test_what_is_no_mamba2(names: set[str]) -> None:
    assert detect({"model_type": "mamba2"}, names) is None


def test_mamba1_is_not_taken_for_mamba2(shared: Path) -> None:
    for folder in FOLDER:
        config, tensors = published(shared, "mamba1_lm", folder)
        assert detect(config, set(tensors)) is None


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("transformers", {"hidden_size": 17}, "hidden_size is 17, but the tensors have 20"),
        ("transformers", {"num_hidden_layers": 3}, "num_hidden_layers is 3, but the tensors have 2"),
        ("transformers", {"state_size": 4}, "n_groups is 1 and state_size is 4, but the tensors have 3 rows"),
        ("transformers", {"n_groups": 3}, "n_groups is 3 and state_size is 3"),
        ("transformers", {"state_size": None}, "state_size is 128"),
        ("transformers", {"num_heads": 4}, "num_heads is 4, but the tensors have 8"),
        ("transformers", {"head_dim": 10}, "head_dim is 10, but the tensors have 5"),
        ("transformers", {"conv_kernel": 3}, "conv_kernel is 3"),
        ("transformers", {"expand": 4}, "expand is 4, but the tensors have 2"),
        ("transformers", {"use_bias": True}, "use_bias is True"),
        ("transformers", {"use_conv_bias": False}, "use_conv_bias is False"),
        ("transformers", {"vocab_size": 100}, "vocab_size is 100"),
        ("transformers", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("transformers", {"model_type": "nemotron_h"}, "model_type is 'nemotron_h'"),
        ("transformers", {"A_init_range": 3}, "A_init_range is 3; expected two numbers"),
        ("state-spaces", {"ssm_cfg": {"d_state": 4}}, "d_state is 4"),
        ("state-spaces", {"ssm_cfg": {"headdim": 64, "d_state": 3}}, "headdim is 64, but the tensors have 5"),
        ("state-spaces", {"ssm_cfg": {"d_ssm": 20, "d_state": 3}}, "d_ssm is 20, but the tensors have 40"),
        ("state-spaces", {"ssm_cfg": {"rmsnorm": False, "d_state": 3}}, "rmsnorm is False, but the tensors have back"),
        ("state-spaces", {"ssm_cfg": {"norm_before_gate": "no", "d_state": 3}}, "norm_before_gate is 'no'"),
        ("state-spaces", {"ssm_cfg": {"D_has_hdim": True, "d_state": 3}}, "D_has_hdim is True"),
        ("state-spaces", {"ssm_cfg": {"activation": "gelu"}}, "activation is 'gelu'"),
        ("state-spaces", {"ssm_cfg": {"layer": "Mamba1"}}, "layer is 'Mamba1'"),
        ("state-spaces", {"ssm_cfg": 7}, "ssm_cfg is 7"),
        ("state-spaces", {"rms_norm": False}, "rms_norm is False"),
        ("state-spaces", {"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]: blocks of attention are not read"),
        ("state-spaces", {"d_intermediate": 32}, "d_intermediate is 32, but the tensors have None"),
        ("state-spaces", {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0"),
    ],
)
def test_contradictions_are_named(layout: str, change: dict[str, Any], message: str) -> None:
    config, tensors = parts(layout)
    with pytest.raises(ValueError, match=message):
        to_ours(layout, {**config, **change}, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A_log": None}, "A_log is missing"),
        ({"A_log": torch.zeros(8, 3)}, r"A_log has shape \(8, 3\); expected 1 dimensions"),
        ({"A_log": torch.zeros(7)}, "fit no Mamba-2"),
        ({"in_proj.weight": torch.zeros(88, 20)}, r"in_proj.weight \(88 rows\).* fit no Mamba-2"),
        ({"conv1d.weight": torch.zeros(48, 1, 4)}, "fit no Mamba-2"),
        ({"conv1d.weight": torch.zeros(46, 4)}, r"conv1d.weight has shape \(46, 4\)"),
        ({"out_proj.weight": torch.zeros(20, 41)}, "no multiple of the width 20"),
        ({"D": torch.zeros(9)}, "D has 9 values; expected 8, one a head, or 40"),
    ],
)
def test_damage_is_named(change: dict[str, Tensor | None], message: str) -> None:
    config, tensors = parts()
    for name, value in change.items():
        if value is None:
            del tensors[f"backbone.layers.0.mixer.{name}"]
        else:
            tensors[f"backbone.layers.0.mixer.{name}"] = value
    with pytest.raises(ValueError, match=message):
        to_ours("transformers", config, tensors)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("backbone.embeddings.weight", torch.zeros(8, 0), "none empty"),
        ("backbone.layers.5.norm.weight", torch.zeros(20), "without gaps"),
        ("lm_head.weight", torch.ones(32, 20), "tied, but lm_head.weight differs from backbone.embeddings.weight"),
    ],
)
def test_damage_beside_the_mixer_is_named(name: str, value: Tensor, message: str) -> None:
    config, tensors = parts()
    with pytest.raises(ValueError, match=message):
        to_ours("transformers", config, {**tensors, name: value})
