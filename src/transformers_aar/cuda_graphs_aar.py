"""Calls as CUDA graphs: what one does on a GPU is recorded once, and launched as a whole in later ones."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from threading import Lock

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

# recorded calls of a model that are kept; recording another one takes its time, but compiles nothing
_MAX_CALLS = 16
_DEVICE_TYPE = "cuda"

# of inputs by name and generators, a dictionary of tensors and lists of them
Recordable = Callable[[dict[str, torch.Tensor], list[torch.Generator] | torch.Generator | None], dict]


@dataclass
class _RecordedCall:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    generators: list[torch.Generator]
    outputs: dict


class RecordedCalls:
    """
    Functions of a model without the host's part: as of the second call for a key and shapes of inputs, a function
    isn't called, but the kernels are launched that its first call launched. Whatever else decides what it computes
    belongs in the key. A call waits for one of another thread, which must use the same stream. None of this has been
    run on a GPU yet.
    """

    def __init__(self):
        self._calls: dict[tuple, _RecordedCall] = {}
        self._model_state = None
        self._lock = Lock()

    def check(self, model: nn.Module) -> None:
        """Starts over where the model isn't what it was. That takes a millisecond, so it isn't part of every call."""
        state = _state_of(model)
        if state != self._model_state:
            with self._lock:
                self._calls.clear()
                self._model_state = state

    def can_record(self, model: nn.Module, generators: list[torch.Generator] | torch.Generator | None) -> bool:
        """Whether the model, as last checked, can be in a CUDA graph, and draws from these generators can."""
        generators = _as_list(generators)
        # one that is given twice goes on from its own first draws
        are_distinct = len(set(generators)) == len(generators)
        are_there = all(generator is not None and generator.device == model.device for generator in generators)
        return self._model_state is not None and are_distinct and are_there

    def __call__(
        self,
        model: nn.Module,
        key: tuple,
        function: Recordable,
        inputs: dict[str, torch.Tensor],
        generators: list[torch.Generator] | torch.Generator | None,
    ) -> dict:
        """
        Args:
            model (`PreTrainedModel`): whose weights `function` reads.
            key (`tuple`): tells apart what isn't in the inputs.
            function: must not read numbers back from the GPU.
            inputs (`dict[str, torch.Tensor]`): what `function` gets, copied to the GPU.
            generators (`torch.Generator`, a list of them, or `None` for PyTorch's own):
                Of the GPU, with the states that draws start from. `function` gets a list of others in their place,
                and these go on from where the draws ended.

        Returns:
            What `function` returns, in memory of its own.
        """
        generators = [default_generator(model.device)] if generators is None else _as_list(generators)
        shapes = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        key = (key, shapes, len(generators))
        with self._lock, torch.no_grad():
            # the latest one is the last
            call = self._calls.pop(key, None) or self._record(function, model.device, inputs, len(generators))
            self._calls[key] = call
            if len(self._calls) > _MAX_CALLS:
                del self._calls[next(iter(self._calls))]
            return _replay(call, inputs, generators)

    def _record(self, function: Recordable, device: torch.device, inputs: dict, num_generators: int) -> _RecordedCall:
        # what is made in inference mode can't be written to in a later call outside of it
        with torch.inference_mode(False):
            inputs = {name: value.to(device, copy=True) for name, value in inputs.items()}
        generators = [torch.Generator(device) for _ in range(num_generators)]
        # calls don't overlap, and what they return is copied, so that one pool of memory serves them all
        pool = next(iter(self._calls.values())).graph.pool() if self._calls else None
        # autocast's copies of weights are freed with its context, and a graph would go on reading them
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            function(inputs, generators)  # compiles, and makes what is kept from call to call
            graph, outputs = record_graph(lambda: function(inputs, generators), device, generators, pool)
        finally:
            torch.set_autocast_cache_enabled(caches)
        return _RecordedCall(graph, inputs, generators, outputs)


def record_graph(
    function: Callable[[], dict], device: torch.device, generators: list[torch.Generator], pool
) -> tuple[torch.cuda.CUDAGraph, dict]:
    """A graph of what `function` does on a GPU, drawing from these generators, and the function's outputs."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # without a stream it would be one of whichever GPU was recorded on first; and other threads may go on meanwhile
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        outputs = function()
    return graph, outputs


def default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index]


def _replay(call: _RecordedCall, inputs: dict[str, torch.Tensor], generators: list[torch.Generator]) -> dict:
    for name, value in inputs.items():
        call.inputs[name].copy_(value)
    for own, generator in zip(call.generators, generators, strict=True):
        own.set_state(generator.get_state())
    call.graph.replay()
    for own, generator in zip(call.generators, generators, strict=True):
        generator.set_state(own.get_state())
    # the next one, and any other in the pool, writes to the same place
    return tree_map_only(torch.Tensor, torch.clone, call.outputs)


def _as_list(generators: list[torch.Generator] | torch.Generator | None) -> list[torch.Generator]:
    if generators is None:
        return []
    return generators if isinstance(generators, list) else [generators]


def _state_of(model: nn.Module) -> tuple | None:
    """
    Differs where recordings of a model are out of date: they hold the places of weights, and what layers have made of
    frozen ones. `None` where there can be none: for weights on several devices or on others than a GPU, for those of
    inference mode, whose changes can't be noticed, and with adapters, whose layers decide in Python what they compute.
    """
    state, devices = [], set()
    for module in model.modules():
        if type(module).__module__.startswith("peft."):
            return None
        state.append((id(module), module.training))
        for weight in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
            devices.add(weight.device)
            if weight.device.type != _DEVICE_TYPE or weight.is_inference():
                return None
            state.append((weight.data_ptr(), weight._version, weight.dtype, weight.requires_grad))
    return tuple(state) if len(devices) == 1 else None
