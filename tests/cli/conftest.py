"""A small trained-looking checkpoint, and a way to run commands as a user would, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import statewise
from statewise.cli import main
from statewise.inference import stir


class Told(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Told]


@pytest.fixture
def command(capsysbinary: pytest.CaptureFixture[bytes]) -> Command:
    """``command("inspect", path, "--json")`` → :class:`Told`."""

    def run(*arguments: object) -> Told:
        capsysbinary.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsysbinary.readouterr()
        return Told(code, out.decode(), err.decode())

    return run


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    """Run a command that must fail: exit code 2, nothing on standard output, one line on standard error."""

    def run(*arguments: object) -> str:
        told = command(*arguments)
        assert told.code == 2
        assert told.out == ""
        assert told.err.startswith("statewise: error: ")
        assert told.err.count("\n") == 1
        return told.err

    return run


def _saved(folder: Path, name: str) -> Path:
    torch.manual_seed(3)
    model = statewise.create(name, vocab_size=256, num_layers=2, width=64)
    stir(model, scale=0.3)
    statewise.save(model, folder / name)
    return folder / name


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model in our own format."""
    return _saved(tmp_path_factory.mktemp("models"), "rwkv4")


@pytest.fixture(scope="session", params=["rwkv4", "rwkv5", "rwkv6", "rwkv7", "mamba", "mamba2", "mamba3"])
def any_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind."""
    return _saved(tmp_path_factory.mktemp("models"), request.param)
