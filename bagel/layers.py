"""The small parts: norms, rotary positions, gated MLP, attention. Dtype changes are written here, there is no autocast.

Shape suffixes in this package: T packed tokens, D hidden width, H query heads, K key/value heads, E width of a head,
B batch, C channels, P patches, V vocabulary, N latent tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagel.one_row import norm_fits, one_norm


class RMSNorm(nn.Module):
    """Normalises in fp32, rounds to the input's dtype, then multiplies by the weight (in that order)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if norm_fits(x, self.weight):
            return one_norm(x, self.weight, self.eps)
        if torch.is_grad_enabled():
            x_wide = x.float()
            return self.weight * (x_wide * self._scale(x_wide.pow(2))).to(x.dtype)
        # x is widened twice, so that no more than one array of its size in fp32 is ever held
        scale = self._scale(x.pow(2) if x.dtype == torch.float32 else x.float().square_())
        x_wide = x * scale if x.dtype == torch.float32 else x.float().mul_(scale)
        return scaled(x_wide.to(x.dtype), self.weight)

    def _scale(self, squares: Tensor) -> Tensor:
        return torch.rsqrt(squares.mean(-1, keepdim=True) + self.eps)


class WideLayerNorm(nn.LayerNorm):
    """LayerNorm computed and returned in fp32 whatever the dtype of input and weights (as CUDA autocast does)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), _float(self.bias), self.eps)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def linear_dtype(module: nn.Module) -> torch.dtype:
    """The dtype a linear wants its input in: of its weight. A module that keeps its weight in another form says it in
    `computes_in`, or wants bf16.

    An adapter around a linear (`base_layer`) wants what the linear wants.
    """
    module = getattr(module, "base_layer", module)
    return module.weight.dtype if isinstance(module, nn.Linear) else getattr(module, "computes_in", torch.bfloat16)


def rope_table(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, E] of rotary positions, half-split (NeoX) form: angles in fp32, rounded to `dtype`."""
    inv_freq = inverse_frequencies(head_dim, theta, positions_T.device)
    angles_TE = torch.cat([positions_T[:, None].float() * inv_freq] * 2, dim=-1)
    return angles_TE.cos().to(dtype), angles_TE.sin().to(dtype)


def inverse_frequencies(head_dim: int, theta: float, device: torch.device | str = "cpu") -> Tensor:
    """theta^(-2k/E) for k = 0 .. E/2-1, fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    return 1.0 / (theta**exponents)


def apply_rope(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotates every head of every token. Works in the dtype that `x` and the tables promote to."""
    first, second = x_THE.chunk(2, dim=-1)
    if torch.is_grad_enabled():
        rotated_THE = torch.cat([-second, first], dim=-1)
        return x_THE * cos_TE[:, None] + rotated_THE * sin_TE[:, None]
    sin_first, sin_second = sin_TE[:, None].chunk(2, dim=-1)
    out_THE = x_THE * cos_TE[:, None]
    out_first, out_second = out_THE.chunk(2, dim=-1)
    out_first -= second * sin_first
    out_second += first * sin_second
    return out_THE


# --- results in the memory of an argument -----------------------------------------------------------------------------
# A new array of some MB costs the CPU about as much as the arithmetic that fills it, and on a GPU it is peak memory. So
# where no gradient is wanted the result replaces an argument that the caller owns: the same operation, the same bits.


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor; x is spent."""
    if torch.is_grad_enabled() or torch.promote_types(x.dtype, factor.dtype) != x.dtype:
        return x * factor
    return x.mul_(factor)


def added(x: Tensor, y: Tensor) -> Tensor:
    """x + y; y is spent."""
    if torch.is_grad_enabled() or torch.promote_types(x.dtype, y.dtype) != y.dtype:
        return x + y
    return y.add_(x)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; gate is spent."""
    return scaled(nn.functional.silu(gate, inplace=not torch.is_grad_enabled()), up)


# --- attention --------------------------------------------------------------------------------------------------------


Kernel = Literal["fast", "exact"]
_kernel: ContextVar[Kernel] = ContextVar("attention_kernel", default="fast")


@contextmanager
def attention_kernel(kernel: Kernel) -> Iterator[None]:
    """Inside: "fast" is flash-attn or SDPA (the default), "exact" a plain fp32 softmax of fp32 products.

    The exact one is what the official code was recorded with, and a second opinion for noise floors.
    """
    token = _kernel.set(kernel)
    try:
        yield
    finally:
        _kernel.reset(token)


def exactly() -> bool:
    """Whether `attention_kernel("exact")` surrounds the call; a compiled pass never is (bagel/static_step.py)."""
    return not torch.compiler.is_compiling() and _kernel.get() == "exact"


@functools.cache
def flash_varlen() -> Callable[..., Tensor] | None:
    """flash-attn's varlen kernel, or None where the package is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func  # type: ignore[no-any-return]


def attention(q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], causal: bool) -> Tensor:
    """Attention inside each of B segments: q[b] is [T_b, H, E], k[b] and v[b] are [S_b, K, E]; returns [sum T, H, E].

    Query head h uses key/value head h // (H/K), the scale is 1/sqrt(E), and a causal mask is aligned to the bottom
    right (the last query sees every key). flash-attn where it is installed and can (CUDA, 16 bit), else torch's SDPA.
    """
    half = q[0].dtype in (torch.bfloat16, torch.float16)
    if q[0].is_cuda and half and not exactly() and (flash := flash_varlen()) is not None:
        return _attention_flash(flash, q, k, v, causal)
    if len(q) > 1 and len({t.shape for t in q}) == 1 and len({t.shape for t in k}) == 1:
        return _attention_sdpa(torch.stack(list(q)), torch.stack(list(k)), torch.stack(list(v)), causal).flatten(0, 1)
    outs = [_attention_sdpa(a[None], b[None], c[None], causal)[0] for a, b, c in zip(q, k, v, strict=True)]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attention_sdpa(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, causal: bool) -> Tensor:
    q_len, k_len = q_BTHE.shape[1], k_BSKE.shape[1]
    mask = None
    if causal and 1 < q_len < k_len:
        mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q_BTHE.device).tril(k_len - q_len)
    out_BHTE = sdpa(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        mask,
        is_causal=causal and q_len > 1 and q_len == k_len,
    )
    return out_BHTE.transpose(1, 2)


def sdpa(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """torch's scaled-dot-product attention with grouped heads; [B, H, T, E]."""
    if exactly():
        return _exact(q_BHTE, k_BKSE, v_BKSE, mask, is_causal)
    grouped = q_BHTE.shape[1] != k_BKSE.shape[1]
    if grouped and mask is not None and q_BHTE.is_cuda:  # the masked CUDA kernels take no grouped heads
        groups = q_BHTE.shape[1] // k_BKSE.shape[1]
        k_BKSE, v_BKSE = k_BKSE.repeat_interleave(groups, 1), v_BKSE.repeat_interleave(groups, 1)
        grouped = False
    return F.scaled_dot_product_attention(
        q_BHTE, k_BKSE, v_BKSE, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
    )


def _exact(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    groups = q_BHTE.shape[1] // k_BKSE.shape[1]
    k_BHSE, v_BHSE = (t.float().repeat_interleave(groups, 1) for t in (k_BKSE, v_BKSE))
    scores = q_BHTE.float() @ k_BHSE.transpose(-1, -2) * q_BHTE.shape[-1] ** -0.5
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v_BHSE).to(q_BHTE.dtype)


def _attention_flash(
    flash: Callable[..., Any], q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], causal: bool
) -> Tensor:
    return flash(  # type: ignore[no-any-return]
        torch.cat(list(q)), torch.cat(list(k)), torch.cat(list(v)),
        cu_seqlens_q=_starts(tuple(map(len, q)), q[0].device), cu_seqlens_k=_starts(tuple(map(len, k)), q[0].device),
        max_seqlen_q=max(p.shape[0] for p in q), max_seqlen_k=max(p.shape[0] for p in k), causal=causal,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _starts(lens: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each segment of packed rows starts and the last one ends, int32; made once for all layers and steps."""
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
