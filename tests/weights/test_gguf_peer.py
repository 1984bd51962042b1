"""GGUF against the format's own Python package: it reads what we write, and we read what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import statewise
from statewise.weights.gguf import read_gguf

gguf = pytest.importorskip("gguf", reason="gguf is not installed: `make parity` installs it")
np = pytest.importorskip("numpy", reason="gguf is of no use without numpy")

MODELS: dict[str, dict[str, Any]] = {
    "rwkv6": {"head_size": 8},
    "rwkv7": {"head_size": 8},
    "mamba": {},
    "mamba2": {"head_size": 8, "state_size": 8, "groups": 2},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_reads_what_we_write(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = statewise.create(name, vocab_size=16, num_layers=2, width=32, **MODELS[name]).to(dtype)
    statewise.save(model, tmp_path / "model.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    metadata, tensors = read_gguf(tmp_path / "model.gguf")
    assert reader.get_field("general.architecture").contents() == name
    assert reader.get_field(f"{name}.block_count").contents() == 2
    assert {key for key in reader.fields if not key.startswith("GGUF.")} == set(metadata)
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    # every name is one llama.cpp has for this architecture
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    known = {gguf.TENSOR_NAMES[kind].format(bid=block) for kind in gguf.MODEL_TENSORS[arch] for block in range(2)}
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight").removesuffix(".bias")
        assert stem in known, tensor.name
        ours = tensors[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == tuple(ours.shape)
        assert bytes(tensor.data) == ours.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_we_read_what_it_writes(tmp_path: Path, name: str) -> None:
    """The same tensors, with a vocabulary beside them, in another order and under another alignment."""
    model = statewise.create(name, vocab_size=16, num_layers=2, width=32, **MODELS[name])
    statewise.save(model, tmp_path / "ours.gguf", "gguf")
    metadata, tensors = read_gguf(tmp_path / "ours.gguf")
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", name)
    writer.add_custom_alignment(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {i} ä" for i in range(5000)])
    writer.add_token_scores([0.5] * 5000)
    writer.add_token_types([1] * 5000)
    writer.add_array("general.tags", ["text-generation", "rwkv"])
    writer.add_chat_template("{{ messages }}\n" * 5000)
    writer.add_float64("general.double", 0.1)
    writer.add_int64("general.negative", -5)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
    for key in reversed(tensors):
        writer.add_tensor(key, tensors[key].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said, found = read_gguf(tmp_path / "theirs.gguf")
    assert (said["general.double"], said["general.negative"], said["tokenizer.chat_template"]) == (0.1, -5, None)
    assert list(found) == list(reversed(tensors))
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in found.items())
    ours, theirs = statewise.load(tmp_path / "ours.gguf"), statewise.load(tmp_path / "theirs.gguf")
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16"])
def test_what_it_quantises_is_what_it_dequantises(tmp_path: Path, kind: str) -> None:
    kind = gguf.GGMLQuantizationType[kind]
    values = (torch.randn(96, 128) * torch.logspace(-6, 4, 96)[:, None]).numpy()
    packed = gguf.quants.quantize(values, kind)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "rwkv7")
    writer.add_tensor("x", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, found = read_gguf(tmp_path / "one.gguf")
    assert found["x"].shape == values.shape
    expected = gguf.quants.dequantize(packed, kind)
    assert np.array_equal(found["x"].float().numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_quantised_model_computes(tmp_path: Path, kind: str) -> None:
    """Matrices as blocks, the rest plain: the model of the dequantised matrices."""
    model = statewise.create("rwkv7", vocab_size=64, num_layers=2, width=32, head_size=8)
    statewise.save(model, tmp_path / "plain.gguf", "gguf")
    metadata, tensors = read_gguf(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "rwkv7")
    writer.add_uint32("rwkv7.wkv.head_size", metadata["rwkv7.wkv.head_size"])
    meant = {}
    for key, tensor in tensors.items():
        if key.endswith(("key.weight", "value.weight", "output.weight", "embd.weight")):
            packed = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType[kind])
            meant[key] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
            writer.add_tensor(key, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    state = statewise.load(tmp_path / "blocks.gguf").state_dict()
    assert np.array_equal(state["blocks.1.ffn.key.weight"].numpy(), meant["blk.1.channel_mix_key.weight"])
    assert np.array_equal(state["head.weight"].numpy(), meant["output.weight"])
    assert torch.equal(state["blocks.1.att.w2"], model.state_dict()["blocks.1.att.w2"])


def published(name: str, ours: str) -> str:
    """What the directory that is converted calls a tensor of ours (after the converter's own renaming)."""
    if name.startswith("mamba"):
        return ours.replace(".dt_bias", ".dt_proj.bias")
    part = ours.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
    if name == "rwkv7":
        part = part.replace("emb.", "model.embeddings.") if part.startswith("emb.") else part
        part = part.replace("ln_out.", "model.ln_out.").replace("blocks.0.ln0.", "model.pre_ln.")
        return part.replace("blocks.", "model.layers.")
    part = part.replace("emb.", "rwkv.embeddings.") if part.startswith("emb.") else part
    return part.replace("ln_out.", "rwkv.ln_out.").replace("blocks.", "rwkv.blocks.").replace(".ln0.", ".pre_ln.")


@pytest.mark.parametrize("name", MODELS)
def test_names_are_those_of_its_own_map(tmp_path: Path, name: str) -> None:
    model = statewise.create(name, vocab_size=16, num_layers=2, width=32, **MODELS[name])
    statewise.save(model, tmp_path / "model.gguf", "gguf")
    written = set(read_gguf(tmp_path / "model.gguf")[1])
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, 2)
    for ours in model.state_dict():
        if ".att.x_" in ours or (".time_maa_" in ours and ours[-1] in "wkvrg" and ".att." in ours):
            continue  # fused: has no name of its own there
        theirs = names.get_name(published(name, ours), try_suffixes=(".weight", ".bias"))
        assert theirs is not None, ours
        if not theirs.endswith((".weight", ".bias", "ssm_a", "ssm_d")):
            theirs += ".weight"
        assert theirs in written or (theirs == "output.weight" and name.startswith("mamba")), ours  # tied: left out
