"""Two hundred random bits of a real run's snapshot, one at a time: each is seen before training starts."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from statewise.errors import SnapshotError
from statewise.training import TrainConfig, latest_snapshot, train
from statewise.training.snapshot import verify_snapshot

FLIPS = 200


def quiet(report: object) -> None:
    """Shows nothing."""


def test_every_flip_is_seen(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a state is a value\n" * 20)
    config = TrainConfig(
        model="rwkv4",
        data=str(tmp_path / "text.txt"),
        out=str(tmp_path / "run"),
        steps=2,
        num_layers=1,
        width=16,
        context=4,
        batch_size=2,
        carry_state=True,
        eval_every=0,
        tensorboard=False,
        plot=False,
    )
    train(config, progress=quiet)
    snapshot = latest_snapshot(tmp_path / "run")
    assert snapshot is not None
    files = sorted(snapshot.iterdir())
    assert len(files) == 7
    chance = random.Random(11)
    for number in range(FLIPS):
        path = chance.choice(files)
        content = bytearray(path.read_bytes())
        sound = bytes(content)
        bit = chance.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(SnapshotError, match=path.name):
            verify_snapshot(snapshot)
        if number % 20 == 0:  # the whole way there takes longer
            with pytest.raises(SnapshotError, match=path.name):
                train(dataclasses.replace(config, steps=3, resume=True), progress=quiet)
        path.write_bytes(sound)
    assert train(dataclasses.replace(config, steps=3, resume=True), progress=quiet).step == 3
