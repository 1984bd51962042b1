"""Blocks compiled one by one: all but the first of a model share what was compiled, so that depth costs no time."""

from __future__ import annotations

from torch import nn

__all__ = ["compile_blocks"]


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """``torch.compile`` every block of a language model, in place; names in its state dict stay as they are.

    Args:
        model: one of ours, with ``blocks`` (RWKV) or ``backbone.layers`` (Mamba).
        backend: as of ``torch.compile``.
    """
    blocks = getattr(model, "blocks", None)
    blocks = model.get_submodule("backbone.layers") if blocks is None else blocks
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        block.compile(backend=backend)
