"""FinetuneConfig: what is trained, on which data, how. One YAML file; the defaults are the official ones.

Official: `scripts/train.sh` and `train/pretrain_unified_navit.py` of BAGEL (AdamW 0.9/0.95, EMA 0.9999, dropped
conditions 0.1/0.3/0.3, packed sequences of about 10,240 tokens, mean of CE plus mean of MSE).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bagel.config import BagelConfig, ResizeRule
from bagel_compress.build.recipe import Match
from bagel_compress.errors import FinetuneError
from bagel_compress.io.yaml_model import FrozenModel, load_yaml

Kind = Literal["t2i", "edit", "vlm", "folder"]
OFFICIAL_VIT = ResizeRule(980, 224, 14)
# ViT rules of the official training data, where they are not the sampler's (bagel.md: editing, VQA).
TRAINING_VIT = {"edit": ResizeRule(518, 224, 14), "vlm": ResizeRule(980, 378, 14, 2_007_040)}
FREE_KEYS = frozenset({"steps", "save_every", "keep_states", "tensorboard"})  # may change when a run goes on

REPAIR_NEEDS = "a repair (recover) needs a lora and takes no data, because its lessons are a calibration set"


class PictureSides(FrozenModel):
    """Sides of pictures in pixels; the stride is the model's."""

    max_size: int = Field(gt=0, description="longest side")
    min_size: int = Field(gt=0, description="shortest side that is aimed at")
    max_pixels: int = Field(14 * 14 * 9 * 1024, gt=0)

    def with_stride(self, stride: int) -> ResizeRule:
        return ResizeRule(self.max_size, self.min_size, stride, self.max_pixels)


class DataGroup(FrozenModel):
    """One source of samples. Layouts are those of the official code, and a plain folder of pictures with captions."""

    kind: Kind = Field(description="t2i, edit: parquet files; vlm: pictures and a JSONL; folder: pictures and captions")
    path: str = Field(description="folder of the parquet files or of the pictures; relative to the config's folder")
    info: str | None = Field(None, description="edit, t2i: parquet_info JSON with the row groups of every file")
    jsonl: str | None = Field(None, description="vlm: the conversations")
    weight: float = Field(1.0, gt=0, description="how often a sample comes from this group, relative to the others")
    image: PictureSides | None = Field(None, description="rule of pictures that the VAE encodes; default: the model's")
    vit: PictureSides | None = Field(
        None, description="rule of pictures that the ViT sees; default: the official training's"
    )
    drop_text: float = Field(0.1, ge=0, lt=1)
    drop_vae: float = Field(0.3, ge=0, lt=1)
    drop_vit: float = Field(0.3, ge=0, lt=1)

    def model_post_init(self, context: Any) -> None:
        if (self.kind == "vlm") != (self.jsonl is not None):
            raise ValueError(f"jsonl goes with kind vlm and only with it, kind is {self.kind}")
        if self.info is not None and self.kind not in ("t2i", "edit"):
            raise ValueError(f"info goes with parquet files (t2i, edit), kind is {self.kind}")

    @property
    def name(self) -> str:
        return f"{self.kind} {self.path}"

    def rules(self, config: BagelConfig) -> tuple[ResizeRule, ResizeRule]:
        """Of pictures for the VAE and for the ViT."""
        vae = config.vae_rule if self.image is None else self.image.with_stride(config.vae_rule.stride)
        if self.vit is not None:
            return vae, self.vit.with_stride(config.vit_rule.stride)
        official = config.vit_rule == OFFICIAL_VIT
        return vae, TRAINING_VIT.get(self.kind, config.vit_rule) if official else config.vit_rule


class LoraConfig(FrozenModel):
    """Which linears get an adapter. The default are all linears of both experts."""

    rank: int = Field(16, gt=0)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    match: tuple[Match, ...] = Field((Match.model_validate({"component": "llm", "kind": "linear"}),), min_length=1)


class RecoverConfig(FrozenModel):
    """Repair of a build: what its adapters are taught (`recover.py`). Set by --recover and --calibration."""

    reference: str = Field(description="the full-precision checkpoint that the build was made of: folder or Hub id")
    calibration: str | None = Field(None, description="calibration set; BAGEL-nano's is packaged")


class FinetuneConfig(FrozenModel):
    """A fine-tuning run. Paths are relative to the file's folder."""

    model: str = Field(description="checkpoint, artifact (with lora) or Hub id")
    base: str | None = Field(None, description="gives what a checkpoint lacks: configs, tokenizer, VAE, ViT")
    data: tuple[DataGroup, ...] = ()
    lora: LoraConfig | None = Field(None, description="train adapters; without it all weights are trained")
    recover: RecoverConfig | None = Field(None, description="repair a compressed build instead of training on data")
    freeze: tuple[Match, ...] = Field((), description="roles that are not trained, as in a recipe")
    visual_und: bool = Field(True, description="train what sees: answers, ViT")
    visual_gen: bool = Field(True, description="train what draws: latents")
    steps: int = Field(gt=0)
    tokens: int = Field(10_240, gt=0, description="of a packed batch at most")
    accumulate: int = Field(1, gt=0, description="packed batches per step and process")
    lr: float = Field(2e-5, gt=0)
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-15, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradients")
    ema: float | None = Field(None, gt=0, lt=1, description="decay; default 0.9999 for all weights, none for adapters")
    ce_weight: float = Field(1.0, ge=0)
    mse_weight: float = Field(1.0, ge=0)
    timestep_shift: float = Field(1.0, gt=0)
    recompute: bool = Field(True, description="gradient checkpointing: layers are run again in the backward pass")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the computation")
    seed: int = Field(0, ge=0)
    save_every: int = Field(500, gt=0)
    keep_states: int = Field(1, gt=0, description="saves that keep the optimiser's state; older ones keep weights only")
    tensorboard: bool = False

    @classmethod
    def load(cls, path: str | Path) -> FinetuneConfig:
        """Reads a YAML file. Raises FinetuneError, in one sentence, on anything unknown or impossible."""
        path = Path(path)
        config = load_yaml(cls, path, "fine-tuning config", FinetuneError)
        recover = config.recover and config.recover.model_copy(
            update={key: _beside(getattr(config.recover, key), path.parent) for key in ("reference", "calibration")}
        )
        return config.model_copy(
            update={"data": tuple(_resolved(group, path.parent) for group in config.data), "recover": recover}
            | {key: _beside(getattr(config, key), path.parent) for key in ("model", "base")}
        )

    def with_recover(self, recover: RecoverConfig) -> FinetuneConfig:
        """The config of a repair. Raises FinetuneError if it trains something else."""
        if self.lora is None or self.data:
            raise FinetuneError(REPAIR_NEEDS + ".")
        return self.model_copy(update={"recover": recover})

    def model_post_init(self, context: Any) -> None:
        if not (self.visual_und or self.visual_gen):
            raise ValueError("visual_und and visual_gen are both false, so there is nothing to train")
        if self.recover is not None and (self.lora is None or self.data):
            raise ValueError(REPAIR_NEEDS)
        drawing = [g.name for g in self.data if g.kind != "vlm"]
        seeing = [g.name for g in self.data if g.kind == "vlm"]
        if not self.visual_gen and drawing:
            raise ValueError(f"visual_gen is false, but data group {drawing[0]} has pictures to draw")
        if not self.visual_und and seeing:
            raise ValueError(f"visual_und is false, but data group {seeing[0]} has answers to give")

    @property
    def decay(self) -> float | None:
        """Of the moving average of the weights; None: there is none."""
        return 0.9999 if self.ema is None and self.lora is None else self.ema

    def changed(self, stored: dict[str, Any]) -> list[str]:
        """Keys by which a stored dump of a run's config differs and which a run that goes on may not change."""
        mine = self.model_dump(mode="json")
        return sorted(k for k in (mine.keys() | stored.keys()) - FREE_KEYS if mine.get(k) != stored.get(k))


def _resolved(group: DataGroup, folder: Path) -> DataGroup:
    paths = {key: _beside(getattr(group, key), folder) for key in ("path", "info", "jsonl")}
    return group.model_copy(update=paths)


def _beside(path: str | None, folder: Path) -> str | None:
    """A relative path that exists beside the config, from there; anything else (a Hub id) as it is."""
    return str(folder / path) if path is not None and (folder / path).exists() else path
