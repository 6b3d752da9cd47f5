"""A training step recorded as a CUDA graph: at small batches a GPU waits for its launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlmlayers.errors import UserError, one_line

WARM_UP = 3  # steps before the recording


class StepGraph:
    """Runs a function of tensors and, from its fourth call on, replays a recording of it.

    The first calls run as usual, on a stream of their own: what is made at first use (the state of
    an optimizer, casts of weights, workspaces of libraries) has to be there before the recording.
    Recording computes nothing. A replay reads the tensors that the recording was made with, so new
    inputs are copied into these. Inputs of other shapes, such as a last batch that is smaller, run
    as usual.

    Attributes:
        inputs: The tensors that a replay reads.
        outputs: The tensors that it writes.
    """

    def __init__(self) -> None:
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: Sequence[Tensor] = ()
        self._warm = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, step: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Sequence[Tensor]:
        """Return what a step gives for some inputs.

        Args:
            step: The function, always the same: whatever it depends on besides its inputs has to
                stay at its address in memory.
            inputs: Tensors on the GPU.

        Raises:
            UserError: The step does what cannot be recorded, such as reading a value.
        """
        if not self.inputs:
            self.inputs = tuple(one.clone() for one in inputs)
        # A recording holds the shapes of its kernels; another shape needs the ordinary way.
        if [one.shape for one in inputs] != [one.shape for one in self.inputs]:
            return step(*inputs)
        for kept, new in zip(self.inputs, inputs):
            kept.copy_(new)
        if self._graph is None and self._warm < WARM_UP:
            self._warm += 1
            return self._aside(step)
        if self._graph is None:
            self._graph = self._recorded(step)
        # Cloned, as the next replay writes into the same memory.
        self._graph.replay()
        return [one.clone() for one in self.outputs]

    def _aside(self, step: Callable[..., Sequence[Tensor]]) -> Sequence[Tensor]:
        # torch's recipe for recordings: warm up on a side stream, ordered with the default one.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = step(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return found

    def _recorded(self, step: Callable[..., Sequence[Tensor]]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: others prepare the next images meanwhile, and what that asks of
            # the driver would, by default, break the recording off.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = step(*self.inputs)
        # A RuntimeError too, but no reason to advise against graphs.
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"the step cannot be recorded as a CUDA graph ({one_line(error)}); leave "
                "cuda_graph off"
            ) from error
        return graph
