"""The configuration: file and dataclass are the same thing, and nothing wrong gets through."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.training import TrainConfig

numbers = st.floats(1e-30, 1e30)


@given(
    st.builds(
        TrainConfig,
        data=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        steps=st.integers(1, 10**12),
        learning_rate=st.none() | numbers,
        betas=st.none() | st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        split=st.none() | st.just((0.5, 0.25)) | st.just((100, 200)),
        schedule=st.none() | st.sampled_from(["cosine", "exponential", "constant"]),
        resume=st.booleans(),
        model_fields=st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
                lambda name: name not in ("width", "num_layers")
            ),
            st.booleans()
            | st.integers(-(2**63), 2**63 - 1)
            | numbers
            | st.text(st.characters(exclude_categories=["Cs"])),
        ),
    )
)
def test_toml_and_back(config: TrainConfig) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        path.write_text(config.to_toml(), "utf-8")
        back = TrainConfig.from_toml(path)
    assert back == config
    assert [type(v) for v in back.model_fields.values()] == [type(v) for v in config.model_fields.values()]
    assert TrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": 0}, "steps is 0; accepted is an integer of 1 or more"),
        ({"width": -64}, "width is -64"),
        ({"context": 1.5}, "context is 1.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; accepted is a finite number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"betas": [0.9]}, "betas is"),
        ({"split": (0.9, 0.2)}, "split is"),
        ({"split": (200, 100)}, "split is"),
        ({"schedule": "linear"}, "accepted is 'cosine' or 'exponential' or 'constant'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"out": ""}, "out is ''"),
        ({"resume": 1}, "resume is 1; accepted is true or false"),
        ({"model_fields": {"width": 3}}, "model_fields holds 'width', which has a name of its own"),
        ({"model_fields": {"x": [1]}}, "model_fields is"),
        ({"num_layer": 3}, "unknown name 'num_layer'; did you mean 'num_layers'"),
        ({"log-every": 3}, "did you mean 'log_every'"),
        ({"zzz": 3}, "unknown name 'zzz'; known names: model"),
    ],
)
def test_refusals(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize("content", [b"steps = ", b"\xff", b"steps = 0", b"nothing = 1"])
def test_a_bad_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.toml: "):
        TrainConfig.from_toml(path)


def test_official_recipes() -> None:
    v4 = TrainConfig(model="rwkv4", width=512).resolved()
    assert (v4.betas, v4.eps, v4.l2wrap, v4.weight_decay) == ((0.9, 0.99), 1e-8, 1e-4, 0.0)
    assert (v4.learning_rate, v4.final_learning_rate, v4.schedule) == (8e-4, 1e-5, "exponential")
    v7 = TrainConfig(model="rwkv7", width=768).resolved()
    assert (v7.betas, v7.eps, v7.l2wrap, v7.weight_decay) == ((0.9, 0.99), 1e-18, 1e-4, 0.001)
    assert (v7.learning_rate, v7.schedule) == (6e-4, "cosine")
    assert v7.final_learning_rate == pytest.approx(6e-5)
    mamba = TrainConfig(model="mamba", width=768).resolved()
    assert (mamba.betas, mamba.eps, mamba.l2wrap, mamba.weight_decay) == ((0.9, 0.95), 1e-8, 0.0, 0.1)
    assert (mamba.learning_rate, mamba.final_learning_rate) == (3e-3, 1e-5)


def test_what_is_given_wins_over_the_recipe() -> None:
    config = TrainConfig(model="rwkv4", learning_rate=5e-6, l2wrap=0.0, eps=1e-6).resolved()
    assert (config.learning_rate, config.final_learning_rate, config.l2wrap, config.eps) == (5e-6, 5e-6, 0.0, 1e-6)
    assert config.resolved() == config
    with pytest.raises(ValueError, match="model is 'gpt'"):
        TrainConfig(model="gpt").resolved()


def test_configuring_does_not_import_torch() -> None:
    code = "import sys; from statewise.training import TrainConfig; TrainConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
