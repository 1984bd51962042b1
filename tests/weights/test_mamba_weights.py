"""Mamba's layouts: files come back as they were, models survive every one, contradictions are named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import statewise
from statewise.models.mamba import Mamba, MambaConfig
from statewise.weights.mamba import detect, from_ours, to_ours

FORMATS = {"state-spaces": "mamba-ssm", "hf": "hf", "mambapy": "mamba.py"}


def tensors_in(directory: Path) -> dict[str, Tensor]:
    for name in ("model.safetensors", "pytorch_model.bin", "model.pt"):
        if (path := directory / name).exists():
            return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    raise AssertionError(f"no tensors in {directory}")


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, layout) for name in ("mamba1_lm", "mamba1_lm_odd") for layout in FORMATS), ("falcon_mamba_lm", "hf")],
)
def test_published_files_come_back(shared: Path, tmp_path: Path, name: str, layout: str) -> None:
    source = shared / "golden/mamba/models" / name / layout
    model = statewise.load(source)
    statewise.save(model, tmp_path / "again", FORMATS[layout])
    before, after = tensors_in(source), tensors_in(tmp_path / "again")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    old, new = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "again"))
    stated = {**old, **old.get("ssm_cfg", {})}
    written = {**new, **new.get("ssm_cfg", {})}
    for key in set(stated) & set(written) - {"ssm_cfg", "vocab_size", "dt_rank"}:
        assert stated[key] == written[key], key
    assert written["vocab_size"] == before[next(key for key in before if "embedding" in key)].shape[0]
    assert statewise.load(tmp_path / "again").config == model.config


def test_every_layout_gives_the_same_model(shared: Path) -> None:
    home = shared / "golden/mamba/models/mamba1_lm_odd"
    models = [statewise.load(home / layout) for layout in FORMATS]
    ids = torch.randint(0, 256, (1, 9))
    for model in models[1:]:
        assert model.config == models[0].config
        assert torch.equal(model(ids)[0], models[0](ids)[0])


OPTIONS: dict[str, dict[str, Any]] = {
    "mamba-ssm": {"rms_norm": False, "bias": True, "dt_min": 0.01, "pad_vocab_multiple": 1, "vocab_size": 13},
    "hf": {"inner_norm": "weightless", "norm_eps": 1e-4, "tie_embeddings": False, "expand": 3},
    "mamba.py": {"inner_norm": "weighted", "norm_eps": 1e-4, "inner_norm_eps": 1e-4, "conv_width": 3, "dt_rank": 5},
}


@pytest.mark.parametrize("format", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_survives(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    options = {"vocab_size": 24, "num_layers": 2, "width": 20, "state_size": 3, **OPTIONS[format]}
    model = Mamba(MambaConfig(**options)).to(dtype)
    statewise.save(model, tmp_path / "kept", format)
    again = statewise.load(tmp_path / "kept", dtype=dtype)
    assert again.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert {value.dtype for value in tensors_in(tmp_path / "kept").values()} == {dtype}


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("mamba-ssm", {"inner_norm": "weighted"}, "no place for inner_norm='weighted'"),
        ("mamba-ssm", {"norm_eps": 1e-6}, "no place for norm_eps"),
        ("hf", {"inner_norm": "weighted"}, "no place for inner_norm='weighted'; it holds None, 'weightless'"),
        ("hf", {"rms_norm": False}, "no place for LayerNorm"),
        ("mamba.py", {"inner_norm": "weightless"}, "no place for inner_norm='weightless'"),
        ("mamba.py", {"inner_norm": "weighted"}, "one epsilon for all norms"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(
    tmp_path: Path, format: str, options: dict[str, Any], message: str
) -> None:
    model = Mamba(MambaConfig(vocab_size=8, num_layers=1, width=16, **options))
    with pytest.raises(ValueError, match=message):
        statewise.save(model, tmp_path / "kept", format)


def parts(layout: str = "transformers", **options: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A small checkpoint in a layout."""
    model = Mamba(MambaConfig(vocab_size=8, num_layers=2, width=16, **options))
    return from_ours(layout, dataclasses.asdict(model.config), dict(model.state_dict()))


@pytest.mark.parametrize("layout", ["state-spaces", "transformers", "mamba.py"])
def test_bare_tensors_are_enough(layout: str) -> None:
    _, tensors = parts(layout, state_size=5, conv_width=3, dt_rank=7, bias=True, conv_bias=False)
    assert detect(None, set(tensors)) == layout
    fields, renamed = to_ours(layout, {}, tensors)
    config = MambaConfig(**fields)
    assert (config.state_size, config.conv_width, config.dt_rank, config.bias, config.conv_bias) == (
        5,
        3,
        7,
        True,
        False,
    )
    assert config.tie_embeddings
    assert set(renamed) == set(Mamba(config).state_dict())


@pytest.mark.parametrize("layout", ["state-spaces", "transformers", "mamba.py"])
def test_an_untied_head_is_found_without_a_configuration(layout: str) -> None:
    _, tensors = parts(layout, tie_embeddings=False)
    assert not to_ours(layout, {}, tensors)[0]["tie_embeddings"]


@pytest.mark.parametrize(
    "names",
    [
        {"backbone.embedding.weight", "backbone.layers.0.mixer.dt_bias"},  # Mamba-2
        {"emb.weight", "blocks.0.att.time_decay"},
        {"backbone.layers.0.mixer.x_proj.weight"},
        set(),
    ],
)
def test_what_is_no_mamba(names: set[str]) -> None:
    assert detect({"model_type": "mamba"}, names) is None


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("transformers", {"hidden_size": 17}, "hidden_size is 17, but the tensors have 16"),
        ("transformers", {"num_hidden_layers": 3}, "num_hidden_layers is 3, but the tensors have 2"),
        ("transformers", {"state_size": 4}, "state_size is 4"),
        ("transformers", {"conv_kernel": 3}, "conv_kernel is 3"),
        ("transformers", {"intermediate_size": 64}, "intermediate_size is 64"),
        ("transformers", {"time_step_rank": 2}, "time_step_rank is 2"),
        ("transformers", {"use_bias": True}, "use_bias is True"),
        ("transformers", {"use_conv_bias": False}, "use_conv_bias is False"),
        ("transformers", {"vocab_size": 100}, "vocab_size is 100"),
        ("transformers", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("state-spaces", {"ssm_cfg": {"d_state": 4}}, "d_state is 4"),
        ("state-spaces", {"ssm_cfg": {"expand": 4}}, "expand is 4, but the tensors have 2"),
        ("state-spaces", {"ssm_cfg": {"layer": "Mamba2"}}, "layer is 'Mamba2'"),
        ("state-spaces", {"ssm_cfg": 7}, "ssm_cfg is 7"),
        ("state-spaces", {"rms_norm": False}, "rms_norm is False"),
        ("state-spaces", {"attn_layer_idx": [1]}, "attn_layer_idx"),
        ("state-spaces", {"d_intermediate": 32}, "d_intermediate is 32"),
        ("state-spaces", {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0"),
        ("mamba.py", {"d_model": 15}, "d_model is 15"),
        ("mamba.py", {"inner_layernorms": True}, "no weights for norms inside the mixer"),
    ],
)
def test_contradictions_are_named(layout: str, change: dict[str, Any], message: str) -> None:
    config, tensors = parts(layout)
    with pytest.raises(ValueError, match=message):
        to_ours(layout, {**config, **change}, tensors)


def test_an_expand_that_nothing_reads() -> None:
    """FalconMamba-7B says expand 16 beside an intermediate_size of twice its width."""
    config, tensors = parts(inner_norm="weightless")
    fields, _ = to_ours("transformers", {**config, "expand": 16}, tensors)
    assert fields["expand"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.layers.0.mixer.A_log": None}, "A_log is missing"),
        ({"backbone.layers.0.mixer.A_log": torch.zeros(33, 16)}, "no multiple of the width 16"),
        ({"backbone.layers.0.mixer.conv1d.weight": torch.zeros(32, 4)}, r"conv1d.weight has shape \(32, 4\)"),
        ({"backbone.embeddings.weight": torch.zeros(8, 0)}, "none empty"),
        ({"backbone.layers.5.norm.weight": torch.zeros(16)}, "without gaps"),
        ({"lm_head.weight": torch.ones(8, 16)}, "tied, but lm_head.weight differs"),
    ],
)
def test_damage_is_named(change: dict[str, Tensor | None], message: str) -> None:
    config, tensors = parts()
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    with pytest.raises(ValueError, match=message):
        to_ours("transformers", config, tensors)


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    config, tensors = parts()
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file({**own, "backbone.layers.1.mixer.extra": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(statewise.WeightsError, match=r"backbone\.layers\.1\.mixer\.extra"):
        statewise.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 99}))
    with pytest.raises(statewise.WeightsError, match="hidden_size is 99"):
        statewise.load(tmp_path)


def test_a_tied_embedding_may_hold_nan(tmp_path: Path) -> None:
    model = statewise.create("mamba", vocab_size=16, num_layers=1, width=16).to(torch.bfloat16)
    with torch.no_grad():
        model.backbone.embedding.weight[3, 5] = torch.nan
    statewise.save(model, tmp_path / "model", "mamba-ssm")
    again = statewise.load(tmp_path / "model")
    assert torch.isnan(again.lm_head.weight).nonzero().tolist() == [[3, 5]]
    assert again.lm_head.weight is again.backbone.embedding.weight
