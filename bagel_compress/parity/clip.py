"""CLIP score (Hessel et al. 2021): how well a picture matches its prompt, by a CLIP model that the user supplies.

The model is a folder in the layout of the Hub: config.json, model.safetensors, tokenizer.json. transformers reads it,
from safetensors only; nothing is downloaded. The score depends on the model, so no limit class includes it; a recipe
may limit how far a build's score is below the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from bagel.text import opened_tokenizer
from bagel_compress.errors import MissingExtraError, TraceError

FILES = ("config.json", "model.safetensors", "tokenizer.json")
# Of RGB in 0..1, from preprocessor_config.json of openai/clip-vit-base-patch32; the other models of that release agree.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Clip:
    """A loaded CLIP model. Calling it gives the cosine of a picture and a text; higher is better."""

    model: Any  # transformers.CLIPModel
    tokenizer: Tokenizer

    @classmethod
    def open(cls, folder: str | Path) -> Clip:
        """Loads a CLIP model. Raises MissingExtraError without transformers, TraceError if the folder holds none."""
        try:
            from transformers import CLIPModel
        except ImportError:
            raise MissingExtraError(
                "CLIP scores need the package transformers; install it with: pip install 'bagel-compress[clip]'."
            ) from None
        hint = f"give a folder with {', '.join(FILES)}"
        for name in FILES:
            if not (Path(folder) / name).is_file():
                raise TraceError(f"{folder} holds no CLIP model: {name} is missing; {hint}.")
        try:
            model = CLIPModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise TraceError(f"{folder} holds no CLIP model ({str(error).splitlines()[0]}); {hint}.") from None
        config: Any = model.config
        tokenizer = opened_tokenizer(Path(folder) / "tokenizer.json")
        tokenizer.enable_truncation(config.text_config.max_position_embeddings)
        return cls(model.eval(), tokenizer)

    @torch.no_grad()
    def __call__(self, picture_HWC: Tensor, text: str) -> float:
        """Cosine of the embeddings of a picture, uint8 [H, W, 3], and a text."""
        ids = torch.tensor([self.tokenizer.encode(text).ids])
        found = self.model(input_ids=ids, pixel_values=self._pixels(picture_HWC))
        return torch.cosine_similarity(found.image_embeds, found.text_embeds).item()

    @torch.no_grad()
    def classify(self, picture_HWC: Tensor, prompts: Sequence[Sequence[str]]) -> int:
        """Zero-shot classification of a picture, uint8 [H, W, 3]: the index of its class.

        `prompts` has a list of texts per class, equally long; the class whose mean text embedding is nearest wins.
        """
        coded = [self.tokenizer.encode(text).ids for texts in prompts for text in texts]
        longest = max(map(len, coded))
        ids = torch.tensor([c + [c[-1]] * (longest - len(c)) for c in coded])  # padded by the end token, which pools
        found = self.model(input_ids=ids, pixel_values=self._pixels(picture_HWC))
        text_CD = torch.nn.functional.normalize(found.text_embeds.unflatten(0, (len(prompts), -1)).mean(1), dim=-1)
        return int((text_CD @ found.image_embeds[0]).argmax())

    def _pixels(self, picture_HWC: Tensor) -> Tensor:
        """The model's input [1, 3, side, side]: resized (bicubic) so that the shorter side fits, and centre-cropped."""
        side: int = self.model.config.vision_config.image_size
        image = Image.fromarray(picture_HWC.numpy())
        scale = side / min(image.size)
        width, height = (max(side, round(scale * size)) for size in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        values = (np.asarray(image, np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
        return torch.from_numpy(values).permute(2, 0, 1)[None]
