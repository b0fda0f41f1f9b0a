"""A picture's denoising pass over memory that stays where it is, to be compiled or recorded as a CUDA graph.

The eager pass (`Bagel.velocity`) makes new arrays at every step. Here keys and values of contexts lie in arrays with
room for the block's own rows behind them, which every step overwrites; position rows, rope tables and wrapper rows are
made once for the picture. Operations and their order are those of the eager pass, so without a compiler the result has
the same bits.

    "static"       this alone
    "compiled"     torch.compile of the whole pass, one graph without breaks for all branches and steps. A compiler that
                   fuses operations rounds less often, so results differ by about the noise floor of `validate`
    "cuda-graph"   the eager pass's kernels, recorded once per branch and picture and replayed: the same bits, and no
                   time of the CPU per kernel

For a model on one device. A weight format whose decoder waits for the GPU cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bagel.context import Context
from bagel.errors import BagelError
from bagel.layers import exactly, linear_dtype
from bagel.model import Bagel, PackedPass, attention_rows, segments

StepRuntime = Literal["eager", "static", "compiled", "cuda-graph"]
RUNTIMES: tuple[StepRuntime, ...] = get_args(StepRuntime)
WARM_UP = 2  # passes before recording, in which libraries choose their kernels and take their workspaces

Run = Callable[..., Tensor]  # `velocity` of this module


class StaticStep:
    """The pass of one guidance branch: x [N, p*p*z] and t (one value) -> velocity [N, p*p*z]."""

    def __init__(
        self, model: Bagel, contexts: Sequence[Context], grids: Sequence[tuple[int, int]], wrap: tuple[int, int]
    ) -> None:
        """Copies the contexts' keys and values. Raises BagelError if the weights are not all on one device."""
        if model.places is not None or "velocity" in vars(model):  # by a device map; by a plan that moves weights
            raise BagelError("static steps need all weights on one device all the time; use the eager steps.")
        lens = tuple(rows * columns for rows, columns in grids)
        self._model = model
        self._work = PackedPass(
            contexts, [2] * len(lens), lens, model.block_rope(contexts, lens), causal=False, append=False
        )
        with torch.no_grad():
            self._wrappers = model.block_wrappers(wrap, len(lens))
            self._places = model.latent_pos_embed(model.latent_ids(grids))
        self.x = torch.zeros(sum(lens), model.config.latent_width, device=model.device)
        self.t = torch.zeros(1, device=model.device)
        self.caches = [
            [_with_room(context, layer, n + 2) for context, n in zip(contexts, lens, strict=True)]
            for layer in range(len(model.layers))
        ]

    @torch.no_grad()
    def load(self, x: Tensor, t: Tensor) -> None:
        """Puts a step's x and t where the pass reads them."""
        self.x.copy_(x)
        self.t.copy_(t.reshape(1))

    @torch.no_grad()
    def run(self, run: Run | None = None) -> Tensor:
        """The velocity at what was loaded. `run`: `velocity`, or a compiled form of it."""
        return (run or velocity)(self._model, self._work, self.x, self.t, self._wrappers, self._places, self.caches)


class GraphStep:
    """A static step as a CUDA graph."""

    def __init__(self, step: StaticStep, pool: Any = None) -> None:
        """Runs the step a few times and records it. `pool`: memory that graphs which never run at once share.

        Raises BagelError where there is no CUDA device or where the pass cannot be recorded.
        """
        if not step.x.is_cuda:
            raise BagelError(f"a CUDA graph needs a model on a CUDA device, this one is on {step.x.device}.")
        self._step, self._graph = step, torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step.run()
        torch.cuda.current_stream().wait_stream(side)
        try:
            with torch.cuda.graph(self._graph, pool=pool):
                self._out = step.run()
        except RuntimeError as error:
            raise BagelError(
                f"the denoising step of this build cannot be recorded as a CUDA graph ({error}); use the eager steps."
            ) from error

    def __call__(self) -> Tensor:
        """The velocity at what was loaded into the step."""
        self._graph.replay()
        return self._out.clone()


class Steps:
    """The static steps of one picture, a step per branch, made when the branch is first evaluated."""

    def __init__(self, runtime: StepRuntime, compiled: Run | None = None) -> None:
        """`compiled`: of "compiled", what `compiled_velocity` gives."""
        self._runtime, self._compiled = runtime, compiled
        self._made: dict[tuple[int, ...], tuple[StaticStep, Callable[[], Tensor]]] = {}
        self._pool: Any = None

    def velocity(
        self,
        model: Bagel,
        contexts: Sequence[Context],
        grids: Sequence[tuple[int, int]],
        wrap: tuple[int, int],
        x: Tensor,
        t: Tensor,
    ) -> Tensor:
        """As `Bagel.velocity` of `Bagel.noisy_block`. The contexts must be the same objects at every step."""
        key = tuple(id(context) for context in contexts)
        if key not in self._made:
            step = StaticStep(model, contexts, grids, wrap)
            step.load(x, t)
            self._made[key] = step, self._runner(step)
        step, run = self._made[key]
        step.load(x, t)
        return run()

    def _runner(self, step: StaticStep) -> Callable[[], Tensor]:
        if self._compiled is not None:
            if exactly():
                raise BagelError("compiled steps know no exact attention kernel; use the eager or static steps for it.")
            for caches in step.caches:
                for cached in chain.from_iterable(caches):
                    torch._dynamo.maybe_mark_dynamic(cached, 0)
        if self._runtime != "cuda-graph":
            return lambda: step.run(self._compiled)
        if self._pool is None and step.x.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        return GraphStep(step, self._pool)


def compiled_velocity(backend: str | Callable[..., object] = "inductor") -> Run:
    """`velocity`, compiled at its first call; contexts of another length are not compiled again."""
    return torch.compile(velocity, backend=backend, fullgraph=True)  # type: ignore[no-any-return]


def velocity(
    model: Bagel,
    work: PackedPass,
    x: Tensor,
    t: Tensor,
    wrappers: Tensor,
    places: Tensor,
    caches: Sequence[Sequence[tuple[Tensor, Tensor]]],
) -> Tensor:
    """`Bagel.velocity` of `Bagel.noisy_block` with what a picture's steps have in common given."""
    count = len(work.gen_lens)
    latents_ND = model.vae2llm(x.to(linear_dtype(model.vae2llm))) + model.time_embedder(t) + places
    h_TD = torch.cat([wrappers, latents_ND.to(model.dtype)])

    def attend(layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        keys, values = [], []
        parts = zip(caches[layer], segments(k_TKE, work), segments(v_TKE, work), strict=True)
        for (cached_k, cached_v), k, v in parts:
            cached_k[cached_k.shape[0] - k.shape[0] :].copy_(k)
            cached_v[cached_v.shape[0] - v.shape[0] :].copy_(v)
            keys.append(cached_k)
            values.append(cached_v)
        return attention_rows(q_THE, keys, values, work)

    last = len(model.layers) - 1
    for index, layer in enumerate(model.layers):
        h_TD = layer(h_TD, work.n_und, work.rope, attend, True, 2 * count if index == last else 0)
    return model.llm2vae(model.norm_gen(h_TD))  # type: ignore[no-any-return]


def _with_room(context: Context, layer: int, count: int) -> tuple[Tensor, Tensor]:
    """Copies of a layer's keys and values, [S + count, K, E] each, with room for `count` rows at the end."""
    made = []
    for past in context.keys_values(layer):
        cached = past.new_zeros(past.shape[0] + count, *past.shape[1:])
        cached[: past.shape[0]] = past
        made.append(cached)
    return made[0], made[1]
