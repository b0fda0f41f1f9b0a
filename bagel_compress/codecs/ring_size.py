"""How large the scratch ring of ring.py is, and whose units it may keep. No torch: plans and budgets ask for it."""

from __future__ import annotations

from collections.abc import Iterable

RING_ALIGNMENT = 64  # weights: units begin at multiples of 128 bytes


def ring_weights(units: Iterable[tuple[str, int]]) -> int:
    """Weights of the scratch ring in which these units (name, weights) are decoded at run time.

    Two of the largest decoder-layer unit, the one in use and the one to come, or the largest unit of all.
    """
    sizes = [(-(-weights // RING_ALIGNMENT) * RING_ALIGNMENT, ".layers." in name) for name, weights in units]
    largest = max((size for size, _ in sizes), default=0)
    return max(largest, 2 * max((size for size, in_layer in sizes if in_layer), default=0))


def serves_understanding(name: str, tensors: Iterable[str]) -> bool:
    """Whether a unit of these tensors belongs to the understanding expert alone, or is the head."""
    return name.startswith("language_model.") and not any("_moe_gen" in tensor for tensor in tensors)
