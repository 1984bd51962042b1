"""Models small enough for a test of a bridge, double precision, so that another order of sums changes no choice."""

from __future__ import annotations

from typing import Any

import torch

import statewise

FAMILIES = tuple(statewise.list_models("language"))
VOCAB = 32


def small(family: str, **fields: Any) -> Any:
    """Two blocks, ready to generate, with weights moved off their start so that the state matters."""
    torch.manual_seed(7)
    model = statewise.create(family, **{"vocab_size": VOCAB, "num_layers": 2, "width": 64, **fields}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def prompts(*lengths: int) -> list[torch.Tensor]:
    """One row of ids a length."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str, filler: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of several lengths, padded on the ``"left"`` or ``"right"``."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), filler), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask
