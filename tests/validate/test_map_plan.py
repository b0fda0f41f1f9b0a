"""Device maps planned from the released checkpoint's header: what goes where, what waits, what is refused."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bagel_compress.budgets import device_option
from bagel_compress.budgets.device_option import HEADROOM, choose_device, outline_of
from bagel_compress.budgets.machine import Machine, found_targets
from bagel_compress.budgets.plan_devices import FREE_PARTS, SLACK, Gpu, _needs, gpu_of, held_bytes, plan_map
from bagel_compress.budgets.planned_build import planned_build
from bagel_compress.budgets.predict import ACTIVATIONS, CACHES, CONTEXT, predict
from bagel_compress.errors import TargetError
from bagel_compress.run.target import GIB, MIB, Target, Workload

TINY = Path(__file__).parents[1] / "data" / "golden" / "checkpoint"

LAYERS = 28


def gpus(*targets: str) -> list[Gpu]:
    return [gpu_of(Target.load(target), f"cuda:{index}") for index, target in enumerate(targets)]


@pytest.fixture(scope="module")
def builds():
    return {recipe: planned_build(recipe, None) for recipe in ("raw", "fp8-24gb", "nf4", "df11")}


@pytest.mark.parametrize("recipe", ["raw", "fp8-24gb", "nf4", "df11"])
def test_groups_weigh_what_the_budget_counts(builds, recipe):
    """The sum of all groups is the prediction's weights; DF11's embedding table is held decoded."""
    phase = predict(builds[recipe], Target.load("h100")).phases[0]
    weights = sum(size for part, size in phase.parts.items() if part not in (CACHES, ACTIVATIONS, CONTEXT))
    assert sum(held_bytes(builds[recipe]).values()) == pytest.approx(weights, rel=2e-3)


@pytest.mark.parametrize(
    ("recipe", "names", "used"),
    [
        ("fp8-24gb", ("12gb", "12gb"), 2),
        ("raw", ("24gb", "12gb"), 2),
        ("df11", ("16gb", "16gb"), 2),
        ("nf4", ("16gb", "12gb"), 1),
    ],
)
def test_what_fits_is_divided_in_order(builds, recipe, names, used):
    plan = plan_map(builds[recipe], gpus(*names))
    assert not plan.places.waiting
    assert len(plan.loads) == used
    runs = [device for device, _ in itertools.groupby(plan.places.layers)]
    assert runs == [f"cuda:{i}" for i in range(used)]
    assert all(load.total <= load.gpu.room for load in plan.loads)
    assert sum(load.weights for load in plan.loads) == sum(held_bytes(builds[recipe]).values())
    caches = sum(load.caches for load in plan.loads)
    assert 0.4 * GIB < caches < 0.7 * GIB


def test_no_other_division_leaves_more_room(builds):
    """Every border between two cards with every way to lay the parts aside."""
    both = gpus("24gb", "12gb")
    needs = _needs(builds["raw"], Workload())
    spares = []
    for border, chosen in itertools.product(range(LAYERS + 1), itertools.product((0, 1), repeat=len(FREE_PARTS))):
        parts = [[part for part, at in zip(FREE_PARTS, chosen, strict=True) if at == index] for index in (0, 1)]
        loads = (
            needs.load(both[0], range(border), ["embed_tokens", "home", *parts[0]], frozenset()),
            needs.load(both[1], range(border, LAYERS), parts[1], frozenset()),
        )
        spares.append(min(load.gpu.room - load.total for load in loads))
    plan = plan_map(builds["raw"], both)
    assert min(load.gpu.room - load.total for load in plan.loads) >= max(spares) - MIB


def test_what_is_planned_are_the_bytes_of_the_build(builds):
    """At four bytes a weight, as maps of unquantised fp32 modules are planned, NF4 would seem to need 58 GB."""
    assert 4 * sum(stored.unit.numel for stored in builds["nf4"].units) > 58e9
    assert sum(held_bytes(builds["nf4"]).values()) < 10.6e9


def test_what_fits_nowhere_waits(builds):
    plan = plan_map(builds["raw"], gpus("12gb"))
    waiting = plan.places.waiting
    assert {"embed_tokens", "vae", "vit", "lm_head", f"layers.{LAYERS - 1}"} <= waiting
    assert "layers.0" not in waiting
    assert plan.places.lies_on("layers.27.gen.q_proj") == torch.device("cpu")
    assert plan.places.device_of("layers.27") == torch.device("cuda:0")
    [load] = plan.loads
    held = held_bytes(builds["raw"])
    there = sum(size for group, size in held.items() if group not in waiting)
    assert load.weights == there + max(held["layers.27"], held["lm_head"])  # room for the largest that is brought
    assert load.total <= load.gpu.room
    assert plan.host == sum(held[group] for group in waiting)
    assert "host" in plan.table()
    assert "layers 6-27" in plan.table()


def test_room_is_kept_for_the_largest_group_that_is_brought_and_none_for_the_embedding(builds):
    needs, [gpu] = _needs(builds["raw"], Workload()), gpus("12gb")
    waiting = frozenset({"layers.3", "layers.4", "embed_tokens"})
    assert needs.load(gpu, [3, 4, 5], ["embed_tokens"], waiting).weights == 2 * needs.weights["layers.5"]
    assert needs.load(gpu, [5], ["embed_tokens"], waiting).weights == needs.weights["layers.5"]


@pytest.mark.parametrize(("recipe", "names"), [("df11", ("12gb", "12gb")), ("df11", ("12gb",))])
def test_codes_that_cannot_wait_are_refused_in_one_sentence(builds, recipe, names):
    with pytest.raises(TargetError, match=r"^df11 does not fit on these devices .*cannot wait in host memory") as fault:
        plan_map(builds[recipe], gpus(*names))
    assert "\n" not in str(fault.value)


def test_a_card_too_small_for_the_activations_is_refused(builds):
    with pytest.raises(TargetError, match="fewer bits or more devices"):
        plan_map(builds["nf4"], [Gpu("cuda:0", "small", 2 * GIB)])


def test_smaller_pictures_need_less(builds):
    small = Workload(image=(512, 512), input_image=(512, 512))
    assert not plan_map(builds["nf4"], gpus("12gb"), small).places.waiting
    assert plan_map(builds["nf4"], gpus("12gb")).places.waiting


# --- the option -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two cards of 12 GB, as far as planning asks."""
    free = {"cuda:0": 12 * GIB, "cuda:1": 12 * GIB}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], free[device]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "gpu")
    return free


def test_auto_takes_one_gpu_if_the_model_fits_and_else_a_map(two_gpus, builds, monkeypatch):
    monkeypatch.setattr(device_option, "outline_of", lambda folder: builds["fp8-24gb"])
    told = []
    places = device_option.choose_device("auto", "model", told.append)
    assert set(places.layers) == {"cuda:0", "cuda:1"}
    assert not places.waiting
    assert "cuda:1" in told[0]
    two_gpus["cuda:0"] = 40 * GIB
    assert device_option.choose_device("auto", "model") == "cuda"
    two_gpus["cuda:0"] = 12 * GIB
    assert device_option.choose_device("cuda:1,cuda:0", "model").home == "cuda:1"


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("cuda:2", "has 2 CUDA devices"),
        ("cuda:0,cuda:2", "has 2 CUDA devices"),
        ("cuda:0,cuda:0", "no GPU of its own"),
        ("cuda:0,cpu", "no GPU of its own"),
        ("gpu", "is no device"),
        ("meta", "is no device"),
        ("mps", "no Metal device"),
    ],
)
def test_devices_that_are_not_there(two_gpus, monkeypatch, device, sentence):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(TargetError, match=sentence):
        device_option.choose_device(device, "model")


def test_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_option.choose_device("auto", "model") == "cpu"
    with pytest.raises(TargetError, match="no CUDA device"):
        device_option.choose_device("cuda:0,cuda:1", "model")


def test_the_command_line_plans_over_targets(cli):
    code, out, _ = cli("budget", "fp8-24gb", "--target", "12gb", "12gb", "--together", "--json")
    devices = json.loads(out)["devices"]
    assert code == 0
    assert [d["device"] for d in devices] == ["cuda:0", "cuda:1"]
    assert devices[0]["layers"] + devices[1]["layers"] == list(range(LAYERS))
    code, out, _ = cli("budget", "raw", "--target", "12gb", "--together")
    assert code == 0
    assert "host" in out
    code, _, err = cli("budget", "df11", "--target", "12gb", "--together")
    assert code == 2
    assert "does not fit" in err


@pytest.mark.parametrize(("spare", "alone"), [(0, True), (-1, False)])
def test_the_first_gpu_is_used_alone_if_the_model_and_its_headroom_fit(
    spare: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = sum(held_bytes(outline_of(TINY)).values())
    free = held + HEADROOM + SLACK + spare
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda name: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "a GPU")
    said: list[str] = []
    found = choose_device("auto", TINY, said.append)
    assert (found == "cuda") == alone == (not said)


@pytest.mark.parametrize(("mib", "target"), [(8188, "8gb"), (12_288, "12gb"), (24_564, "24gb")])
def test_a_gpu_gets_the_target_of_its_memory(mib: int, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one for rehearsals, which fits every GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=mib * MIB))
    assert [t.name for t in found_targets(Machine(disk=1, memory=None, gpus=("a GPU",)))] == [target]


def test_a_gpu_that_is_smaller_than_every_target_is_told_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=5 * GIB))
    with pytest.raises(TargetError, match=r"small GPU has 5\.0 GiB; the smallest packaged target is 8gb"):
        found_targets(Machine(disk=1, memory=None, gpus=("small GPU",)))
