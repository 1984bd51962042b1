"""Models of images: bidirectional, so without a state; asked by the names that timm's users know."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]

#: Name of a released size → its architecture, and fields of that one's configuration.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "vrwkv_tiny": ("vrwkv", {"width": 192, "num_layers": 12}),
    "vrwkv_small": (
        "vrwkv",
        {"width": 384, "num_layers": 12, "post_norm": True, "layer_scale": 1.0, "drop_path_rate": 0.3},
    ),
    "vrwkv_base": (
        "vrwkv",
        {"width": 768, "num_layers": 12, "post_norm": True, "layer_scale": 1e-5, "drop_path_rate": 0.5},
    ),
    "vrwkv_large": (
        "vrwkv",
        {
            "width": 1024,
            "num_layers": 24,
            "image_size": 192,
            "post_norm": True,
            "key_norm": True,
            "layer_scale": 1e-5,
            "drop_path_rate": 0.1,
            "head_width": 3072,
        },
    ),
    "vrwkv6_tiny": ("vrwkv6", {"width": 192, "num_layers": 12}),
    "vrwkv6_small": (
        "vrwkv6",
        {"width": 384, "num_layers": 12, "post_norm": True, "layer_scale": 1e-5, "drop_path_rate": 0.3},
    ),
    "vrwkv6_base": (
        "vrwkv6",
        {"width": 768, "num_layers": 12, "post_norm": True, "layer_scale": 1e-5, "drop_path_rate": 0.5},
    ),
    "vim_tiny": ("vim", {"width": 192, "num_layers": 24}),
    "vim_small": ("vim", {"width": 384, "num_layers": 24, "drop_path_rate": 0.05}),
    "vim_base": ("vim", {"width": 768, "num_layers": 24}),
}
