"""CUDA graphs without a GPU: operations are recorded with the tensors that they were given, and done again."""

from collections.abc import Callable

import torch
from host_syncs import reads_numbers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


class RecordedGraph(TorchDispatchMode):
    """Records what is computed inside the context. As of a GPU's graph, nothing of it may depend on numbers."""

    def __init__(self):
        super().__init__()
        self.steps: list[tuple] = []
        self.num_replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if reads_numbers(func, args, kwargs):
            raise RuntimeError(f"{func} is not permitted when a stream is capturing")
        result = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, result))
        return result

    # a graph doesn't mind what PyTorch allows to be written to, nor in which dtype it would compute
    @torch.inference_mode()
    @torch.autocast("cpu", enabled=False)
    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, result in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # results in place and views are in their place already
                if isinstance(old, torch.Tensor) and not is_same_memory(old, new):
                    old.copy_(new)

    def pool(self) -> None:
        return None


def record_graph(
    function: Callable[[], dict], device: torch.device, generators: list[torch.Generator], pool
) -> tuple[RecordedGraph, dict]:
    """In place of `transformers_aar.cuda_graphs_aar.record_graph`."""
    with RecordedGraph() as graph:
        outputs = function()
    return graph, outputs
