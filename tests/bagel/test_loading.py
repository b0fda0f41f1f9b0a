"""Checkpoint folders: the official layout and its variants load; what is wrong is said in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel.errors import BagelError
from bagel.inputs import TextCodec
from bagel.layout import role_of
from bagel.loading import load_bagel, parameter_path
from bagel.sampler import FlowSettings, Sampler

FLOW = FlowSettings(num_timesteps=3)


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


def latent(folder: Path) -> torch.Tensor:
    result = Sampler.from_dir(folder).run(["a cat"], size=(32, 32), flow=FLOW).latent
    assert result is not None
    return result


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(folder / "ema.safetensors")
    change(tensors)
    save_file(tensors, folder / "ema.safetensors")


def test_shards_model_file_and_vae_folder_give_the_same(folder: Path, tmp_path: Path) -> None:
    expected = latent(folder)
    tensors = load_file(folder / "ema.safetensors")
    (folder / "ema.safetensors").rename(folder / "model.safetensors")
    (folder / "vae").mkdir()
    (folder / "ae.safetensors").rename(folder / "vae" / "ae.safetensors")
    assert torch.equal(latent(folder), expected)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i, part in enumerate((names[:50], names[50:])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert torch.equal(latent(folder), expected)


def test_sizes_come_from_shapes_not_from_configs(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key in ("max_latent_size", "vit_max_num_patch_per_side", "latent_patch_size", "vae_config"):
        config.pop(key)
    expected = latent(folder)
    (folder / "config.json").write_text(json.dumps(config))
    model = load_bagel(folder, torch.device("cpu"), torch.bfloat16)
    assert (model.config.max_latent_size, model.config.vit_max_patches, model.config.latent_patch_size) == (8, 8, 2)
    assert len(model.vit.layers) == 2
    assert torch.equal(latent(folder), expected)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("language_model.model.layers.1.mlp_moe_gen.up_proj.weight", None),
        ("vae2llm.weight", None),
        ("latent_pos_embed.pos_embed", (60, 64)),
        ("connector.fc1.bias", (7,)),
        ("vae2llm.weight", (64, 60)),
    ],
)
def test_missing_or_misshapen_tensor_is_named(folder: Path, name: str, shape: tuple[int, ...] | None) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name)
        if shape:
            tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)

    rewrite(folder, change)
    with pytest.raises(BagelError, match=name.replace(".", r"\.")):
        Sampler.from_dir(folder)


def test_extra_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"who.knows": torch.zeros(2)}))
    with pytest.raises(BagelError, match=r"who\.knows"):
        Sampler.from_dir(folder)


@pytest.mark.parametrize("file", ["llm_config.json", "vit_config.json", "ae.safetensors", "ema.safetensors"])
def test_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(BagelError, match=file.replace(".", r"\.")):
        Sampler.from_dir(folder)


def test_truncated_file(folder: Path) -> None:
    data = (folder / "ema.safetensors").read_bytes()
    (folder / "ema.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BagelError, match="not a readable safetensors"):
        Sampler.from_dir(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd"])
def test_index_may_not_leave_its_folder(folder: Path, name: str) -> None:
    (folder / "ema.safetensors").unlink()
    index = {"weight_map": {"vae2llm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BagelError, match="outside"):
        Sampler.from_dir(folder)


def test_missing_special_tokens_are_appended_in_order(folder: Path) -> None:
    """A fine-tune's tokenizer without the vision tokens: they become the next two ids."""
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    gone = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in gone]
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    text = TextCodec.from_dir(folder)
    size = 560 + 9  # base vocabulary and the nine added tokens that are left
    assert (text.bos, text.eos, text.image_start, text.image_end) == (561, 562, size, size + 1)


def test_tokenizer_from_vocab_and_merges(folder: Path) -> None:
    fast = TextCodec.from_dir(folder)
    (folder / "tokenizer.json").unlink()
    slow = TextCodec.from_dir(folder)
    for text in ("a red cat", "  leading spaces\n\nand  newlines\t12345 ", "I'LL we've 你好 😀", "<|im_start|>x"):
        assert slow.encode(text) == fast.encode(text)
        assert slow.decode(slow.encode(text)) == fast.decode(fast.encode(text))


def test_every_name_has_a_role_and_one_place(tiny: Path) -> None:
    names = list(load_file(tiny / "ema.safetensors"))
    assert all(role_of(n) for n in names)
    assert len({parameter_path(n) for n in names}) == len(names)
    assert role_of("language_model.model.layers.3.self_attn.q_proj_moe_gen.weight_x") is None


def test_a_text_is_its_own_tokens_and_no_others(folder: Path) -> None:
    """A tokenizer.json may add tokens around every text; a turn has its own two. Decoding leaves special tokens in."""
    plain = TextCodec.from_dir(folder)
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [plain.bos], "tokens": ["<|im_start|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    text = TextCodec.from_dir(folder)
    assert text.tokenizer.encode("a red cat").ids == [plain.bos, *plain.encode("a red cat")]  # what it would add
    assert text.encode("a red cat") == plain.encode("a red cat")
    assert text.turn("") == [text.bos, text.eos]
    assert text.decode(text.turn("a red cat")) == "<|im_start|>a red cat<|im_end|>"


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<|im_start|>yes<|im_end|>no", "yes"),
        ("<|im_start|>yes<|im_start|>no", "yes"),
        ("yes<|im_end|>", "yes"),
        ("<|im_start|>", ""),
        ("", ""),
    ],
)
def test_an_answer_is_what_stands_between_the_first_two_wrappers(folder: Path, said: str, answer: str) -> None:
    text = TextCodec.from_dir(folder)
    assert text.answer(text.encode(said)) == answer


def test_a_panic_of_the_tokenizer_is_one_sentence() -> None:
    """Panics of its Rust library are no Exception; an interrupt is none either, and passes."""

    class Broken:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def encode(self, *given: object, **options: object) -> None:
            raise self.error

        decode = encode

    class Panic(BaseException):
        """As pyo3_runtime.PanicException, which cannot be imported."""

    codec = TextCodec(Broken(Panic("range end index 7")), 0, 1, 2, 3)  # type: ignore[arg-type]
    for run in (lambda: codec.encode("a"), lambda: codec.decode([1])):
        with pytest.raises(BagelError, match=r"the tokenizer cannot .*\(range end index 7\); copy the"):
            run()
    with pytest.raises(KeyboardInterrupt):
        TextCodec(Broken(KeyboardInterrupt()), 0, 1, 2, 3).encode("a")  # type: ignore[arg-type]


def test_vocabulary_and_merges_alone_are_a_tokenizer(tiny: Path, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny / name, tmp_path)
    assert TextCodec.from_dir(tmp_path).encode("a red cat") == TextCodec.from_dir(tiny).encode("a red cat")
