"""The comparison of language models: the transformer, its score, and runs that go on where they broke off."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import language_models, plot
from benchmarks.language_models import MODELS, build, windowed_bits
from benchmarks.transformer import Transformer, TransformerConfig, _angles, _rotate
from statewise.text import compressor_bits_per_byte, load_corpus
from statewise.training.config import TrainConfig
from statewise.training.optimizer import build_optimizer

TEXT = b"It was the best of times, it was the worst of times; it was the age of wisdom.\n" * 60


@pytest.fixture
def transformer() -> Transformer:
    return Transformer(TransformerConfig(256, num_layers=2, width=64, head_size=16)).eval()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("layers", "width"), [(4, 192), (6, 256), (6, 512)])
def test_all_models_are_of_one_size(layers: int, width: int) -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in build(name, layers, width).parameters()) for name in MODELS]
    assert max(sizes) < 1.05 * min(sizes)


@torch.no_grad()
def test_the_transformer_is_causal(transformer: Transformer) -> None:
    tokens = torch.randint(256, (2, 12))
    other = tokens.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 256
    one, two = transformer(tokens)[0], transformer(other)[0]
    torch.testing.assert_close(one[:, :7], two[:, :7])
    assert (one[:, 7:] - two[:, 7:]).abs().amax(-1).min() > 1e-4


def test_rotary_positions_tell_distance_alone() -> None:
    cos, sin = _angles(9, 16, torch.zeros(()))
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(i: int, j: int) -> float:
        return float((_rotate(q, cos[i], sin[i]) * _rotate(k, cos[j], sin[j])).sum())

    assert score(5, 2) == pytest.approx(score(8, 5), rel=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), rel=1e-2)
    assert score(5, 2) != pytest.approx(score(2, 5), rel=1e-2)


def test_the_transformer_is_trained_by_our_optimizer(transformer: Transformer) -> None:
    config = TrainConfig(learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    optimizer = build_optimizer(transformer, config)
    decayed = {p.dim() for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {2}


def test_the_transformer_refuses_what_it_cannot_do(transformer: Transformer) -> None:
    with pytest.raises(ValueError, match="state"):
        transformer(torch.zeros(1, 2, dtype=torch.long), object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width"):
        Transformer(TransformerConfig(256, 1, 100))


@pytest.mark.parametrize("size", [2, 5, 8, 9, 12, 13, 14, 16, 17, 100, 200])
def test_windowed_bits_scores_every_byte_once(transformer: Transformer, size: int) -> None:
    """Against one window a byte: the later half of windows that start at multiples of 4."""
    data = np.frombuffer(TEXT[:size], np.uint8)
    nats = 0.0
    with torch.no_grad():
        for at in range(1, size):
            start = 0 if at <= 8 else (at - 5) // 4 * 4
            logits, _ = transformer(torch.from_numpy(data[start:at].astype(np.int64))[None])
            nats += float(F.cross_entropy(logits[0, -1], torch.tensor(int(data[at]))))
    expected = nats / math.log(2) / (size - 1)
    assert windowed_bits(transformer, data, context=8) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("size", "context"), [(1, 8), (20, 7)])
def test_windowed_bits_refuses_what_it_cannot_score(transformer: Transformer, size: int, context: int) -> None:
    with pytest.raises(ValueError, match="context"):
        windowed_bits(transformer, np.zeros(size, np.uint8), context)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def arguments(text: Path, *more: str) -> list[str]:
    sizes = ["--layers", "1", "--width", "64", "--context", "16", "--batch-size", "2", "--threads", "1"]
    paths = ["--data", str(text), "--work", str(text.parent / "work"), "--out", str(text.parent / "models.json")]
    return [*sizes, *paths, "--minutes", "0.01", *more]


def test_a_run_compares_all_models(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_models, "_STEPS_A_POINT", 2)
    language_models.main(arguments(text))
    document = json.loads((text.parent / "models.json").read_text())
    assert [result["model"] for result in document["results"]] == list(MODELS)
    for result in document["results"]:
        assert result["tokens"] == result["steps"] * 32
        assert 0 < result["test_bits_per_byte"] < 8.5
        assert result["curve"][0]["step"] == 2
    assert document["settings"]["data"] == "text.txt"
    assert document["settings"]["test_bytes"] == len(TEXT) - int(0.95 * len(TEXT))
    assert set(document["compressors"]) == set(plot.COMPRESSORS)
    assert str(text.parent) not in json.dumps(document)
    assert (text.parent / "models.png").stat().st_size > 10_000
    table = plot.curves_table(document)
    assert table.count("\n") == 2 + len(MODELS) + 2
    assert table in capsys.readouterr().out


def test_compressors_have_read_the_training_split(text: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8).tobytes()
    text.write_bytes(noise * 10)
    corpus = load_corpus(text, split=(0.95, 0.0))
    bits = language_models.compressors(corpus.train, corpus.test)
    assert compressor_bits_per_byte(corpus.test)["xz"] > 8  # alone, it is noise
    assert bits["xz"] < 1
    assert bits["gzip"] < 1


def test_finished_models_are_kept(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    run_model = language_models.run_model

    def interrupted(name: str, *rest: Any) -> dict[str, Any]:
        ran.append(name)
        if ran == ["rwkv4", "transformer"]:
            raise KeyboardInterrupt
        return run_model(name, *rest)

    monkeypatch.setattr(language_models, "run_model", interrupted)
    call = arguments(text, "--models", "rwkv4,transformer")
    with pytest.raises(KeyboardInterrupt):
        language_models.main(call)
    language_models.main(call)
    assert ran == ["rwkv4", "transformer", "transformer"]
    assert (text.parent / "models.json").exists()


def test_a_broken_off_model_goes_on(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while scoring, it neither trains again nor scores other weights."""
    scored: list[tuple[float, int]] = []

    def score(model: nn.Module, data: Any, context: int) -> float:
        weights = sum(float(p.detach().double().sum()) for p in model.parameters())
        scored.append((weights, len(data)))
        if len(scored) == 1:
            raise KeyboardInterrupt
        return 4.0

    monkeypatch.setattr(language_models, "windowed_bits", score)
    call = arguments(text, "--models", "transformer")
    with pytest.raises(KeyboardInterrupt):
        language_models.main(call)
    saved = torch.load(text.parent / "work" / "transformer.pt", weights_only=True)
    language_models.main(call)
    assert scored[0] == scored[1]
    result = json.loads((text.parent / "models.json").read_text())["results"][0]
    assert result["steps"] == saved["step"] > 0


def test_a_model_killed_while_training_goes_on_with_the_next_batch(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    read = language_models.Windows.read

    def count(self: language_models.Windows, index: int) -> Any:
        seen.append(index)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return read(self, index)

    monkeypatch.setattr(language_models.Windows, "read", count)
    monkeypatch.setattr(language_models, "_SECONDS_BETWEEN_SAVES", 0.0)
    call = arguments(text, "--models", "rwkv7")
    with pytest.raises(KeyboardInterrupt):
        language_models.main(call)
    language_models.main(call)
    assert seen[:6] == [0, 1, 2, 3, 3, 4]
    result = json.loads((text.parent / "models.json").read_text())["results"][0]
    assert result["steps"] == seen[-1] + 1
    assert result["curve"][-1]["step"] == result["steps"] // 20 * 20


def test_another_run_is_not_mixed_in(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    language_models.main(arguments(text, "--models", "transformer"))
    with pytest.raises(SystemExit) as stop:
        language_models.main(arguments(text, "--models", "transformer", "--seed", "1"))
    assert stop.value.code == 2
    assert "seed 0, not 1" in capsys.readouterr().err
