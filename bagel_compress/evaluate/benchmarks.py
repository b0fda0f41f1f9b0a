"""The published benchmarks as data: files, settings and figures of the official scripts (docs/evaluation.md).

One row per benchmark. What its files mean is in `read_*.py`, how it is scored in `exact.py`, `geneval.py` and
`judged.py`. Settings are those of the model's official evaluation scripts and figures those of its report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bagel.settings import FlowSettings, TextSettings
from bagel_compress.errors import BenchmarkError
from bagel_compress.io.yaml_model import did_you_mean

Group = Literal["understanding", "text to image", "editing"]
Scoring = Literal["exact", "detector", "judge", "none"]

GENEVAL = FlowSettings(cfg_interval=(0.0, 1.0))
WISE = FlowSettings()


def _edit(image: float, low: float = 0.0) -> FlowSettings:
    return FlowSettings(cfg_img_scale=image, cfg_interval=(low, 1.0), cfg_renorm_type="text_channel")


@dataclass(frozen=True, slots=True)
class BenchmarkInfo:
    """One benchmark. `files`: what --data must hold, path -> what it is. `official`: category -> reported figure."""

    name: str
    title: str
    group: Group
    scoring: Scoring
    files: Mapping[str, str]
    flow: FlowSettings = field(default_factory=FlowSettings)
    text: TextSettings = field(default_factory=lambda: TextSettings(2048, do_sample=True, temperature=0.3))
    pictures: int = 1  # per prompt
    official: Mapping[str, float] = field(default_factory=dict)
    thinking: Mapping[str, float] = field(default_factory=dict)  # reported with --think
    judge_prompts: str = ""  # the user's copy of the judge's prompts, below --data
    official_judge: str = ""
    url: str = ""


_GPT4O, _GPT41 = "gpt-4o-2024-11-20", "gpt-4.1-2025-04-14"

BENCHMARKS: Mapping[str, BenchmarkInfo] = {
    info.name: info
    for info in (
        BenchmarkInfo(
            "mme", "MME", "understanding", "exact",
            {"questions/*.txt": "one file per subtask: picture, question, answer, separated by tabs (the folder "
             "Your_Results of the official scripts)",
             "MME_Benchmark_release_version": "the pictures, SUBTASK/NAME or SUBTASK/images/NAME"},
            text=TextSettings(20), official={"total": 2388.0},
            url="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
        ),
        BenchmarkInfo(
            "mmmu", "MMMU (validation)", "understanding", "exact",
            {"*/validation-*.parquet": "one folder per subject, as the data set's repository MMMU/MMMU has them"},
            text=TextSettings(10), official={"total": 55.3}, url="https://huggingface.co/datasets/MMMU/MMMU",
        ),
        BenchmarkInfo(
            "mmvp", "MMVP", "understanding", "exact",
            {"Questions.csv": "columns Index (or lndex), Question, Options, Correct Answer",
             "MMVP Images": "the pictures, INDEX.jpg"},
            text=TextSettings(100), url="https://huggingface.co/datasets/MMVP/MMVP",
        ),
        BenchmarkInfo(
            "geneval", "GenEval", "text to image", "detector",
            {"evaluation_metadata.jsonl": "one prompt a line: tag, include, exclude, prompt"},
            GENEVAL, pictures=4, official={"overall": 82.0}, url="https://github.com/djghosh13/geneval",
        ),
        BenchmarkInfo(
            "geneval-rewritten", "GenEval, rewritten prompts", "text to image", "detector",
            {"evaluation_metadata_long.jsonl": "as evaluation_metadata.jsonl, with the prompts rewritten"},
            GENEVAL, pictures=4, official={"overall": 88.0}, url="https://github.com/ByteDance-Seed/Bagel",
        ),
        BenchmarkInfo(
            "wise", "WISE", "text to image", "judge",
            {"cultural_common_sense.json": "prompts 1 to 400",
             "spatio-temporal_reasoning.json": "prompts 401 to 700",
             "natural_science.json": "prompts 701 to 1000"},
            WISE, official={"overall": 0.52}, thinking={"overall": 0.70}, judge_prompts="gpt_eval_mp.py",
            official_judge=_GPT4O, url="https://github.com/PKU-YuanGroup/WISE",
        ),
        BenchmarkInfo(
            "dpg", "DPG-Bench", "text to image", "none",
            {"*.txt": "one prompt a file"}, WISE, url="https://github.com/TencentQQGYLab/ELLA",
        ),
        BenchmarkInfo(
            "gedit", "GEdit-Bench-EN", "editing", "judge",
            {"data/*.parquet": "the data set's repository stepfun-ai/GEdit-Bench"},
            _edit(1.5, 0.4), official={"semantics": 7.36, "quality": 6.83, "overall": 6.52},
            judge_prompts="vie_prompts.py", official_judge=_GPT41, url="https://huggingface.co/datasets/stepfun-ai/GEdit-Bench",
        ),
        BenchmarkInfo(
            "imgedit", "ImgEdit-Bench (single turn)", "editing", "judge",
            {"singleturn/singleturn.json": "key -> id (the picture below singleturn/), prompt, edit_type"},
            _edit(1.5),
            official={"background": 3.28, "adjust": 3.23, "style": 4.26, "extract": 1.48, "remove": 2.99, "add": 3.45,
                      "replace": 3.76, "compose": 3.18, "action": 4.38, "overall": 3.28},
            judge_prompts="singleturn/judge_prompt.json", official_judge=_GPT4O,
            url="https://huggingface.co/datasets/sysuyy/ImgEdit",
        ),
        BenchmarkInfo(
            "kris", "KRIS-Bench", "editing", "judge",
            {"*/annotation.json": "one folder per category with its pictures: number -> ori_img, gt_img, ins_en, "
             "explain_en"},
            _edit(1.5),
            official={"Attribute Perception": 64.27, "Spatial Perception": 62.42, "Temporal Prediction": 42.45,
                      "Social Science": 55.40, "Natural Science": 56.01, "Logical Reasoning": 52.54,
                      "Instruction Decomposition": 50.56, "overall": 56.21},
            thinking={"Attribute Perception": 67.42, "Spatial Perception": 68.33, "Temporal Prediction": 58.67,
                      "Social Science": 63.55, "Natural Science": 61.40, "Logical Reasoning": 48.12,
                      "Instruction Decomposition": 50.22, "overall": 60.18},
            judge_prompts="prompts.py", official_judge=_GPT4O, url="https://huggingface.co/datasets/Liang0223/KRIS_Bench",
        ),
        BenchmarkInfo(
            "rise", "RISEBench", "editing", "judge",
            {"datav2_total_w_subtask.json": "a list of index, category, instruction, image, reference ..., beside the "
             "folders of pictures"},
            _edit(2.0), official={"accuracy": 6.1}, thinking={"accuracy": 11.9}, judge_prompts="utils.py",
            official_judge=_GPT41, url="https://huggingface.co/datasets/PhoenixZ/RISEBench",
        ),
        BenchmarkInfo(
            "intelligentbench", "IntelligentBench", "editing", "none",
            {"data.jsonl": "one edit a line: id, image (a path beside the file), prompt"},
            _edit(2.0), official={"overall": 44.0}, thinking={"overall": 55.3},
            url="https://github.com/ByteDance-Seed/Bagel",
        ),
    )
}  # fmt: skip


def benchmark_info(name: str) -> BenchmarkInfo:
    """The row of a name. Raises BenchmarkError on a name that is none."""
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise BenchmarkError(f"there is no benchmark {name!r}{did_you_mean(name, BENCHMARKS)}; there are {known}.")
    return BENCHMARKS[name]
