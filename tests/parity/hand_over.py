"""A state handed from one project to another: every pair that exists, both ways, and the largest difference.

`python -m tests.parity.hand_over` prints the table for the packages that are installed. A pair is one project, one
family and one direction. What is compared is what the next token's logits become (for fla, which has no language model
here, what the recurrence gives next), after a prompt that the giver has read and the taker has not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import statewise
from statewise.ops import wkv6, wkv7

VOCAB, TOKEN = 40, 5
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Row(NamedTuple):
    """One hand-over: ``gap`` is the largest difference, ``scale`` the largest number it is a difference of."""

    project: str
    family: str
    what: str
    gap: float
    scale: float


def row(project: str, family: str, what: str, got: Tensor, want: Tensor) -> Row:
    if got.shape != want.shape:
        raise ValueError(f"{project}, {family}, {what}: shapes {tuple(got.shape)} and {tuple(want.shape)}")
    return Row(project, family, what, float((got - want).abs().max()), float(want.abs().max()))


def stirred(model: Any, by: float) -> Any:
    """The same model with noise on every weight, so that what starts as zero or one counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model


def both_ways(
    project: str, family: str, model: Any, logits: Tensor, after: Tensor, after_ours: Tensor, given: list[Tensor]
) -> Iterator[Row]:
    """Rows of a language model that read ``PROMPT`` there (``logits``, then ``after`` one token more).

    Args:
        after_ours: what the other project gave for ``TOKEN`` from our state.
        given: its own state after ``PROMPT``, in its layout.
    """
    token = torch.tensor([TOKEN])
    own, state = model(torch.tensor([PROMPT]))
    want, _ = model.step(token, state)
    taken, _ = model.step(token, model.init_state(1).from_layout(project_layout(project), given))
    yield row(project, family, "logits of a prompt", own[0, -1], logits)
    yield row(project, family, "its state continues here", taken[0], after)
    yield row(project, family, "our state continues there", after_ours, want[0])


def project_layout(project: str) -> str:
    return {"rwkv": "rwkv-pip", "mambapy": "mamba.py"}.get(project, project)


_ASK_RWKV = """
import sys, torch
from rwkv.model import RWKV
folder, prompt, token = sys.argv[1], list(map(int, sys.argv[2].split(","))), int(sys.argv[3])
model = RWKV(model=folder + "/model", strategy="cpu fp32")
with torch.no_grad():
    logits, state = model.forward(prompt, None)
    kept = [part.clone() for part in state]
    after, _ = model.forward([token], state)
    from_ours, _ = model.forward([token], torch.load(folder + "/ours.pt"))
torch.save({"logits": logits, "state": kept, "after": after, "from_ours": from_ours}, folder + "/told.pt")
"""

RWKV: dict[str, dict[str, Any]] = {
    "rwkv4": {"width": 64},
    **{f"rwkv5 {version}": {"width": 64, "head_size": 32, "version": version} for version in ("5.0", "5.1", "5.2")},
    "rwkv6": {"width": 64, "head_size": 32},
    "rwkv7": {"width": 128, "head_size": 64},
}


@torch.no_grad()
def rwkv(family: str) -> Iterator[Row]:
    """The `rwkv` package, in a process of its own: it decides when it is imported whether it will read RWKV-7."""
    torch.manual_seed(0)
    model: Any = stirred(
        statewise.create(family.split()[0], vocab_size=VOCAB, num_layers=2, **RWKV[family]),
        0.2,
    )
    with tempfile.TemporaryDirectory() as folder:
        statewise.save(model, Path(folder, "model.pth"), format="rwkv")
        torch.save(model(torch.tensor([PROMPT]))[1].to_layout("rwkv-pip"), Path(folder, "ours.pt"))
        chosen = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(family == "rwkv7"))}
        done = subprocess.run(
            [sys.executable, "-c", _ASK_RWKV, folder, ",".join(map(str, PROMPT)), str(TOKEN)],
            env={**os.environ, **chosen},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise RuntimeError(f"the rwkv package, {family}: {done.stderr[-2000:]}")
        told = torch.load(Path(folder, "told.pt"))
    yield from both_ways("rwkv", family, model, told["logits"], told["after"], told["from_ours"], told["state"])


def made_by_transformers(family: str) -> Any:
    """A small random model of transformers."""
    import transformers as hf

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3}
    model: Any = {
        "rwkv4": lambda: hf.RwkvForCausalLM(hf.RwkvConfig(**sizes, context_length=64, rescale_every=0)),
        "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**sizes)),
        "falcon-mamba": lambda: hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**sizes)),
        "mamba2": lambda: hf.Mamba2ForCausalLM(
            hf.Mamba2Config(**sizes, head_dim=16, num_heads=8, n_groups=2, state_size=8)
        ),
    }[family]()
    return stirred(model.eval(), 0.05)


TRANSFORMERS = ("rwkv4", "mamba", "falcon-mamba", "mamba2")


@torch.no_grad()
def transformers(family: str) -> Iterator[Row]:
    theirs = made_by_transformers(family)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model: Any = statewise.load(folder)
    prompt, token = torch.tensor([PROMPT]), torch.tensor([[TOKEN]])
    told = theirs(prompt, use_cache=True)
    ours = model(prompt)[1].to_layout("transformers")
    if family == "rwkv4":
        given = [part.clone() for part in told.state]
        after = theirs(token, state=told.state, use_cache=True).logits
        after_ours = theirs(token, state=ours, use_cache=True).logits
    else:
        layers = told.cache_params.layers
        given = [part.clone() for layer in layers for part in (layer.conv_states[0], layer.recurrent_states[0])]
        after = theirs(token, cache_params=told.cache_params, use_cache=True).logits
        for index, layer in enumerate(layers):
            layer.conv_states[0], layer.recurrent_states[0] = ours[2 * index], ours[2 * index + 1]
        after_ours = theirs(token, cache_params=told.cache_params, use_cache=True).logits
    yield from both_ways("transformers", family, model, told.logits[0, -1], after[0, -1], after_ours[0, -1], given)


class MambaPyModel(torch.nn.Module):
    """What mambapy.lm builds around its core; that module itself does not import without mamba-ssm."""

    def __init__(self, **fields: Any) -> None:
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm

        super().__init__()
        config = MambaConfig(**fields)
        self.embedding = torch.nn.Embedding(VOCAB, config.d_model)
        self.mamba = Mamba(config)
        self.norm_f = RMSNorm(config.d_model, config.rms_norm_eps, config.mup)
        self.lm_head = torch.nn.Linear(config.d_model, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.norm_f(self.mamba(self.embedding(tokens))))

    def step(self, token: Tensor, caches: list[Any]) -> tuple[Tensor, list[Any]]:
        hidden, caches = self.mamba.step(self.embedding(token), caches)
        return self.lm_head(self.norm_f(hidden)), caches


MAMBAPY: dict[str, dict[str, Any]] = {"mamba": {}, "mamba with inner norms": {"inner_layernorms": True}}


@torch.no_grad()
def mambapy(family: str) -> Iterator[Row]:
    torch.manual_seed(0)
    theirs = stirred(MambaPyModel(d_model=48, n_layers=3, **MAMBAPY[family]), 0.05)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder, "model.pth"))
        model: Any = statewise.load(Path(folder, "model.pth"))
    caches: list[Any] = [(None, torch.zeros(1, 96, 3)) for _ in range(3)]
    logits = torch.zeros(0)
    for token in PROMPT:
        logits, caches = theirs.step(torch.tensor([token]), caches)
    given = [part.clone() for cache in caches for part in cache]
    after, _ = theirs.step(torch.tensor([TOKEN]), caches)
    ours = model(torch.tensor([PROMPT]))[1].to_layout("mamba.py")
    after_ours, _ = theirs.step(torch.tensor([TOKEN]), list(zip(ours[::2], ours[1::2], strict=True)))
    yield from both_ways("mambapy", family, model, logits[0], after[0], after_ours[0], given)
    whole = theirs(torch.tensor([PROMPT]))
    yield row("mambapy", family, "logits, its parallel scan", model(torch.tensor([PROMPT]))[0], whole)


FLA = ("rwkv6", "rwkv7")


@torch.no_grad()
def fla(family: str) -> Iterator[Row]:
    """fla-core's plain recurrences; K and V differ, so that a state the wrong way round could not pass."""
    torch.manual_seed(0)
    batch, time, heads, rows, columns = 2, 19, 3, 8, 5
    cut = 11
    r, k, direction = torch.randn(3, batch, time, heads, rows)
    v, u = torch.randn(batch, time, heads, columns), torch.randn(heads, rows)
    start = torch.randn(batch, heads, rows, columns)
    log_w = -0.6 * torch.rand(batch, time, heads, rows)
    direction = torch.nn.functional.normalize(direction, dim=-1)
    removed, added = -direction, direction * torch.rand(batch, time, heads, rows)

    def ours(part: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        if family == "rwkv6":
            return wkv6(r[:, part], log_w[:, part], k[:, part], v[:, part], u, state)
        return wkv7(r[:, part], log_w[:, part], k[:, part], v[:, part], removed[:, part], added[:, part], state)

    def theirs(part: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        # By head; and the recurrence of RWKV-7 there scales r by 1 / sqrt(K).
        inputs: tuple[Tensor, ...]
        if family == "rwkv6":
            from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

            inputs = (r, k, v, log_w)
            turned = (tensor[:, part].transpose(1, 2) for tensor in inputs)
            y, state = naive_recurrent_rwkv6(*turned, u, scale=1.0, initial_state=state, output_final_state=True)
        else:
            from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

            inputs = (r * rows**0.5, k, v, removed, added, log_w)
            turned = (tensor[:, part].transpose(1, 2) for tensor in inputs)
            y, state = dplr_recurrence(*turned, initial_state=state)
        return y.transpose(1, 2), state

    first, rest = slice(None, cut), slice(cut, None)
    (y_ours, mid_ours), (y_theirs, mid_theirs) = ours(first, start), theirs(first, start)
    after_ours, after_theirs = ours(rest, mid_ours), theirs(rest, mid_theirs)
    yield row("fla", family, "outputs, given an initial state", y_ours, y_theirs)
    yield row("fla", family, "final state", after_ours[1], after_theirs[1])
    yield row("fla", family, "its state continues here", ours(rest, mid_theirs)[0], after_theirs[0])
    yield row("fla", family, "our state continues there", theirs(rest, mid_ours)[0], after_ours[0])


# The module that must be there, what it shows, and for which families.
PROJECTS: dict[str, tuple[Callable[[str], Iterator[Row]], tuple[str, ...]]] = {
    "rwkv": (rwkv, tuple(RWKV)),
    "transformers": (transformers, TRANSFORMERS),
    "mambapy": (mambapy, tuple(MAMBAPY)),
    "fla": (fla, FLA),
}


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="States handed over, float32: largest difference of what follows")
    for heading, side in (
        ("project", "left"),
        ("family", "left"),
        ("", "left"),
        ("difference", "right"),
        ("of", "right"),
    ):
        table.add_column(heading, justify=side)
    for project, (shows, families) in PROJECTS.items():
        if find_spec(project) is None:
            table.add_row(project, "", "not installed", "", "")
            continue
        for family in families:
            for shown in shows(family):
                table.add_row(project, family, shown.what, f"{shown.gap:.1e}", f"{shown.scale:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
