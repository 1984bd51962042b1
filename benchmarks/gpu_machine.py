"""All that a GPU can tell about this checkout, in one command: `make gpu`.

    python3 -m benchmarks.gpu_machine [--stages tests,memcheck,ops,models] [--minutes 8] [--results DIR]

Needs a Python whose torch has CUDA and sees a device, and nothing else: no other torch is fetched. An environment of
its own (``build/gpu``) borrows that Python's packages, and this checkout's sources are put on its path; what tests need
besides (pytest, hypothesis) is fetched only if it is missing, or taken from ``--wheels``. Nothing here imports torch:
it runs before there is an environment.

Stages: ``tests`` of the kernels; ``memcheck``, the kernels under compute-sanitizer; ``ops`` and ``models``, which
measure. All are run even if one fails; the last lines say how each ended, and the exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Found", "commands", "find_python", "main", "prepare"]

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tests", "memcheck", "ops", "models")
#: Module → what pip calls it.
NEEDED = {
    **{name: name for name in ("numpy", "safetensors", "rich", "matplotlib", "tensorboard", "pytest", "hypothesis")},
    "triton": "triton",
}
#: Nicer with, fine without.
WELCOME = {"xdist": "pytest-xdist"}
_MARK = "statewise-checkout.pth"

_ASK = """
import importlib.util, json, sys
found = {"python": sys.version.split()[0], "executable": sys.executable, "torch": None, "cuda": None, "devices": 0}
found["paths"] = [p for p in sys.path if p.rstrip("/").endswith(("site-packages", "dist-packages"))]
names = sys.argv[1].split(",")
found["missing"] = [name for name in names if importlib.util.find_spec(name) is None]
try:
    import torch
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "file": torch.__file__}
    if torch.cuda.is_available():
        found |= {"devices": torch.cuda.device_count(), "name": torch.cuda.get_device_name()}
    import triton
    found["triton"] = triton.__version__
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print("FOUND " + json.dumps(found))
"""


class CannotRun(Exception):
    """What is missing, and what to do about it."""


@dataclass
class Found:
    """What a Python has."""

    python: str
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def serves(self) -> bool:
        return bool(self.about.get("cuda")) and self.about.get("devices", 0) > 0

    def told(self) -> str:
        """One line."""
        if not self.about:
            return f"{self.python}: does not run"
        if self.about["torch"] is None:
            return f"{self.python}: no torch ({self.about.get('error', 'not installed')})"
        if not self.about["cuda"]:
            return f"{self.python}: torch {self.about['torch']}, built without CUDA"
        return f"{self.python}: torch {self.about['torch']} for CUDA {self.about['cuda']}, " + (
            f"{self.about['devices']} x {self.about.get('name', 'device')}" if self.about["devices"] else "no device"
        )


def ask(python: str) -> Found:
    """What ``python`` has; nothing about it if it does not run."""
    try:
        names = ",".join([*NEEDED, *WELCOME])
        done = subprocess.run([python, "-c", _ASK, names], capture_output=True, text=True, cwd=ROOT, check=False)
    except OSError:
        return Found(python)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    return Found(python, {} if line is None else json.loads(line.removeprefix("FOUND ")))


def find_python(candidates: Sequence[str], *, rehearse: bool = False) -> Found:
    """The first of ``candidates`` whose torch sees a GPU (for a rehearsal: that has torch).

    Raises:
        CannotRun: there is none; says what each lacks.
    """
    found = [ask(python) for python in candidates]
    for one in found:
        if one.serves or (rehearse and one.about.get("torch")):
            return one
    told = "\n".join(f"  {one.told()}" for one in found)
    raise CannotRun(
        f"no Python here has a torch that sees a GPU:\n{told}\n"
        "Name one (make gpu PYTHON=/path/to/python), or install torch with CUDA yourself; none is fetched from here."
    )


def prepare(found: Found, folder: Path, wheels: Path | None) -> str:
    """An environment that has ``found``'s packages, this checkout and what tests need; its Python.

    Raises:
        CannotRun: something is missing and cannot be had.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Without pip: most Pythons have one to borrow, and some have none to copy.
        create = [found.python, "-m", "venv", "--system-site-packages", "--without-pip", str(folder)]
        done = subprocess.run(create, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotRun(f"{found.python} -m venv: {done.stderr.strip()[-300:]}")
    purelib = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # "System" packages of an environment's environment are the base's, not its own: they are named here.
    lines = [str(ROOT / "src"), *found.about["paths"]]
    (Path(purelib) / _MARK).write_text("\n".join(lines) + "\n", "utf-8")
    have = ask(str(python))
    if have.about.get("file") != found.about.get("file"):
        raise CannotRun(f"{python} does not find the torch of {found.python}: {have.told()}")
    _fetch(have, folder, wheels, {**NEEDED, **WELCOME})
    have = ask(str(python))
    if have.about.get("file") != found.about.get("file"):
        raise CannotRun(f"after installing, {python} has another torch: {have.told()}; remove {folder}")
    if missing := [NEEDED[name] for name in have.about["missing"] if name in NEEDED]:
        raise CannotRun(
            f"missing: {', '.join(missing)}, and pip could not get them. Where no registry can be reached, bring "
            f"wheels: pip download --no-deps -d wheels {' '.join(missing)}, then make gpu WHEELS=wheels"
        )
    return str(python)


def _fetch(have: Found, folder: Path, wheels: Path | None, packages: dict[str, str]) -> None:
    """Try to install what is missing, whatever comes of it; torch and triton stay as they are."""
    missing = [packages[name] for name in have.about["missing"]]
    if not missing:
        return
    fixed = [f"{name}=={have.about[name]}" for name in ("torch", "triton") if have.about.get(name)]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(fixed) + "\n", "utf-8")
    source = ["--retries", "0", "--timeout", "10"] if wheels is None else ["--no-index", "--find-links", str(wheels)]
    print(f"installing {', '.join(missing)}", flush=True)
    if subprocess.run([have.python, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        subprocess.run([have.python, "-m", "ensurepip"], capture_output=True, check=False)
    install = [have.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *source]
    for name in missing:  # one by one: the lack of one keeps none of the others away
        subprocess.run([*install, "--constraint", str(constraints), name], check=False)


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    places = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"), reverse=True)
    return str(places[0]) if places else None


def commands(
    stage: str, python: str, options: argparse.Namespace, *, parallel: bool
) -> list[tuple[list[str], dict[str, str]]]:
    """What a stage runs, with what is added to the environment; nothing where it cannot be run here."""
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    rehearse = ["--rehearse"] if options.rehearse else []
    minutes = [] if options.minutes is None else ["--minutes", str(options.minutes)]
    if stage == "tests":
        test = [python, "-m", "pytest", "-p", "no:cacheprovider"]
        test += ["--numprocesses", str(min(8, os.cpu_count() or 1))] if parallel else []
        kernels = ["tests/gpu", "tests/laws/test_ops.py", "tests/ops", "-k", options.tests or "triton"]
        rest = ["tests/inference/test_step_graph.py", "tests/training/test_train_device.py"]
        return [([*test, *kernels], {}), ([*test, *rest], {})]
    if stage == "memcheck":
        check = [python, "-m", "benchmarks.gpu_memcheck", *rehearse]
        tool = find_sanitizer()
        if options.rehearse:
            return [([*check, "--only", "conv", "--jobs", "2"], {})]
        if tool is None:
            return []
        # Once without it: the kernels are compiled then, and what fails for another reason is told apart.
        sanitize = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "20"]
        jobs = ["--jobs", str(min(8, os.cpu_count() or 1))]
        return [([*check, *jobs], {}), ([*sanitize, *check], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})]
    if stage == "ops":
        peers = [] if options.rwkv_lm is None else ["--rwkv-lm", str(options.rwkv_lm)]
        peers += [] if options.vision_rwkv is None else ["--vision-rwkv", str(options.vision_rwkv)]
        out = ["--out", str(options.results / f"{date}-ops-gpu.json")]
        return [([python, "-m", "benchmarks.gpu", *out, *minutes, *peers, *rehearse], {})]
    out = ["--out", str(options.results / f"{date}-models-gpu.json")]
    return [([python, "-m", "benchmarks.gpu_models", *out, *minutes, *rehearse], {})]


def run_stages(python: str, options: argparse.Namespace, *, parallel: bool) -> dict[str, str]:
    """Stage → how it ended."""
    ended: dict[str, str] = {}
    for stage in options.stages:
        began, failed = time.monotonic(), ""
        todo = commands(stage, python, options, parallel=parallel)
        print(f"\n=== {stage}", flush=True)
        for command, extra in todo:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", **extra}
            environment.pop("TRITON_INTERPRET", None)
            if options.rehearse:
                environment["TRITON_INTERPRET"] = "1"
            print(" ".join(command), flush=True)
            status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
            if status:
                failed = failed or f"FAILED, exit status {status}"
                if stage == "memcheck":  # what fails by itself fails under a tool as well
                    break
        seconds = f", {time.monotonic() - began:.0f} s"
        ended[stage] = (failed or "ok") + seconds if todo else "left out: compute-sanitizer is not installed"
    return ended


def _stages(value: str) -> tuple[str, ...]:
    found = tuple(part for part in value.replace(",", " ").split() if part)
    for name in found:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"{name!r}; {', '.join(STAGES)} are accepted")
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_machine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=_stages, default=STAGES, help=f"of {', '.join(STAGES)}, in this order")
    parser.add_argument("--tests", metavar="EXPRESSION", help="pytest -k; default: triton")
    parser.add_argument("--minutes", type=float, help="of each of ops and models: nothing is begun after so long")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "gpu", metavar="DIR")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="where pip finds what is missing, without a network")
    parser.add_argument("--rwkv-lm", type=Path, metavar="DIR", help="a checkout whose kernels are built and timed too")
    parser.add_argument("--vision-rwkv", type=Path, metavar="DIR", help="likewise")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: everything on the CPU, at toy sizes")
    options = parser.parse_args(arguments)
    for name in ("results", "environment", "wheels", "rwkv_lm", "vision_rwkv"):
        value = getattr(options, name)
        setattr(options, name, None if value is None else value.resolve())
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a stage failed, 2 if none could be run."""
    options = parse(arguments)
    own = ROOT / ".venv" / "bin" / "python"
    try:
        found = find_python([sys.executable, *([str(own)] if own.exists() else [])], rehearse=options.rehearse)
        print(found.told(), flush=True)
        python = prepare(found, options.environment, options.wheels)
    except CannotRun as error:
        print(error, file=sys.stderr)
        return 2
    ended = run_stages(python, options, parallel="xdist" not in ask(python).about["missing"])
    print("\n" + "\n".join(f"{stage:10} {how}" for stage, how in ended.items()))
    return int(any(how.startswith("FAILED") for how in ended.values()))


if __name__ == "__main__":
    raise SystemExit(main())
