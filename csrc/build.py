"""Compiles csrc/ into one library per instruction set. Needs a C++17 compiler and nothing else.

    python csrc/build.py DIRECTORY [--sanitize]

Used by the package's own build (hatch_build.py), which goes on without kernels where no compiler is found.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent

_X86 = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}

_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # a·b + c in one rounding where the processor can
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]

_SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def levels() -> dict[str, list[str]]:
    """Instruction set → flags, for the machine this runs on."""
    return _X86 if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}


def compiler() -> str | None:
    """``CXX``, or the first of c++, g++ and clang++ that is there."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in wanted if (found := shutil.which(name))), None)


def build(folder: Path, *, sanitize: bool = False) -> list[Path]:
    """Write ``_kernels_LEVEL.so`` for every level into ``folder``; all of them or none.

    Raises:
        RuntimeError: there is no compiler, or it fails; the message holds what it said.
    """
    program = compiler()
    if program is None:
        raise RuntimeError("no C++ compiler found (CXX, c++, g++, clang++)")
    flags = [*_FLAGS, *(_SANITIZE if sanitize else [])]
    sources = sorted(HERE.glob("*.cpp"))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        work = Path(name)

        def run(*arguments: str) -> None:
            done = subprocess.run([program, *arguments], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{program} failed:\n{done.stderr[-4000:]}")

        def compile_one(level: str, source: Path) -> None:
            target = work / f"{source.stem}.{level}.o"
            run(*flags, *levels()[level], "-c", str(source), "-o", str(target))

        for job in [pool.submit(compile_one, level, source) for level in levels() for source in sources]:
            job.result()
        built = []
        for level in levels():
            objects = [str(work / f"{source.stem}.{level}.o") for source in sources]
            linked = work / f"_kernels_{level}.so"
            run(*flags, "-shared", *objects, "-o", str(linked))
            built.append(linked)
        folder.mkdir(parents=True, exist_ok=True)
        finished = []
        for linked in built:
            part = folder / f"{linked.name}.{os.getpid()}.part"
            shutil.copyfile(linked, part)
            finished.append(part.replace(folder / linked.name))  # a process that runs the old one keeps it
        return finished


def main() -> None:
    parser = argparse.ArgumentParser(prog="csrc/build.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    options = parser.parse_args()
    try:
        for path in build(options.directory, sanitize=options.sanitize):
            print(f"{path} {path.stat().st_size / 1e6:.2f} MB")
    except RuntimeError as error:
        sys.exit(f"csrc/build.py: {error}")


if __name__ == "__main__":
    main()
