"""Compiles the CPU kernels while a wheel is built; without a compiler the wheel is built without them, and says so."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):
    PLUGIN_NAME = "kernels"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        spec = importlib.util.spec_from_file_location("statewise_csrc_build", root / "csrc" / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        folder = root / "src" / "statewise" / "ops"
        try:
            module.build(folder)
        except RuntimeError as error:
            for stale in folder.glob("_kernels_*.so"):  # of an earlier build: it may be of other sources
                stale.unlink()
            print(f"statewise: built without compiled CPU kernels; plain torch serves. {error}", file=sys.stderr)
            return
        # One wheel a platform: the libraries know neither Python nor torch.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
