"""What importing costs, and what the package promises to be called."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import statewise


def fresh(code: str) -> str:
    """Run ``code`` in a new interpreter, where nothing is imported yet."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = "{'torch', 'numpy', 'rich', 'matplotlib', 'tyro'}"
    assert fresh(f"import sys, statewise; print({heavy} & set(sys.modules))") == "set()"


def test_operators_need_torch_alone() -> None:
    optional = "{'triton', 'transformers', 'starlette', 'matplotlib', 'rich', 'tyro', 'tensorboard', 'safetensors'}"
    assert fresh(f"import sys, statewise.ops, statewise.state; print({optional} & set(sys.modules))") == "set()"


@pytest.mark.parametrize("name", sorted(statewise.__all__))
def test_public_names_resolve(name: str) -> None:
    assert getattr(statewise, name) is not None
    assert name in dir(statewise)


def test_unknown_names_do_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = statewise.nonsense


def test_the_contracts_names() -> None:
    from statewise import ops, state, text, training

    for op in ("wkv4", "wkv7", "selective_scan", "causal_conv1d", "token_shift"):
        assert callable(getattr(ops, op))
        assert callable(getattr(ops, f"{op}_step"))
    assert callable(training.language_model_loss)
    assert callable(text.load_tokenizer)
    assert callable(state.stack)
    assert callable(state.load_state)
    assert statewise.list_models("language") == ["mamba", "mamba2", "mamba3", "rwkv4", "rwkv5", "rwkv6", "rwkv7"]
    of_images = [f"vrwkv_{size}" for size in ("tiny", "small", "base", "large")]
    of_images += [f"{family}_{size}" for family in ("vrwkv6", "vim") for size in ("tiny", "small", "base")]
    assert statewise.list_models("vision") == sorted(of_images)
    assert statewise.list_models() == sorted([*statewise.list_models("language"), *of_images])
    with pytest.raises(ValueError, match="task is 'sound'"):
        statewise.list_models("sound")
    with pytest.raises(ValueError, match="vrwkv_tiny has no field 'depth'"):
        statewise.create("vrwkv_tiny", depth=3)
    with pytest.raises(ValueError, match="vrwkv needs width, num_layers"):
        statewise.create("vrwkv")


def test_backends_say_what_serves_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    table = statewise.backends()
    assert table["wkv7"]["torch"].serves
    assert table["wkv7"]["triton"].serves == torch.cuda.is_available()
    assert table["wkv7"]["triton"].serves != bool(table["wkv7"]["triton"].reason)
    assert not table["mamba3"]["triton"].serves
    assert table["mamba3"]["triton"].reason
