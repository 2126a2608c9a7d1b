"""What makes the host wait for an accelerator."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def reads_numbers(func, args, kwargs) -> bool:
    """Whether an operation brings numbers of its tensors to the host, be it only a shape that depends on them."""
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return False
    depends_on_numbers = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(func.tags)
    return bool(depends_on_numbers) or name in ("equal", "is_nonzero")


class HostSyncCounter(TorchDispatchMode):
    """Notes every operation inside the context that would make the host wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if reads_numbers(func, args, kwargs):
            self.operations.append(str(func))
        return func(*args, **kwargs)
