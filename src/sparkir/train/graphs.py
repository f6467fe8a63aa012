"""Recorded passes: a GPU repeats a whole forward or backward of the student as one command.

A quantized student is thousands of small operations, which a GPU carries out faster than Python can
ask for them. A CUDA graph is their recording. It reads and writes fixed memory, so that everything
outside works on copies, and it holds what Python decided while it was made: sizes, zero points. It
has to be made anew when those change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparkir.data.codec import one_line
from sparkir.models.facts import restore

_WARM_UP = 3


class Recorded:
    """A network on a GPU that restores batches by replaying recordings, one for each size."""

    def __init__(self, network: nn.Module, *, refused: Callable[[str], None]) -> None:
        """Nothing is recorded before the first call.

        Args:
            network: a network with facts, in the mode that it will stay in; its parameters may be
                written to, but not replaced.
            refused: called with the reason if the network cannot be recorded; it then runs as ever.
        """
        self._network, self._refused = network, refused
        self._trained = [p for p in network.parameters() if p.requires_grad]
        self._steps: dict[torch.Size, _Step] = {}
        self._looks: dict[torch.Size, _Look] = {}
        self.replays = True
        """Not if the network cannot be recorded, which the first call finds out."""
        self._checked = False

    def __call__(self, lq: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c sh sw"]:
        """As `restore(network, lq)`, in float32.

        With gradients enabled, the result has those of the network's parameters, not of `lq`, and
        only until the next such call: that writes over what the backward pass reads.
        """
        if not self._checked:
            self._checked = True
            if _changes_buffers(self._network, lq):
                self._give_up("it follows statistics of its batches")
        if self.replays:
            try:
                return self._replayed(lq)
            except RuntimeError as error:  # operations that wait for the GPU, too little memory
                self._give_up(one_line(error))
        return _restored(self._network, lq)

    def _replayed(self, lq: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self._trained:
            if lq.shape not in self._steps:
                self._steps[lq.shape] = _Step(self._network, self._trained, lq)
            output: Tensor = _Replay.apply(self._steps[lq.shape], lq, *self._trained)
            return output
        if lq.shape not in self._looks:
            self._looks[lq.shape] = _Look(self._network, lq)
        return self._looks[lq.shape].run(lq)

    def _give_up(self, why: str) -> None:
        self.replays = False
        self._steps.clear()
        self._looks.clear()
        self._refused(why)


class _Look:
    """A forward pass without gradients."""

    @torch.no_grad()
    def __init__(self, network: nn.Module, lq: Tensor) -> None:
        self._lq = lq.clone()
        _warm_up(lambda: _restored(network, self._lq))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = _restored(network, self._lq)

    def run(self, lq: Tensor) -> Tensor:
        self._lq.copy_(lq)
        self._graph.replay()
        return self._output.clone()


class _Step:
    """A forward pass, and the backward pass that follows it, as often as it is asked for."""

    def __init__(self, network: nn.Module, trained: list[nn.Parameter], lq: Tensor) -> None:
        self._lq = lq.clone()
        # Other names of the same memory. Autograd gathers a parameter's gradient on the stream that
        # first used it, and would wait at every parameter, were that the one of the recording.
        aliases = [p.detach().requires_grad_() for p in trained]

        def warm() -> None:
            output = _restored_with(network, trained, aliases, self._lq)
            torch.autograd.grad(output, aliases, torch.zeros_like(output), allow_unused=True)

        _warm_up(warm)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward):
            self._output = _restored_with(network, trained, aliases, self._lq)
        self._gradient = torch.empty_like(self._output)
        # All gradients in one piece, so that copying them is one operation.
        self._layout = [(p.numel(), p.shape, p.stride()) for p in trained]
        self._gradients = torch.empty(sum(p.numel() for p in trained), device=lq.device)
        places = self._split(self._gradients)
        with torch.cuda.graph(self._backward, pool=self._forward.pool()):
            # The graph is kept: what a replay reads must not be written over by the one before.
            found = torch.autograd.grad(
                self._output, aliases, self._gradient, retain_graph=True, allow_unused=True
            )
            used = [(place, g) for place, g in zip(places, found, strict=True) if g is not None]
            torch._foreach_copy_([place for place, _ in used], [g for _, g in used])
        self._used = [g is not None for g in found]

    def forward(self, lq: Tensor) -> Tensor:
        self._lq.copy_(lq)
        self._forward.replay()
        return self._output.detach().clone()

    def backward(self, gradient: Tensor) -> list[Tensor | None]:
        self._gradient.copy_(gradient)
        self._backward.replay()
        found = self._split(self._gradients.clone())
        return [g if used else None for g, used in zip(found, self._used, strict=True)]

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part, laid out as the parameter is, or its gradient would be copied."""
        views, start = [], 0
        for count, shape, stride in self._layout:
            views.append(flat.as_strided(shape, stride, start))
            start += count
        return views


class _Replay(torch.autograd.Function):
    """A recorded forward, with the recorded backward as its gradient."""

    @staticmethod
    def forward(ctx: Any, step: _Step, lq: Tensor, *trained: Tensor) -> Tensor:  # noqa: ANN401
        ctx.step = step
        return step.forward(lq)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # noqa: ANN401
        return None, None, *ctx.step.backward(gradient)


def _restored(network: nn.Module, lq: Tensor) -> Tensor:
    """Without autocast's memory of converted weights, which a recording would go on reading."""
    kind = lq.device.type
    with torch.autocast(
        kind,
        torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    ):
        return restore(network, lq).float()


@torch.no_grad()
def _changes_buffers(network: nn.Module, lq: Tensor) -> bool:
    """Whether a forward pass does, as with batch normalization; it is undone then."""
    before = [buffer.clone() for buffer in network.buffers()]
    _restored(network, lq)
    changed = [
        (buffer, value)
        for buffer, value in zip(network.buffers(), before, strict=True)
        if not torch.equal(buffer, value)
    ]
    for buffer, value in changed:
        buffer.copy_(value)
    return bool(changed)


class _Restoring(nn.Module):
    """`_restored` as a module, which `torch.func` wants."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, lq: Tensor) -> Tensor:
        return _restored(self.network, lq)


def _restored_with(
    network: nn.Module, trained: list[nn.Parameter], stand_ins: list[Tensor], lq: Tensor
) -> Tensor:
    """`_restored` by other tensors in the place of the parameters `trained`."""
    module = _Restoring(network)
    place = {id(p): stand_in for p, stand_in in zip(trained, stand_ins, strict=True)}
    named = module.named_parameters(remove_duplicate=False)
    given = {name: place[id(p)] for name, p in named if id(p) in place}
    output: Tensor = torch.func.functional_call(module, given, (lq,), strict=False)
    return output


def _warm_up(run: Callable[[], object]) -> None:
    """Until nothing is compiled or chosen for the first time; on another stream, as CUDA asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
