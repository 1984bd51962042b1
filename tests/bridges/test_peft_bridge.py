"""LoRA on every projection of every model, by the package peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import statewise
from statewise.errors import WeightsError
from statewise.training import language_model_loss

peft = pytest.importorskip("peft", reason="peft is not installed: `make parity` installs it")

from statewise.bridges.peft import add_lora, load_adapter, merge, projections, save_adapter  # noqa: E402
from tests.docs.markdown_page import blocks  # noqa: E402

VOCAB = 40
SMALL = {"vocab_size": 256, "num_layers": 2, "width": 64}  # as on the page
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba": {"tie_embeddings": False},
    "mamba2": {"head_size": 16, "mlp_width": 48, "tie_embeddings": False},
    "mamba3": {"head_size": 16, "state_size": 16, "mlp_width": 48, "tie_embeddings": False},
    "rwkv4": {},
    "rwkv5": {"head_size": 16},
    "rwkv6": {"head_size": 16},
    "rwkv7": {"head_size": 16},
}
ENDS = {
    "mamba": {"in_proj", "x_proj", "dt_proj", "out_proj", "lm_head"},
    "mamba2": {"in_proj", "out_proj", "fc1", "fc2", "lm_head"},
    "mamba3": {"in_proj", "out_proj", "fc1", "fc2", "lm_head"},
    "rwkv4": {"key", "value", "receptance", "output", "head"},
    "rwkv5": {"key", "value", "receptance", "gate", "output", "head"},
    "rwkv6": {"key", "value", "receptance", "gate", "output", "head"},
    "rwkv7": {"key", "value", "receptance", "output", "head"},
}
# Where the outputs of two orders of the same float32 sums may differ, for logits of a few units.
LIMIT = 2e-5


def build(name: str, **more: Any) -> Any:
    torch.manual_seed(3)
    model = statewise.create(name, vocab_size=VOCAB, num_layers=2, width=32, **OPTIONS[name] | more)
    with torch.no_grad():  # fresh models hold zeros, which would hide what comes before them
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(name="make", params=sorted(OPTIONS))
def _make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return lambda **more: build(request.param, **more)


def ids(time: int = 11) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, time), generator=torch.Generator().manual_seed(time))


def stir_adapters(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))


def test_a_table_row_for_every_model() -> None:
    assert sorted(OPTIONS) == statewise.list_models("language")


def test_every_matrix_that_multiplies_is_listed(make: Callable[..., Any]) -> None:
    model = make()
    names = projections(model)
    family = model.init_state(1).family
    assert {name.rpartition(".")[2] for name in names} == ENDS[family]
    matrices = {
        name.removesuffix(".weight")
        for name, p in model.named_parameters()
        if name.endswith(".weight") and p.dim() == 2
    }
    assert set(names) == matrices - {"emb", "backbone.embedding"}
    add_lora(model, 2, 4)
    assert projections(model) == names


@torch.no_grad()
def test_each_projection_alone_changes_every_form(make: Callable[..., Any]) -> None:
    """A projection multiplied behind its module's back would leave the outputs as they were."""
    want, _ = make()(ids())
    for name in projections(make()):
        model = add_lora(make(), 2, 4, [name])
        assert torch.equal(model(ids())[0], want), f"{name}: an untrained adapter adds nothing"
        stir_adapters(model)
        logits, state = model(ids())
        assert float((logits - want).abs().max()) > 1e-4, name
        before = model(ids()[:, :-1])[1]
        last, after = model.step(ids()[:, -1], before)
        assert float((last - logits[:, -1]).abs().max()) <= LIMIT, name
        assert float((last - want[:, -1]).abs().max()) > 1e-5, name
        for a, b in zip(torch.utils._pytree.tree_leaves(after), torch.utils._pytree.tree_leaves(state), strict=True):
            assert float((a - b).abs().max()) <= LIMIT * max(1.0, float(b.abs().max())), name


@torch.no_grad()
def test_merged_equals_unmerged(make: Callable[..., Any], tmp_path: Path) -> None:
    model = add_lora(make(), 4, 8)
    stir_adapters(model)
    want, _ = model(ids())
    assert merge(model) is model
    assert list(model.state_dict()) == list(make().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert float((model(ids())[0] - want).abs().max()) <= LIMIT * float(want.abs().max())
    statewise.save(model, tmp_path / "merged")
    assert torch.equal(statewise.load(tmp_path / "merged")(ids())[0], model(ids())[0])


def test_training_lowers_the_loss_and_leaves_the_base(make: Callable[..., Any], tmp_path: Path) -> None:
    model = add_lora(make(), 4, 8)
    base = {name: value.clone() for name, value in model.state_dict().items() if ".lora_" not in name}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained == [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    assert len(trained) == 2 * len(projections(model))
    optimizer = torch.optim.Adam(trained, 1e-2)
    tokens = (torch.arange(25) * 7 % VOCAB).repeat(2, 1)
    losses = []
    for _ in range(50):
        loss = language_model_loss(model(tokens[:, :-1])[0], tokens[:, 1:])
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        if not losses[1:]:
            assert all(p.grad is not None for p in trained)
            assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    for name, value in model.state_dict().items():
        assert ".lora_" in name or torch.equal(value, base[name]), name

    want, _ = model(ids())
    save_adapter(model, tmp_path)
    again = load_adapter(make(), tmp_path)
    assert torch.equal(again(ids())[0], want)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


@torch.no_grad()
def test_files_are_pefts_own(tmp_path: Path) -> None:
    ours = add_lora(build("mamba"), 4, 8, ["out_proj", "x_proj"])
    stir_adapters(ours)
    want, _ = ours(ids())
    save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build("mamba"), tmp_path / "ours")
    assert torch.equal(theirs(ids())[0], want)
    assert torch.equal(theirs.step(ids()[:, 0], theirs.init_state(2))[0], ours.step(ids()[:, 0], ours.init_state(2))[0])
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_adapter(build("mamba"), tmp_path / "theirs")(ids())[0], want)


@torch.no_grad()
def test_generation_goes_through_the_adapters() -> None:
    model = add_lora(build("rwkv7"), 4, 32)
    plain = list(statewise.generate(model, [1, 2, 3], max_tokens=12, temperature=0))
    stir_adapters(model)
    tuned = list(statewise.generate(model, [1, 2, 3], max_tokens=12, temperature=0))
    assert tuned != plain
    assert list(statewise.generate(merge(model), [1, 2, 3], max_tokens=12, temperature=0)) == tuned


def test_a_tied_head_is_no_projection() -> None:
    model = build("mamba", tie_embeddings=True)
    assert "lm_head" not in projections(model)
    with pytest.raises(ValueError, match="'lm_head' names no projection"):
        add_lora(model, 2, 4, ["lm_head"])


def test_adapters_of_a_half_model_are_float32() -> None:
    model = add_lora(build("rwkv4").bfloat16(), 2, 4)
    dtypes = {(".lora_" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    logits, _ = model(ids())
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert {parameter.dtype for parameter in merge(model).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"targets": []}, r"targets is \[\]"),
        ({"targets": "key"}, "targets is 'key'"),
        ({"targets": ["key", "nonsense"]}, "'nonsense' names no projection"),
        ({"targets": ["emb"]}, "'emb' names no projection"),
    ],
)
def test_what_add_lora_refuses(arguments: dict[str, Any], message: str) -> None:
    model = build("rwkv4")
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"rank": 2, "alpha": 4, **arguments})
    assert not any(".lora_" in name for name, _ in model.named_parameters())


def test_adapters_come_once_and_must_be_there(tmp_path: Path) -> None:
    model = build("rwkv4")
    for call in (lambda: merge(model), lambda: save_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match="no adapters"):
            call()
    add_lora(model, 2, 4, ["att.key"])
    save_adapter(model, tmp_path)
    for call in (lambda: add_lora(model, 2, 4), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match="has adapters already"):
            call()


def test_merging_what_is_not_finite_changes_nothing() -> None:
    model = add_lora(build("rwkv4"), 2, 4, ["att.key"])
    stir_adapters(model)
    model.blocks[1].att.key.lora_A["default"].weight.data[0, 0] = float("nan")
    before = model.blocks[0].att.key.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"blocks\.1\.att\.key holds values that are not finite"):
        merge(model)
    assert torch.equal(model.blocks[0].att.key.base_layer.weight, before)


def edit(directory: Path, **fields: Any) -> None:
    place = directory / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | fields))


def forget_digest(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = directory / "adapter_model.safetensors"
    save_file(load_file(place), place)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: edit(d, lora_alpha=5), "is not the configuration"),
        (lambda d: (forget_digest(d), edit(d, r=3)), "has|expected floating point"),
        (lambda d: (forget_digest(d), edit(d, r=-1)), "r is -1"),
        (lambda d: (forget_digest(d), edit(d, lora_alpha="8")), "lora_alpha is '8'"),
        (lambda d: (forget_digest(d), edit(d, use_dora=True)), "use_dora is True"),
        (lambda d: (forget_digest(d), edit(d, surprise=1)), "surprise is 1"),
        (lambda d: (forget_digest(d), edit(d, target_modules=["att.key", "gone"])), "'gone' names no projection"),
        (lambda d: (forget_digest(d), edit(d, target_modules=["att.key", "att.value"])), "is missing"),
        (lambda d: (forget_digest(d), edit(d, target_modules=["blocks.0.att.key"])), "unknown tensor"),
        (lambda d: (forget_digest(d), edit(d, target_modules=".*key")), r"target_modules is '\.\*key'"),
        (lambda d: edit(d, peft_type="IA3"), "no configuration of a LoRA"),
        (lambda d: (d / "adapter_config.json").write_text("[" * 100_000), "not JSON"),
        (lambda d: (d / "adapter_config.json").write_bytes(b"\xff"), "not JSON"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\0" * 7), "too few"),
    ],
)
def test_damaged_adapters_leave_the_model_alone(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    save_adapter(add_lora(build("rwkv4"), 2, 4, ["att.key"]), tmp_path)
    damage(tmp_path)
    model = build("rwkv4")
    want, _ = model(ids())
    model.emb.weight.requires_grad_(False)
    with pytest.raises(WeightsError, match=message):
        load_adapter(model, tmp_path)
    assert torch.equal(model(ids())[0], want)
    assert list(model.state_dict()) == list(build("rwkv4").state_dict())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["emb.weight"]
    load_adapter(model, _good(tmp_path / "good"))


def _good(directory: Path) -> Path:
    save_adapter(add_lora(build("rwkv4"), 2, 4, ["att.key"]), directory)
    return directory


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[2] / "docs/bridges_lm_eval_and_peft.md"
    chosen = [block.text for block in blocks(page.read_text("utf-8")) if "peft" in block.info]
    assert len(chosen) == 2
    names: dict[str, Any] = {}
    exec("\n".join(chosen), names)
    want, _ = names["theirs"](names["tokens"])
    torch.manual_seed(0)
    assert torch.equal(load_adapter(statewise.create("mamba", **SMALL), "adapter")(names["tokens"])[0], want)
