"""Short cases for the tiny checkpoint: every mode, in a second."""

from pathlib import Path

from bagel_compress.run.case import Case

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/data/golden/checkpoint"
PICTURES = ROOT / "exports/cases"
FLOW = {"num_timesteps": 6, "cfg_interval": [0.0, 1.0]}
RECORD = {"steps": 3, "logits": 6, "tap_rows": 4}
HOUSE = {"image": "pictures/house.png"}


def case(name: str, kind: str, *turns: object, **more: object) -> Case:
    settings = {"flow": FLOW, "text": {"max_tokens": 6}, "record": RECORD}
    return Case.model_validate({"name": name, "kind": kind, "turns": turns, **settings, **more})


CASES = [
    case("t2i", "t2i", "a red fox", size=[64, 64], seed=1),
    case("edit", "edit", HOUSE, "make it night", seed=2,
         flow=FLOW | {"cfg_img_scale": 2.0, "cfg_renorm_type": "text_channel"}),
    case("think", "t2i", "a car", size=[32, 64], think=True, seed=3),
    case("understand", "understand", HOUSE, "what is this?"),
]  # fmt: skip
