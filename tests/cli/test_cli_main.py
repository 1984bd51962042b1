"""The command itself: help without torch, one line and exit code 2 for every mistake."""

from __future__ import annotations

import subprocess
import sys

import pytest

from statewise.cli import COMMANDS, main

HEAVY = ("torch", "numpy", "safetensors", "rich", "matplotlib")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from statewise.cli import main; code = main(sys.argv[1:]);"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert len(done.stdout.splitlines()) > 1


def test_module_and_help_name_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "statewise", "--help"], capture_output=True, text=True, check=True)
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert (
        listed
        == set(COMMANDS)
        == set(
            ["demo", "train", "generate", "evaluate", "classify", "inspect", "convert", "verify", "bench", "backends"]
        )
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "a command is needed"),
        (["fly"], "unknown command 'fly'"),
        (["--fly"], "unknown option '--fly'"),
        (["backends", "--fly"], "--fly"),
        (["inspect"], "CHECKPOINT"),
        (["verify", "rwkv4", "--dtype", "int8"], "--dtype"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("statewise: error: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--debug", "fly"], ["fly", "--debug"]])
def test_debug_lets_the_traceback_through(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="fly"):
        main(arguments)


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("statewise.cli.backends.main", interrupted)
    assert main(["backends"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_an_unforeseen_error_names_its_kind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(arguments: list[str]) -> int:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("statewise.cli.backends.main", fails)
    assert main(["backends"]) == 2
    assert capsys.readouterr().err == "statewise: error: RuntimeError: two lines (--debug shows where)\n"


def test_a_reader_who_leaves_is_met_quietly() -> None:
    code = "import sys; from statewise.cli import main; sys.exit(main(['backends', '--json']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141
