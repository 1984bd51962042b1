"""save_pretrained and from_pretrained: bit-equal, in a fresh process, strict; rows of the embedding; the pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import statewise
from statewise import WeightsError
from tests.bridges.small_models import FAMILIES, VOCAB, prompts, small

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'statewise[hf]'")

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from statewise.bridges import hf


def same_tensors(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return list(a.state_dict()) == list(theirs) and all(
        x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]) for name, x in a.state_dict().items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small(family).to(dtype)
    hf.wrap(model, eos_token_id=3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tied = getattr(model.config, "tie_embeddings", False)
    assert set(tensors) == {f"model.{name}" for name in model.state_dict()} - (
        {"model.lm_head.weight"} if tied else set()
    )
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(back) is hf.StatewiseForCausalLM
    assert type(back.model) is type(model)
    assert back.model.config == model.config
    assert back.generation_config.eos_token_id == 3
    assert same_tensors(back.model, model)
    if tied:
        assert back.get_output_embeddings().weight is back.get_input_embeddings().weight
    (row,) = prompts(9)
    with torch.no_grad():
        assert torch.equal(back(row[None]).logits, model(row[None])[0])


def test_untied_heads_and_many_files(tmp_path: Path) -> None:
    model = small("mamba", tie_embeddings=False)
    hf.wrap(model).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1, "one file is no test of several"
    assert same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path).model, model)


_FRESH = """
import sys, torch
import statewise.bridges.hf
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(6)[None]
print(model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist())
"""


def test_a_fresh_process_opens_the_directory(tmp_path: Path) -> None:
    model = small("mamba2", dt_limit=(0.0, float("inf")))
    hf.wrap(model).save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", _FRESH, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    want = [*range(6), *statewise.generate(model, list(range(6)), max_tokens=6, temperature=0)]
    assert json.loads(run.stdout) == want


def test_a_new_model_begins_as_its_authors_begin() -> None:
    fields: dict[str, Any] = {"vocab_size": VOCAB, "num_layers": 2, "width": 64}
    torch.manual_seed(5)
    want = statewise.create("rwkv7", **fields)
    torch.manual_seed(5)
    made = AutoModelForCausalLM.from_config(hf.StatewiseConfig(architecture="rwkv7", fields=fields))
    assert same_tensors(made.model, want)
    with pytest.raises(ValueError, match="unknown model 'rwkv99'"):
        AutoModelForCausalLM.from_config(hf.StatewiseConfig(architecture="rwkv99", fields=fields))


def test_wrapping_shares_and_unwraps(tmp_path: Path) -> None:
    model = small("rwkv6")
    wrapped = hf.wrap(model)
    assert wrapped.model is model
    assert not wrapped.training
    assert wrapped.config.dtype == torch.float64
    assert (wrapped.config.hidden_size, wrapped.config.num_hidden_layers, wrapped.config.vocab_size) == (64, 2, VOCAB)
    statewise.save(wrapped.model, tmp_path / "ours")
    assert same_tensors(statewise.load(tmp_path / "ours", dtype=torch.float64), model)
    with pytest.raises(ValueError, match="model is Linear"):
        hf.wrap(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of"):
        hf.wrap(wrapped)  # type: ignore[arg-type]


def test_registering_twice_is_harmless() -> None:
    hf.register()
    hf.register()
    config = AutoConfig.for_model(
        "statewise", architecture="rwkv4", fields={"vocab_size": 9, "num_layers": 1, "width": 8}
    )
    assert isinstance(config, hf.StatewiseConfig)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_what_transformers_would_warn_of_is_refused(change: str, tmp_path: Path) -> None:
    hf.wrap(small("rwkv4")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.blocks.1.att.time_decay"
    if change == "missing":
        del tensors[name]
    else:
        name = "model.blocks.1.att.time_delay"
        tensors[name] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=f"{change} tensor {name}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_loading_information_is_given_when_asked(tmp_path: Path) -> None:
    hf.wrap(small("mamba")).save_pretrained(tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, hf.StatewiseForCausalLM)
    assert not report["missing_keys"]


@pytest.mark.parametrize("family", ["rwkv7", "mamba", "mamba2"])
def test_rows_of_the_embedding_can_be_added(family: str, tmp_path: Path) -> None:
    model = small(family)
    wrapped = hf.wrap(model)
    ids = prompts(6)[0][None]
    want = wrapped(ids).logits
    rows = VOCAB + 5
    assert wrapped.resize_token_embeddings(rows).num_embeddings == rows
    assert model.config.vocab_size == wrapped.config.vocab_size == rows
    ids[0, -1] = rows - 1
    logits = wrapped(ids).logits
    assert logits.shape[-1] == rows
    torch.testing.assert_close(logits[:, :-1, :VOCAB], want[:, :-1])
    tied = wrapped.get_output_embeddings().weight is wrapped.get_input_embeddings().weight
    assert tied == (family != "rwkv7")
    wrapped.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.model.config == model.config
    assert same_tensors(back, wrapped)
    assert wrapped.resize_token_embeddings(rows - 2).num_embeddings == rows - 2
    with pytest.raises(ValueError, match="outside the vocabulary"):
        wrapped(ids)


def test_the_text_generation_pipeline(shared: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(shared / "data/tokenizers/20B_tokenizer.json"))
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.padding_side = "left"
    torch.manual_seed(1)
    model = statewise.create("rwkv4", vocab_size=50304, num_layers=1, width=16).eval()
    wrapped = hf.wrap(model)
    texts = ["The state of a", "Water"]
    made = pipeline("text-generation", model=wrapped, tokenizer=tokenizer)(
        texts, batch_size=2, max_new_tokens=5, do_sample=False, return_full_text=False
    )
    for text, (answer,) in zip(texts, made, strict=True):
        ids = list(statewise.generate(model, tokenizer(text)["input_ids"], max_tokens=5, temperature=0))
        assert answer["generated_text"] == tokenizer.decode(ids)
    # What a tokenizer gives is taken whole, token_type_ids included.
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert wrapped.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] == batch["input_ids"].shape[1] + 2
