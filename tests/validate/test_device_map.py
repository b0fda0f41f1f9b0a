"""Models spread over devices: the same bits, every layer on its device, maps planned from the bytes of a build."""

from dataclasses import replace

import pytest
import torch
from test_residency import own, run_all
from tiny_suite import TINY
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from torch.overrides import TorchFunctionMode

from bagel_compress.budgets.fake_model import fake_sampler
from bagel_compress.budgets.planned_build import planned_build
from bagel_compress.budgets.predict import run_passes
from bagel_compress.build.compress import compress
from bagel_compress.build.plan import make_plan
from bagel_compress.build.recipe import Recipe
from bagel_compress.io.packaged import find_recipe
from bagel_compress.run.device_map import DeviceMap, group_of
from bagel_compress.run.load import load, load_checkpoint
from bagel_compress.run.target import Device, Target, Workload
from bagel_compress.source.checkpoint import Checkpoint

# Two names of one device: they compare unequal, so rows cross and caches are split as on two cards.
NAMES = ("cpu", "cpu:0")
SMALL = Workload(image=(64, 64), input_image=(64, 64), prompt_tokens=8, think_tokens=8, answer_tokens=8)


def spread_map(layers: int, names=NAMES, waiting=frozenset()) -> DeviceMap:
    first = layers // 2
    return DeviceMap(
        (names[0],) * first + (names[1],) * (layers - first), names[0], names[1], names[1], names[1], waiting
    )


@pytest.fixture(scope="module")
def plain(reference):
    return run_all(own(reference))


def same(found, expected) -> bool:
    return torch.equal(found[1], expected[1]) and (found[0], *found[2:]) == (expected[0], *expected[2:])


def test_groups():
    paths = [
        "layers.12.und.q_proj",
        "embed_tokens",
        "lm_head",
        "vit.layers.3.mlp.fc1",
        "connector.fc1",
        "vae",
        "norm_und",
    ]
    assert [group_of(p) for p in paths] == ["layers.12", "embed_tokens", "lm_head", "vit", "vit", "vae", "home"]
    assert [group_of(p) for p in ("vae2llm", "llm2vae", "vit_pos_embed.pos_embed", "time_embedder.mlp.0")] == [
        "home", "home", "vit", "home",
    ]  # fmt: skip


WAITING = frozenset({"layers.1", "vit", "vae", "embed_tokens", "lm_head"})


@pytest.mark.parametrize("waiting", [frozenset(), WAITING], ids=["there", "waiting"])
def test_a_map_changes_no_bit(plain, waiting):
    sampler = load_checkpoint(Checkpoint.open(TINY), spread_map(3, waiting=waiting))
    assert sampler.bagel.layers[1].gen.q_proj.weight.is_meta == bool(waiting)
    assert same(run_all(sampler), plain)
    assert sampler.bagel.layers[1].gen.q_proj.weight.is_meta == bool(waiting)
    context = sampler.bagel.new_context()
    context.reserve(1)
    places = [context.keys_values(layer, 1)[0].untyped_storage().data_ptr() for layer in range(3)]
    assert places[0] != places[1] == places[2]


@pytest.mark.parametrize("recipe", ["df11", "nf4", "fp8-24gb"])
def test_artifacts_follow_a_map(recipe, tmp_path):
    checkpoint = Checkpoint.open(TINY)
    artifact = compress(make_plan(checkpoint, Recipe.load(find_recipe(recipe))), checkpoint, tmp_path / "a")
    assert same(run_all(load(artifact, spread_map(3))), run_all(load(artifact)))


class Indexed(TorchFunctionMode):
    """Indexing by plain operators: torch's own asks for the driver of a device even where tensors are fake."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            return indexed(*args)
        if func is torch.Tensor.__setitem__:
            return indexed(*args[:2]).add(args[2])  # there are no values to write: it compares devices and shapes
        return func(*args, **(kwargs or {}))


def indexed(x, index):
    axis = 0
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, int):
            x = x.select(axis, item)
            continue
        if item is None:
            x = x.unsqueeze(axis)
        elif isinstance(item, slice):
            start, stop, _ = item.indices(x.shape[axis])
            x = x.narrow(axis, start, max(0, stop - start))
        else:
            x = torch.nn.functional.embedding(item, x)
        axis += 1
    return x


def fake_on(places: DeviceMap):
    """The tiny model over fake tensors that lie where the map says, and its fake inputs."""
    build = planned_build("raw", str(TINY))
    sampler = fake_sampler(build, {})
    vae = [("vae", module) for module in sampler.vae.modules()]
    for path, module in [*sampler.bagel.named_modules(), *vae]:
        for name, tensor in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(tensor.to(places.lies_on(path)), requires_grad=False)
    sampler.bagel.places = places.places()
    return sampler


@pytest.mark.parametrize("task", ["t2i", "edit", "understand", "think"])
def test_every_layer_meets_only_what_lies_on_its_device(task):
    """On fake tensors of two cards, torch itself refuses an operator whose inputs lie on both."""
    target = Target(name="t", device=Device(name="x", memory_mib=1), sizes=SMALL)
    with FakeTensorMode(), Indexed():
        sampler = fake_on(replace(spread_map(3, ("cuda:0", "cuda:1")), vae="cpu"))
        sampler.picture = lambda packed, grid: None  # it would turn fake values into a picture
        with torch.no_grad():
            run_passes(sampler, task, target, lambda phase: None)
        context = sampler.bagel.new_context()
        context.reserve(1)
        assert [context.keys_values(layer, 1)[0].device.index for layer in (0, 1)] == [0, 1]
        sampler.bagel.places = replace(sampler.bagel.places, layers=sampler.bagel.places.layers[::-1])
        with pytest.raises(FakeTensorDeviceMismatchError):
            run_passes(sampler, task, target, lambda phase: None)
