"""The loop with real models: it learns, stops, continues bit for bit, and refuses what it should."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import statewise
from statewise.errors import SnapshotError
from statewise.training import DivergenceError, TrainConfig, train
from statewise.training import loop as loop_module
from statewise.training.directory import hold_run
from statewise.training.metrics import VOLATILE, read_metrics
from statewise.training.snapshot import list_snapshots
from statewise.training.validation import validation_bits

FIELDS: dict[str, dict[str, Any]] = {"rwkv4": {}, "rwkv7": {"head_size": 16}, "mamba": {}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = random.Random(7).choices(["state ", "is ", "a ", "value ", "wise ", "and ", "so ", "\n"], k=600)
    path.write_text("".join(words))
    return path


@pytest.fixture
def config(text: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model="rwkv4",
        data=str(text),
        out=str(tmp_path / "run"),
        steps=8,
        num_layers=1,
        width=16,
        context=8,
        batch_size=3,
        log_every=3,
        save_every=4,
        eval_every=4,
        eval_tokens=60,
        warmup_steps=2,
        tensorboard=False,
        plot=False,
    )


def quiet(report: Any) -> None:
    """Shows nothing."""


def contents(out: str) -> dict[str, Any]:
    """All that must be equal in two runs."""
    found: dict[str, Any] = {
        "metrics": [
            {k: v for k, v in r.items() if k not in VOLATILE} for r in read_metrics(Path(out) / "metrics.jsonl")
        ]
    }
    for step, path in list_snapshots(Path(out)):
        for file in sorted(path.glob("*.safetensors")):
            found |= {f"{step}/{file.name}/{k}": v.numpy().tobytes() for k, v in load_file(file).items()}
    return found


def test_it_learns_and_says_so(config: TrainConfig, text: Path) -> None:
    reports: list[Any] = []
    config = dataclasses.replace(config, steps=60, learning_rate=1e-2, tensorboard=True, plot=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    result = train(config, progress=reports.append)
    assert torch.equal(before, torch.get_rng_state())
    records = read_metrics(Path(config.out) / "metrics.jsonl")
    assert [r["step"] for r in records] == sorted({*range(3, 61, 3), *range(4, 61, 4)})
    assert records[-1]["bits_per_byte"] < 0.6 * records[0]["bits_per_byte"]
    assert records[-1]["valid_bits_per_byte"] == result.valid_bits_per_byte < 0.6 * 8
    assert records[-1]["bits_per_byte"] == pytest.approx(records[-1]["loss"] / math.log(2))
    assert result.tokens == records[-1]["tokens"] == 60 * 3 * 8
    assert (result.step, result.interrupted, result.loss) == (60, False, records[-1]["loss"])
    assert [{k: v for k, v in r.items() if k not in ("steps", "eta_seconds")} for r in reports] == records
    assert reports[0]["eta_seconds"] > 0 == reports[-1]["eta_seconds"]
    assert result.snapshot.name == "step-00000060"
    assert (Path(config.out) / "loss.png").stat().st_size > 1000
    assert len(list((Path(config.out) / "tensorboard").iterdir())) == 1
    assert TrainConfig.from_toml(Path(config.out) / "config.toml") == config.resolved()
    # The snapshot is a checkpoint: its model gives the validation figure that was recorded last.
    tokens = loop_module.load_tokens(config, Path(config.out) / "tokens").valid
    model = statewise.load(result.snapshot)
    assert validation_bits(model, tokens, rows=3, context=8, limit=60) == pytest.approx(result.valid_bits_per_byte)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("rwkv4", {}),
        ("rwkv4", {"carry_state": True, "accumulate": 2}),
        ("rwkv7", {"carry_state": True, "dtype": "bfloat16"}),
        ("rwkv7", {"grad_checkpointing": True, "schedule": "constant", "final_learning_rate": 1e-4}),
        ("mamba", {"carry_state": True}),
        ("mamba", {"dtype": "bfloat16", "accumulate": 2, "grad_clip": 0.0}),
    ],
)
def test_broken_and_continued_is_unbroken(config: TrainConfig, model: str, changes: dict[str, Any]) -> None:
    """A run stopped (by a signal) after steps 1, 4, 5 and 6 ends as one that never stopped."""
    config = dataclasses.replace(config, model=model, model_fields=FIELDS[model], keep=10, **changes)
    unbroken = dataclasses.replace(config, out=config.out + "-unbroken", log_every=1)
    train(unbroken, progress=quiet)
    for round_, stop in enumerate((1, 4, 5, 6, None)):
        with pytest.MonkeyPatch.context() as patch:
            move = loop_module._Trainer.step

            def step(self: Any, stop: int | None = stop, move: Any = move) -> Any:
                if self.run.step + 1 == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                return move(self)

            patch.setattr(loop_module._Trainer, "step", step)
            # What may change on resume changes: how often things are written down.
            result = train(dataclasses.replace(config, resume=round_ > 0, log_every=1), progress=quiet)
        assert (result.step, result.interrupted) == (stop or 8, stop is not None)
    got, expected = contents(config.out), contents(unbroken.out)
    assert set(got) > set(expected)  # the stops left snapshots of their own
    assert {key: got[key] for key in expected} == expected


def test_accumulated_batches_are_one_large_one(config: TrainConfig) -> None:
    """The windows of two batches of 3 are those of one of 6, in this order; so is the step taken on them."""
    config = dataclasses.replace(config, steps=1, eval_every=0, l2wrap=1.0)
    for name, sizes in (("one", {"batch_size": 6}), ("two", {"batch_size": 3, "accumulate": 2})):
        train(dataclasses.replace(config, out=config.out + name, **sizes), progress=quiet)
    one, two = (
        load_file(list_snapshots(Path(config.out + name))[-1][1] / "optimizer.safetensors") for name in ("one", "two")
    )
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-9)


def test_checkpointing_changes_nothing_but_memory(config: TrainConfig) -> None:
    for name in ("plain", "checkpointed"):
        changed = dataclasses.replace(config, out=config.out + name, grad_checkpointing=name == "checkpointed")
        train(changed, progress=quiet)
    plain, checkpointed = contents(config.out + "plain"), contents(config.out + "checkpointed")
    assert plain == checkpointed


def test_carried_state_is_the_state_of_all_that_came_before(config: TrainConfig) -> None:
    """With a rate too small to move a weight, the last carried state is that of reading the whole stream at once."""
    config = dataclasses.replace(config, carry_state=True, learning_rate=1e-30, batch_size=2, steps=5, eval_every=0)
    train(config, progress=quiet)
    path = list_snapshots(Path(config.out))[-1][1]
    order = loop_module._order(config, loop_module.load_tokens(config, Path(config.out)))
    read = torch.cat([order.read(index).inputs for index in range(5)], dim=1)
    _, expected = statewise.load(path)(read)
    carried = statewise.state.load_state(path / "state.safetensors")
    for got, want in zip(carried.layers[0].wkv, expected.layers[0].wkv, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_longer_run_from_a_finished_one(config: TrainConfig) -> None:
    config = dataclasses.replace(config, schedule="constant", eval_every=0, save_every=4, log_every=4)
    train(config, progress=quiet)
    finished = contents(config.out)
    again = train(dataclasses.replace(config, resume=True), progress=quiet)
    assert (again.step, again.interrupted) == (8, False)
    assert contents(config.out) == finished
    longer = dataclasses.replace(config, steps=12, resume=True)
    train(longer, progress=quiet)
    direct = dataclasses.replace(longer, resume=False, out=config.out + "-direct")
    train(direct, progress=quiet)
    assert contents(config.out) == contents(direct.out)


def test_resuming_what_is_not_there(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"nothing to resume: .*run holds no snapshot"):
        train(dataclasses.replace(config, resume=True))
    assert not Path(config.out).exists()


def test_a_used_directory_is_refused_and_left_alone(config: TrainConfig, tmp_path: Path) -> None:
    out = Path(config.out)
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty \(it holds 'thesis.tex'\)"):
        train(config)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    file = dataclasses.replace(config, out=str(out / "thesis.tex"))
    with pytest.raises(ValueError, match="which is a file"):
        train(file)
    run = dataclasses.replace(config, out=str(tmp_path / "other"), steps=1)
    train(run, progress=quiet)
    before = contents(run.out)
    with pytest.raises(ValueError, match="already holds a run"):
        train(run)
    assert contents(run.out) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 32}, "width is 32, but the run in .* has 16; only out, data, steps"),
        ({"seed": 1}, "seed is 1, but"),
        ({"learning_rate": 1e-5}, "learning_rate is 1e-05, but"),
        ({"batch_size": 2}, "batch_size is 2, but"),
        ({"steps": 1}, "steps is 1, but step-00000002 has done 2"),
    ],
)
def test_another_run_is_not_resumed(config: TrainConfig, changes: dict[str, Any], says: str) -> None:
    train(dataclasses.replace(config, steps=2, eval_every=0), progress=quiet)
    with pytest.raises(ValueError, match=says):
        train(dataclasses.replace(config, **{"steps": 2, "eval_every": 0, "resume": True, **changes}))


def test_other_data_is_not_resumed(config: TrainConfig, text: Path, tmp_path: Path) -> None:
    train(dataclasses.replace(config, steps=2), progress=quiet)
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text.read_bytes())
    assert train(dataclasses.replace(config, data=str(moved), steps=3, resume=True), progress=quiet).step == 3
    moved.write_bytes(text.read_bytes()[::-1])
    with pytest.raises(ValueError, match="does not hold the text that the run"):
        train(dataclasses.replace(config, data=str(moved), steps=4, resume=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "rwkv99"}, "unknown model 'rwkv99'"),
        ({"model_fields": {"wings": 2}}, "wings"),
        ({"model_fields": {"vocab_size": 100}}, "vocab_size is 100, but the text holds the id 1"),
        ({"data": "no/such/file"}, "no/such/file"),
        ({"context": 10**6}, "needs at least 1000001"),
        ({"split": (1.0, 0.0)}, "validation split of .* has 0 tokens; eval_every 0 does without"),
        ({"device": "quantum"}, "device is 'quantum'"),
        ({"tokenizer": "no/such/file"}, "tokenizer"),
    ],
)
def test_refused_before_anything_is_written(config: TrainConfig, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        train(dataclasses.replace(config, **changes))
    assert not Path(config.out).exists()


def test_two_trainers_on_one_directory(config: TrainConfig) -> None:
    train(dataclasses.replace(config, steps=1), progress=quiet)
    with hold_run(Path(config.out)), pytest.raises(ValueError, match=rf"another trainer \(process {os.getpid()}\)"):
        train(dataclasses.replace(config, resume=True))
    assert train(dataclasses.replace(config, resume=True), progress=quiet).step == 8


def test_a_loss_that_is_no_number_stops_the_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: the weights turn NaN in the middle of step 6."""
    move = loop_module._Trainer.step

    def step(self: Any) -> Any:
        if self.run.step == 5:
            next(self.run.model.parameters()).data.fill_(math.nan)
        return move(self)

    monkeypatch.setattr(loop_module._Trainer, "step", step)
    with pytest.raises(DivergenceError, match=r"step 6: the loss is nan .*last snapshot: .*step-00000004"):
        train(config, progress=quiet)
    monkeypatch.undo()
    assert [step for step, _ in list_snapshots(Path(config.out))] == [0, 4]
    assert train(dataclasses.replace(config, resume=True), progress=quiet).step == 8


def test_a_damaged_snapshot_is_not_passed_over(config: TrainConfig) -> None:
    train(config, progress=quiet)
    newest = list_snapshots(Path(config.out))[-1][1] / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(SnapshotError, match=r"step-00000008/optimizer\.safetensors: .*SHA-256"):
        train(dataclasses.replace(config, resume=True, steps=9))


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("trainer.json", b"{}", r"trainer\.json: step is None, expected int"),
        ("trainer.json", b"[]", r"trainer\.json: holds a list"),
        ("trainer.json", b"\xff", r"trainer\.json: "),
        ("optimizer.safetensors", b"junk" * 10, "does not fit its own model"),
        ("random.safetensors", None, "does not fit its own model"),
    ],
)
def test_sound_hashes_do_not_make_a_snapshot(config: TrainConfig, file: str, content: bytes | None, says: str) -> None:
    """Somebody forged a snapshot with a right manifest: still one clear error."""
    from statewise.training.snapshot import write_snapshot

    train(dataclasses.replace(config, steps=1), progress=quiet)
    honest = list_snapshots(Path(config.out))[-1][1]

    def forge(folder: Path) -> None:
        for path in honest.iterdir():
            if path.name not in ("manifest.json", file):
                (folder / path.name).write_bytes(path.read_bytes())
        if content is not None:
            (folder / file).write_bytes(content)

    write_snapshot(Path(config.out), 2, forge, keep=5)
    with pytest.raises(SnapshotError, match=says):
        train(dataclasses.replace(config, resume=True))


def test_other_threads_are_mentioned(config: TrainConfig) -> None:
    train(dataclasses.replace(config, steps=1), progress=quiet)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"began with {threads} threads"):
            train(dataclasses.replace(config, resume=True), progress=quiet)
    finally:
        torch.set_num_threads(threads)


def test_outside_the_main_thread_signals_are_left_alone(config: TrainConfig) -> None:
    before = signal.getsignal(signal.SIGTERM)
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(train(dataclasses.replace(config, steps=1), progress=quiet))
    )
    thread.start()
    thread.join()
    assert results[0].step == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_handlers_come_back(config: TrainConfig) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(dataclasses.replace(config, steps=1), progress=quiet)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_validation_is_exact_whatever_the_window(config: TrainConfig, text: Path) -> None:
    import numpy as np

    model = statewise.create("rwkv4", vocab_size=256, num_layers=1, width=16).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = np.frombuffer(text.read_bytes()[:101], np.uint8)
    streams = torch.from_numpy(tokens[:100].astype(np.int64)).view(4, 25)
    logits, _ = model(streams[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), streams[:, 1:].flatten()).item() / math.log(2)
    model.train()
    for context in (1, 7, 24, 1000):
        assert validation_bits(model, tokens, rows=4, context=context, limit=1000) == pytest.approx(expected, rel=1e-10)
    assert model.training
    assert validation_bits(model, tokens[:3], rows=4, context=5, limit=1000) > 0


def test_the_record_of_a_snapshot_is_plain_json(config: TrainConfig) -> None:
    train(dataclasses.replace(config, steps=1), progress=quiet)
    record = json.loads((list_snapshots(Path(config.out))[-1][1] / "trainer.json").read_text())
    assert record["step"] == 1
    assert record["config"]["learning_rate"] == config.resolved().learning_rate
