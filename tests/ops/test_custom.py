"""Functions as operators of torch: what a first call costs, and calls that torch.compile watches without compiling."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from statewise import ops
from statewise.testing.cases import CASES, OpCase

FORMS = [pytest.param(case, backend, id=f"{case.op}-{backend}") for case in CASES for backend in ("native", "torch")]


def test_no_operator_imports_a_compiler() -> None:
    """torch._dynamo takes a second to import."""
    program = (
        "import sys, torch\n"
        "from statewise.testing.cases import CASES\n"
        "from statewise import ops\n"
        "for case in CASES:\n"
        "    for backend in ('native', 'torch'):\n"
        "        if ops.backends()[case.op][backend].serves:\n"
        "            inputs = {name: x.requires_grad_() for name, x in case.inputs(1, 5).items()}\n"
        "            y, _ = case.call(inputs, case.begin(1), backend=backend)\n"
        "            torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y), allow_unused=True)\n"
        "print(len(CASES), 'torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(CASES)), "False"]


@pytest.mark.parametrize(("case", "backend"), FORMS)
def test_runs_between_graphs(case: OpCase, backend: str) -> None:
    """Where torch.compile gives a function up, operators are called while it watches."""
    if not ops.backends()[case.op][backend].serves:
        pytest.skip(f"{backend} does not serve {case.op} here")
    inputs, begin = case.inputs(2, 9, torch.float32), case.begin(2, torch.float32)

    def watched(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(())
        for _ in range(2):
            with open("/dev/null"):  # nothing that a graph can hold
                torch._dynamo.graph_break()
                y, _ = case.call(tensors, begin, backend=backend)
                total = total + y.square().sum()
        return total

    found = []
    for function in (watched, torch.compile(watched)):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        y = function(leaves)
        found.append([y, *torch.autograd.grad(y, list(leaves.values()), allow_unused=True)])
    torch._dynamo.reset()
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
