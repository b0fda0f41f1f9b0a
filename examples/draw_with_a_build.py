"""Draw a picture with a build, then ask the same model what is in it.

    python examples/draw_with_a_build.py MODEL PROMPT [SIDE] [OUT.png] [DEVICE] [STEPS]

MODEL is a folder that `compress` or `export` wrote, a full-precision checkpoint, or a Hub id of either. Without
arguments the small model that comes with the package draws; it knows coloured shapes on coloured grounds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import bagel_compress as bc
from bagel.settings import FlowSettings

NANO = Path(bc.__file__).parent / "data" / "BAGEL-nano"


def main(
    model: str = str(NANO),
    prompt: str = "a red circle on a blue ground",
    side: str = "32",
    out: str = "out/picture.png",
    device: str = "auto",
    steps: str = "25",
) -> None:
    sampler = bc.open_model(model, device)
    drawn = sampler.run([prompt], size=(int(side), int(side)), seed=7, flow=FlowSettings(num_timesteps=int(steps)))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    drawn.image.save(out)
    answer = sampler.run([drawn.image, "what is in the picture?"], output="text")
    print(f"{out}: {drawn.image.width} x {drawn.image.height} pixels; the model sees: {answer.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
