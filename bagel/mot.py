"""One Mixture-of-Transformers layer: two experts of one class, one shared attention.

Routing is by token kind and known beforehand, so packed rows are ordered: first the rows of the understanding expert,
then those of the generation expert. Each expert then works on one contiguous slice; nothing is gathered or scattered.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bagel.config import LLMConfig
from bagel.layers import RMSNorm, added, apply_rope, gated
from bagel.one_row import Linear

# (layer index, q [T', H, E], k [T, K, E], v [T, K, E]) -> [T', H, E]; q may hold only the rows still needed.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Expert(nn.Module):
    """The weights one kind of token sees in one layer."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, head
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = Linear(width, config.num_heads * head)
        self.k_proj = Linear(width, config.num_kv_heads * head)
        self.v_proj = Linear(width, config.num_kv_heads * head)
        self.q_norm = RMSNorm(head, config.rms_norm_eps)
        self.k_norm = RMSNorm(head, config.rms_norm_eps)
        self.o_proj = Linear(config.num_heads * head, width, bias=False)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.gate_proj = Linear(width, config.intermediate_size, bias=False)
        self.up_proj = Linear(width, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, width, bias=False)

    def query(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], in_fp32: bool) -> Tensor:
        """Queries [T, H, E] of normalised rows, after q_norm and rope. `in_fp32`: norm and rope in fp32."""
        q_THE = self.q_proj(x_TD).unflatten(-1, (self.num_heads, self.head_dim))
        return self._positioned(q_THE, self.q_norm, rope, in_fp32)

    def key_value(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], in_fp32: bool) -> tuple[Tensor, Tensor]:
        """Keys (after k_norm and rope) and values, [T, K, E] each."""
        k_TKE = self.k_proj(x_TD).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v_TKE = self.v_proj(x_TD).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return self._positioned(k_TKE, self.k_norm, rope, in_fp32), v_TKE

    def _positioned(self, x_THE: Tensor, norm: RMSNorm, rope: tuple[Tensor, Tensor], in_fp32: bool) -> Tensor:
        normed_THE = norm(x_THE.float() if in_fp32 else x_THE)
        return apply_rope(normed_THE, *rope).to(x_THE.dtype)

    def mlp(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x_TD), self.up_proj(x_TD)))  # type: ignore[no-any-return]


class MoTLayer(nn.Module):
    """Pre-norm decoder layer: h += attention(norm(h)); h += mlp(norm(h)), each row through its own expert."""

    def __init__(self, config: LLMConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.und = Expert(config)
        self.gen = Expert(config)

    def forward(
        self, x_TD: Tensor, n_und: int, rope: tuple[Tensor, Tensor], attend: Attend, in_fp32: bool, first: int = 0
    ) -> Tensor:
        """Rows [0, n_und) are of the understanding expert, the rest of the generation expert.

        `first`: rows before it are needed by nobody after this layer; only their keys and values are computed, and the
        rows [first, T) are returned. `first` = T stores keys and values and returns no rows.
        """
        total = x_TD.shape[0]
        experts = [(self.und, 0, n_und), (self.gen, n_und, total)]
        if not self.training:  # there an expert without rows takes part too: its gradients are zeros, not missing
            experts = [(e, a, b) for e, a, b in experts if b > a]
        q, k, v = [], [], []
        for expert, start, stop in experts:
            normed_TD = expert.input_layernorm(x_TD[start:stop])
            k_TKE, v_TKE = expert.key_value(normed_TD, _rows(rope, start, stop), in_fp32)
            k.append(k_TKE)
            v.append(v_TKE)
            if stop > (begin := max(start, first)) or self.training:
                q.append(expert.query(normed_TD[begin - start :], _rows(rope, begin, stop), in_fp32))
        q_THE = _join(q) if q else k[0].new_empty(0, self.und.num_heads, self.und.head_dim)
        o_TD = attend(self.index, q_THE, _join(k), _join(v)).flatten(1)
        return self._after_attention(x_TD[first:], o_TD, [(e, max(a, first) - first, b - first) for e, a, b in experts])

    def _after_attention(self, x_TD: Tensor, o_TD: Tensor, experts: list[tuple[Expert, int, int]]) -> Tensor:
        outs = []
        for expert, start, stop in experts:
            if stop > start or self.training:
                h_TD = added(x_TD[start:stop], expert.o_proj(o_TD[start:stop]))
                outs.append(added(h_TD, expert.mlp(expert.post_attention_layernorm(h_TD))))
        return _join(outs) if outs else x_TD[:0]


def _rows(rope: tuple[Tensor, Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
    return rope[0][start:stop], rope[1][start:stop]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
