"""What makes the host wait for an accelerator."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def reads_numbers(func, args) -> bool:
    """Whether an operation brings numbers of its tensors to the host, be it only a shape that depends on them."""
    reads = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")
    by_mask = func.overloadpacket.__name__ in ("index", "index_put", "index_put_") and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    return by_mask or func.overloadpacket.__name__ in reads


class HostSyncCounter(TorchDispatchMode):
    """Notes every operation inside the context that would make the host wait for an accelerator."""

    def __init__(self):
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if reads_numbers(func, args):
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))
