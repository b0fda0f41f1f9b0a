"""A target of the tiny model's sizes."""

from __future__ import annotations

from bagel_compress.run.target import Target

SIZES = {"image": (128, 128), "input_image": (128, 128), "prompt_tokens": 48, "think_tokens": 48, "answer_tokens": 48}


def target(**settings: object) -> Target:
    """With export settings given as keywords."""
    device = {"name": "test", "memory_mib": 1024}
    return Target.model_validate({"name": "test", "device": device, "sizes": SIZES, "export": settings})
