"""A model of lmms-eval (0.7): its own tasks (MME, MMBench, MMMU, MM-Vet, MathVista, ...) on any model that we open.

    python -m lmms_eval --model bagel_compress --model_args pretrained=out/nf4,device=cuda --tasks mme

lmms-eval finds `manifest` through the entry point `lmms_eval.models`. The class is made when it asks for it, so that
this module imports without lmms-eval. Pictures go straight through the ViT, as in the official evaluation scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from bagel.settings import TextSettings
from bagel_compress.errors import BenchmarkError, MissingExtraError
from bagel_compress.evaluate.evaluate import open_any

NAME, CLASS = "bagel_compress", "BagelCompress"
MAX_TOKENS = 1024  # where a task gives no limit


def manifest() -> Any:
    """What lmms-eval's registry reads."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path=f"{__name__}.{CLASS}")


def __getattr__(name: str) -> Any:
    if name == CLASS:
        return _model_class()
    raise AttributeError(f"module {__name__} has no attribute {name}")


@cache
def _model_class() -> Any:
    try:
        from lmms_eval.api.model import lmms
    except ImportError:
        raise MissingExtraError(
            "the adapter needs the package lmms-eval; install it with: pip install lmms-eval."
        ) from None

    class BagelCompress(lmms):  # type: ignore[misc]
        """`pretrained`: checkpoint, artifact or export; `dtype`: bf16 or fp32. Batches are of one."""

        is_simple = True

        def __init__(
            self, pretrained: str, device: str = "cpu", dtype: str = "bf16", batch_size: int | str = 1, **unknown: Any
        ) -> None:
            super().__init__()
            if unknown := {name: value for name, value in unknown.items() if value is not None}:
                raise BenchmarkError(f"--model_args holds {', '.join(unknown)}; it takes pretrained, device and dtype.")
            self.sampler = open_any(pretrained, device, dtype)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return [self._answer(*request.args) for request in requests]

        def _answer(self, question: str, settings: Any, to_visual: Any, number: Any, task: str, split: str) -> str:
            document = self.task_dict[task][split][number]
            pictures = [picture for picture in to_visual(document) if hasattr(picture, "convert")]
            tokens = int(settings.get("max_new_tokens") or MAX_TOKENS)
            temperature = float(settings.get("temperature") or 0)
            drawn = bool(settings.get("do_sample")) and temperature > 0
            text = TextSettings(tokens, drawn, temperature) if drawn else TextSettings(tokens)
            answer = self.sampler.chat(pictures, question, text).text or ""
            until = settings.get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                answer = answer.partition(stop)[0] if stop else answer
            return answer

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError("bagel_compress answers in words; choose tasks of the type generate_until.")

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise NotImplementedError("bagel_compress answers one question at a time.")

    return BagelCompress
