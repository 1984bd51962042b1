"""What training does so that a device is kept busy: batches ahead, one wait a step, blocks compiled."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import statewise
from statewise.ops import gpu
from statewise.ops.checks import trusting_values
from statewise.ops.dispatch import prefer
from statewise.training import TrainConfig, language_model_loss, train
from statewise.training import loop as loop_module
from statewise.training import resume as resume_module
from statewise.training.compiled import compile_blocks
from statewise.training.data import Batch
from statewise.training.feed import Feed
from statewise.training.metrics import VOLATILE, read_metrics

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(7).choices(["state ", "is ", "a ", "value ", "\n"], k=600)))
    return TrainConfig(
        model="rwkv7",
        data=str(text),
        out=str(tmp_path / "run"),
        steps=6,
        num_layers=2,
        width=16,
        model_fields={"head_size": 16},
        context=8,
        batch_size=3,
        accumulate=2,
        log_every=2,
        save_every=3,
        eval_every=3,
        eval_tokens=60,
        warmup_steps=2,
        tensorboard=False,
        plot=False,
    )


def quiet(report: Any) -> None:
    """Shows nothing."""


def records(out: str) -> list[dict[str, Any]]:
    found = read_metrics(Path(out) / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in VOLATILE} for record in found]


class _Order:
    """Batches that say who they are, and how often they were read."""

    def __init__(self) -> None:
        self.read_so_far: list[int] = []

    def read(self, index: int) -> Batch:
        self.read_so_far.append(index)
        return Batch(torch.tensor([[index]]), torch.tensor([[index + 1]]), index % 2 == 0)

    def epoch(self, index: int) -> float:
        return 0.0


def test_a_batch_that_was_prepared_is_not_read_again() -> None:
    order = _Order()
    feed = Feed(order, torch.device("cpu"))
    assert feed.take(4).inputs.tolist() == [[4]]
    feed.prepare(5)
    assert order.read_so_far == [4, 5]
    inputs, targets, fresh = feed.take(5)
    assert (inputs.tolist(), targets.tolist(), fresh) == ([[5]], [[6]], False)
    assert order.read_so_far == [4, 5]
    feed.prepare(9)
    assert feed.take(6).inputs.tolist() == [[6]]  # what was prepared is not what was asked for
    assert feed.take(9).inputs.tolist() == [[9]]
    assert feed.take(9).inputs.tolist() == [[9]]
    assert order.read_so_far == [4, 5, 9, 6, 9]


class _Reads(TorchFunctionMode):
    """Counts what waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


# wkv7's plain form looks how strong its decays are, to choose how to add them up; its kernels do not.
@pytest.mark.parametrize("model", ["rwkv4", "rwkv6", "mamba"])
def test_a_step_waits_for_the_device_once(config: TrainConfig, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {} if model in ("rwkv4", "mamba") else config.model_fields
    seen: list[list[str]] = []
    step = loop_module._Trainer.step

    def watched(self: Any) -> Any:
        with _Reads() as reads:
            result = step(self)
        seen.append(reads.found)
        return result

    monkeypatch.setattr(loop_module._Trainer, "step", watched)
    train(dataclasses.replace(config, model=model, model_fields=fields), progress=quiet)
    assert seen == [["tolist"]] * 6


@pytest.mark.parametrize("name", ["rwkv4", "rwkv5", "rwkv6", "rwkv7", "mamba", "mamba2"])
def test_gpu_kernels_are_launched_without_a_wait(name: str) -> None:
    """What would be launched is noted, and nothing computed: only what the host does is looked at."""
    pytest.importorskip("triton")
    sizes = {} if name in ("rwkv4", "mamba") else {"head_size": 16}
    model: Any = statewise.create(name, vocab_size=31, num_layers=2, width=32, **sizes)
    tokens = torch.randint(31, (2, 40))
    with gpu.capture() as launched, prefer("triton"), trusting_values(), _Reads() as reads:
        logits, _ = model(tokens)
        forward = len(launched)
        torch.autograd.backward(language_model_loss(logits, tokens, l2wrap=1e-4))
    assert 0 < forward < len(launched)
    assert reads.found == []


def test_values_are_looked_at_where_nobody_vouches() -> None:
    model: Any = statewise.create("rwkv4", vocab_size=7, num_layers=1, width=8)
    with pytest.raises(ValueError, match=r"token 9 is outside the vocabulary; accepted are 0..6"):
        model(torch.tensor([[1, 9]]))
    with pytest.raises(ValueError, match="token -2 is outside"):
        model(torch.tensor([[1, -2]]))
    with pytest.raises(ValueError, match="targets hold 7"):
        language_model_loss(torch.zeros(1, 2, 7), torch.tensor([[1, 7]]))


@pytest.mark.parametrize(("name", "fields"), [("rwkv7", {"head_size": 16}), ("mamba", {})])
def test_compiled_blocks_compute_the_same(name: str, fields: dict[str, Any]) -> None:
    model: Any = statewise.create(name, vocab_size=31, num_layers=3, width=32, **fields)
    tokens = torch.randint(31, (2, 9))
    names = list(model.state_dict())
    expected, state = model(tokens)
    compile_blocks(model, backend="aot_eager")
    logits, after = model(tokens)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(after, state)
    language_model_loss(logits, tokens).backward()
    assert list(model.state_dict()) == names


def test_a_run_may_compile(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(loop_module, "compile_blocks", compiled.append)
    train(config, progress=quiet)
    assert not compiled
    plain = records(config.out)
    config = dataclasses.replace(config, compile=True, out=config.out + "-2")
    train(config, progress=quiet)
    assert len(compiled) == 1
    assert records(config.out) == plain  # nothing was compiled after all
    with pytest.raises(ValueError, match="compile is False, but the run in"):
        train(dataclasses.replace(config, compile=False, resume=True, steps=8), progress=quiet)
    assert TrainConfig.from_toml(Path(config.out) / "config.toml").compile


def test_random_states_of_gpus_are_kept_by_runs_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]
    taken: dict[int, int] = {}
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # one of the two is gone
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: taken.update({index: int(state)}))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert set(resume_module._random_state(cpu)) == {"cpu"}
    kept = resume_module._random_state(cuda)
    assert set(kept) == {"cpu", "cuda.0", "cuda.1"}
    expected = torch.rand(3)
    resume_module._set_random_state(kept, cpu)
    assert taken == {}
    assert torch.equal(torch.rand(3), expected)
    resume_module._set_random_state(kept, cuda)
    assert taken == {0: 1}


def test_a_device_that_is_not_there(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="device is 'cuda:99'"):
        train(dataclasses.replace(config, device="cuda:99"), progress=quiet)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_a_run_goes_on_bit_for_bit(config: TrainConfig, device: str, dtype: Any) -> None:
    config = dataclasses.replace(config, device=device, dtype=dtype, schedule="constant")
    whole = train(dataclasses.replace(config, out=config.out + "-whole"), progress=quiet)
    train(dataclasses.replace(config, steps=3), progress=quiet)
    parts = train(dataclasses.replace(config, resume=True), progress=quiet)
    assert records(str(whole.out)) == records(str(parts.out))
    one, other = (statewise.load(run.snapshot).state_dict() for run in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
