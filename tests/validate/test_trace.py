"""Traces: what is recorded, that a replay gives the same bits, resuming, and every kind of bad file."""

import json
import struct
from dataclasses import asdict

import pytest
import torch
from tiny_suite import CASES, PICTURES, ROOT, case

from bagel.flow import FlowSettings
from bagel.sampler import TextSettings
from bagel_compress.errors import InputError, TargetError, TraceError
from bagel_compress.parity import record, replay
from bagel_compress.parity.trace import TraceFile, image_tensor
from bagel_compress.run.case import Case, load_cases


def test_a_replay_of_the_reference_gives_the_same_bits(reference, trace_file):
    for name in trace_file.header.cases:
        trace = trace_file.read(name)
        again = replay.replay(reference, trace)
        assert again.facts.contexts == trace.facts.contexts
        differing = [n for n, t in again.tensors.items() if not torch.equal(t, trace.tensors[n])]
        assert differing == []


def test_a_free_run_is_what_the_sampler_itself_does(reference, trace_file):
    trace = trace_file.read("think")
    settings = trace.case.flow.model_dump()
    text = TextSettings(max_tokens=trace.case.text.max_tokens)
    result = reference.run(["a car"], think=True, size=(32, 64), flow=FlowSettings(**settings), text=text, seed=3)
    assert result.text == trace.facts.text
    assert torch.equal(image_tensor(result.image), trace.tensors["image"])
    assert torch.equal(replay.rerun(reference, trace).tensors["image"], trace.tensors["image"])


def test_branches_steps_taps_and_logits_are_recorded(trace_file):
    trace = trace_file.read("edit")
    assert trace.steps == [0, 2, 4]
    assert {
        "step0/v_cond",
        "step0/v_text",
        "step0/v_image",
        "step0/v",
        "vae_latent0",
        "picture0",
    } <= trace.tensors.keys()
    events = {name.split("/")[1] for name in trace.tensors if name.startswith("tap/")}
    assert events == {"01_vae", "02_vit", "03_text", "step0", "step2"}
    assert trace_file.read("understand").tensors["logits"].shape[0] == len(trace_file.read("understand").tensors["ids"])


@pytest.mark.parametrize(
    ("count", "wanted", "kept"),
    [(5, 8, [0, 1, 2, 3, 4]), (5, 5, [0, 1, 2, 3, 4]), (5, 1, [0]), (5, 2, [0, 4]), (49, 4, [0, 16, 32, 48])],
)
def test_steps_and_rows_that_are_recorded_are_evenly_spread(count, wanted, kept):
    assert replay._spread(count, wanted) == kept


def test_the_noise_floor_of_a_repetition_is_zero_and_of_a_kernel_is_not(trace_file):
    floor = trace_file.header.facts["t2i"].floor["velocity.path"]
    assert floor["repeat"] == 0.0
    assert 0 < floor["kernel"] < 0.1
    assert 0 < floor["dtype"] < 0.1


def test_finished_cases_are_not_recorded_again(reference, tmp_path, monkeypatch):
    suite = [(c, PICTURES) for c in CASES[:1]]
    out = tmp_path / "a.safetensors"
    first = record.record_cases(reference, "tiny", "d", suite, out, floors=("repeat",))
    recorded = []
    real = replay.record
    monkeypatch.setattr(replay, "record", lambda s, c, f: recorded.append(c.name) or real(s, c, f))
    more = [*suite, (case("other", "chat", "hello"), PICTURES)]
    again = record.record_cases(reference, "tiny", "d", more, out, floors=("repeat",))
    assert recorded == ["other"]
    assert list(again.header.cases) == ["t2i", "other"]
    assert torch.equal(again.read("t2i").tensors["latent"], first.read("t2i").tensors["latent"])


def test_an_interrupted_recording_goes_on(reference, tmp_path, monkeypatch):
    suite = [(c, PICTURES) for c in (CASES[0], CASES[3])]
    real = replay.record
    recorded = []

    def dies_at_the_second(sampler, case, folder):
        recorded.append(case.name)
        if len(recorded) == 2:
            raise KeyboardInterrupt
        return real(sampler, case, folder)

    monkeypatch.setattr(replay, "record", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        record.record_cases(reference, "tiny", "d", suite, tmp_path / "a.safetensors", floors=())
    record.record_cases(reference, "tiny", "d", suite, tmp_path / "a.safetensors", floors=())
    assert recorded == ["t2i", "understand", "understand"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_truncated_trace_is_refused(trace_file, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(trace_file.path.read_bytes()[:-1000])
    with pytest.raises(TraceError, match="truncated"):
        TraceFile.open(cut)
    with pytest.raises(TraceError, match="does not exist"):
        TraceFile.open(tmp_path / "none.safetensors")


def test_a_trace_of_another_source_or_size_is_refused(trace_file, reference):
    with pytest.raises(TraceError, match="another checkpoint"):
        trace_file.expect_source("0123", "out/nf4")
    other = asdict(reference.bagel.config)
    other["llm"]["num_layers"] = 28
    with pytest.raises(TraceError, match=r"llm\.num_layers = 3, the model has 28"):
        trace_file.expect_model(other)


def _with_header(source, target, change):
    data = source.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header["__metadata__"])
    new = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])


def test_a_trace_of_another_sampler_version_or_of_nothing_is_refused(trace_file, tmp_path):
    def other_version(metadata):
        metadata["bagel_trace"] = json.dumps(json.loads(metadata["bagel_trace"]) | {"sampler": "0"})

    _with_header(trace_file.path, tmp_path / "old.safetensors", other_version)
    with pytest.raises(TraceError, match="sampler version '0'"):
        TraceFile.open(tmp_path / "old.safetensors")
    _with_header(trace_file.path, tmp_path / "none.safetensors", lambda m: m.pop("bagel_trace"))
    with pytest.raises(TraceError, match="is no trace"):
        TraceFile.open(tmp_path / "none.safetensors")


def test_a_case_that_the_model_cannot_run_is_named(reference):
    big = case("big", "t2i", "a fox", size=[1024, 1024])
    with pytest.raises(TargetError, match=r"case big cannot be run.*at most 128"):
        replay.record(reference, big, PICTURES)
    with pytest.raises(InputError, match=r"nowhere\.png does not exist"):
        replay.record(reference, case("x", "edit", {"image": "nowhere.png"}, "edit"), PICTURES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nkind: t2i\nturns: [x]\nsize: [64, 64]\nspeed: 3", "unknown key 'speed'"),
        ("name: a\nkind: t2i\nturns: [x]", "needs a size"),
        ("name: a\nkind: edit\nturns: [x]", "needs a picture"),
        ("name: a\nkind: chat\nturns: [{image: a.png}]", "takes no picture"),
        ("name: a\nkind: t2i\nturns: [x]\nsize: [64, 64]\nflow: {cfg_renorm_type: local}", "cfg_renorm_type"),
        ("name: [", "not YAML"),
        ("- 1", "holds a list"),
    ],
)
def test_a_bad_case_is_one_sentence(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(TargetError, match=message) as error:
        Case.load(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)


def test_the_shipped_suites_load_and_cover_the_modes():
    for folder in ("exports/cases", "exports/cases/tiny"):
        cases = [c for c, _ in load_cases([ROOT / folder])]
        kinds = {(c.kind, c.think) for c in cases}
        assert {
            ("t2i", False),
            ("edit", False),
            ("understand", False),
            ("chat", False),
            ("t2i", True),
            ("edit", True),
        } <= kinds
        assert any(len(c.pictures) == 2 for c in cases)
        assert any(c.size and c.size[0] != c.size[1] for c in cases)


def test_two_cases_of_one_name_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(TargetError, match="holds no case"):
        load_cases([tmp_path])
    with pytest.raises(TargetError, match="two cases are called"):
        load_cases([ROOT / "exports/cases/chat.yaml", ROOT / "exports/cases/tiny/chat.yaml"])


def test_a_case_is_recorded_again_if_anything_about_it_differs(reference, tmp_path, monkeypatch):
    out, chat, real, recorded = tmp_path / "a.safetensors", CASES[3], replay.record, []
    monkeypatch.setattr(replay, "record", lambda s, c, f: recorded.append(c.name) or real(s, c, f))

    def again(case=chat, digest="d", floors=("repeat",)):
        recorded.clear()
        record.record_cases(reference, "tiny", digest, [(case, PICTURES)], out, floors=floors)
        return recorded == [case.name]

    assert again()
    assert not again()
    assert not again(floors=())
    assert again(floors=("repeat", "kernel"))  # one of them is not known yet
    assert not again(floors=("kernel",))
    assert again(digest="e", floors=())
    assert again(digest="e", floors=("repeat",))
    assert again(chat.model_copy(update={"seed": chat.seed + 1}), digest="e", floors=())
