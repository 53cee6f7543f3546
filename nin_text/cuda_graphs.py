"""The blocks of an encoder in training on a GPU, as CUDA graphs.

A step of a deep network of small layers is some thousand kernels, and a GPU waits for the program
that launches them one by one. A graph is captured once, and replayed by a single launch. It is
bound to the number of rows; batches have few different ones (see `blocks.Rows`), and each of those
that come back gets its own.
The blocks may also be compiled, with graphs or without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from nin_text.errors import UserError, in_one_line
from nin_text.text import NiNTextModel, through_blocks

MOST_GRAPHS = 16  # further sizes are launched kernel by kernel
WARM_UPS = 3  # what is chosen or compiled at first sight must not be captured
# Whatever other threads of the program do on the GPU meanwhile, "global" would make an error.
CAPTURE_ERROR_MODE = "thread_local"


@contextmanager
def block_graphs(model: nn.Module, *, graphs: bool, compiled: bool) -> Iterator[None]:
    """Let the encoder of a model run its blocks as graphs, where gradients are wanted.

    Outputs and gradients are overwritten by the next batch of the same size: there must be one
    backward pass between two forward passes, and gradients must not be added up over batches. Nor
    may the loss of another batch still be held: what it knows of the weights, made outside of the
    graph, cannot be captured.

    Args:
        model: where it has no `NiNTextModel`, nothing changes.
        graphs: whether to capture graphs; the model is on a GPU then.
        compiled: whether to compile the blocks first (torch.compile), which fuses what lies
            between the matrix products.

    Raises:
        UserError: if they cannot be compiled here.
    """
    encoder = encoder_of(model)
    if encoder is None or not (graphs or compiled):
        yield
        return
    encoder.graphs = BlockGraphs(encoder, graphs=graphs, compiled=compiled)
    try:
        with _compiling() if compiled else nullcontext():
            yield
    finally:
        encoder.graphs = None


@contextmanager
def _compiling() -> Iterator[None]:
    """Room for every kind of block, with dropout and without; what fails, in one sentence."""
    with torch._dynamo.config.patch(recompile_limit=64):
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"--compile failed ({in_one_line(error)}); it needs a C compiler, the headers of "
                f"Python and, on a GPU, Triton: install what is missing, or leave it out"
            ) from error


def encoder_of(model: nn.Module) -> NiNTextModel | None:
    """The NiN text encoder in a model, if there is one."""
    return next((m for m in model.modules() if isinstance(m, NiNTextModel)), None)


class BlockGraphs:
    """Stands in for `text.through_blocks`; see `block_graphs` for the arguments."""

    def __init__(self, encoder: NiNTextModel, *, graphs: bool, compiled: bool) -> None:
        self.encoder = encoder
        self.most = MOST_GRAPHS if graphs else 0
        self.seen: set[tuple[Any, ...]] = set()
        self.captured: dict[tuple[Any, ...], _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle() if graphs else None
        blocks = cast(Sequence[Callable[[Tensor, Tensor], Tensor]], encoder.blocks)
        self.blocks = [torch.compile(b, dynamic=True) for b in blocks] if compiled else blocks

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, E) and (N, 1) to (N / stride, C)."""
        modules = (self.encoder.blocks, self.encoder.final_norm)
        key = (len(x), x.dtype, x.requires_grad, self.encoder.training)
        if key not in self.captured:
            parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
            comes_back = key in self.seen  # a size that comes once is not worth a graph
            self.seen.add(key)
            if not comes_back or len(self.captured) >= self.most or not parameters:
                return self.run(x, mask)
            self.captured[key] = _Graph(self.run, x, mask, parameters, self.pool)
        graph = self.captured[key]
        return cast(Tensor, _Replay.apply(graph, x, mask, *graph.parameters))

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        """The same, kernel by kernel."""
        encoder = self.encoder
        return through_blocks(self.blocks, encoder.config.pool, encoder.final_norm, x, mask)


class _Graph:
    """Forward and backward pass of a function for inputs of one size.

    As torch.cuda.make_graphed_callables, which cannot capture in another `CAPTURE_ERROR_MODE`.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        mask: Tensor,
        parameters: Sequence[Tensor],
        pool: Any,
    ) -> None:
        self.parameters = parameters
        self.x = x.detach().clone().requires_grad_(x.requires_grad)
        self.mask = mask.clone()
        wanted = [self.x, *parameters] if x.requires_grad else parameters

        def forward() -> Tensor:
            # Casts of the weights belong into the graph, not into the cache of a step.
            with torch.autocast(
                "cuda",
                torch.get_autocast_dtype("cuda"),
                enabled=torch.is_autocast_enabled("cuda"),
                cache_enabled=False,
            ):
                return function(self.x, self.mask)

        def backward(y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, wanted, dy)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                y = forward()
                backward(y, torch.zeros_like(y))
            del y
        torch.cuda.current_stream().wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=pool, capture_error_mode=CAPTURE_ERROR_MODE):
            y = forward()
        self.dy = torch.empty_like(y)
        with torch.cuda.graph(self.backward, pool=pool, capture_error_mode=CAPTURE_ERROR_MODE):
            gradients = list(backward(y, self.dy))
        self.y = y.detach()
        self.dx = gradients.pop(0) if x.requires_grad else None
        self.gradients = gradients


class _Replay(torch.autograd.Function):
    """A graph as an operation of which autograd knows the gradient."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, x: Tensor, mask: Tensor, *parameters: Tensor) -> Tensor:
        ctx.graph = graph
        graph.x.copy_(x)
        graph.mask.copy_(mask)
        graph.forward.replay()
        return graph.y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        graph: _Graph = ctx.graph
        graph.dy.copy_(dy)
        graph.backward.replay()
        dx = None if graph.dx is None else graph.dx.detach()
        return (None, dx, None, *(gradient.detach() for gradient in graph.gradients))
