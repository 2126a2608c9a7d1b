"""
A second device where there is none. Its tensors are computed by the CPU, but they say that they are elsewhere, and
take part in an operation with the CPU's as little as a GPU's would. PyTorch takes it in once and for all, so that it
is for processes of their own.
"""

import multiprocessing
from collections.abc import Callable

import torch
import torch.nn.functional as F
from host_syncs import reads_numbers
from torch import nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "second"
# operations that would have made the host wait for it
waits: list[str] = []


class SecondDeviceTensor(torch.Tensor):
    """What says that it is on the second device; `here` is what it says it isn't."""

    @staticmethod
    def __new__(cls, here: torch.Tensor):
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        # a view of a tensor from before inference mode is none of that mode's
        with torch.inference_mode(False):
            tensor = cls._make_wrapper_subclass(cls, here.shape, **layout, device=torch.device(NAME, 0))
        tensor.here = here
        return tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    # what PyTorch does for plain tensors only
    def tolist(self) -> list:
        waits.append("tolist")
        return self.here.tolist()

    def __format__(self, specification: str) -> str:
        return format(self.item() if self.ndim == 0 else self.here, specification)

    def storage(self):
        return self.here.storage()

    def untyped_storage(self):
        return self.here.untyped_storage()


def is_there(value) -> bool:
    return isinstance(value, SecondDeviceTensor) or isinstance(value, torch.device) and value.type == NAME


def brought_here(value):
    if isinstance(value, SecondDeviceTensor):
        return value.here
    return torch.device("cpu") if is_there(value) else value


def refuse_mixtures(func, args: tuple, kwargs: dict) -> None:
    """As a GPU does: numbers of the CPU may join, and indices, and copies are what goes from one to the other."""
    if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
        return
    if func.overloadpacket.__name__ in ("index", "index_put", "index_put_"):
        args = (args[0], *args[2:])
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, torch.Tensor) and not is_there(value) and value.ndim > 0:
            raise RuntimeError(f"{func} got tensors on the second device, and one of {tuple(value.shape)} on the CPU")


def run(func, args: tuple, kwargs: dict):
    """An operation with tensors on the second device, or that makes one."""
    has_inputs = any(isinstance(value, SecondDeviceTensor) for value in tree_leaves((args, kwargs)))
    device = kwargs.get("device")
    goes_there = has_inputs if device is None else is_there(device)
    if func is torch.ops.aten.copy_.default:
        goes_there = is_there(args[0])
    if goes_there and any(isinstance(value, torch.Generator) for value in tree_leaves((args, kwargs))):
        raise RuntimeError(f"{func} got a generator of the CPU for a tensor on the second device")
    if has_inputs:
        refuse_mixtures(func, args, kwargs)
        if reads_numbers(func, args, kwargs) or not goes_there:
            waits.append(str(func))
    with torch.no_grad():
        result = func(*tree_map(brought_here, args), **tree_map(brought_here, kwargs))
    if not goes_there:
        return result
    if args and is_there(args[0]) and result is args[0].here:
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():  # shape and strides of what stands for it
                func(*args, **kwargs)
        return args[0]
    return tree_map(lambda value: SecondDeviceTensor(value) if isinstance(value, torch.Tensor) else value, result)


class _SecondDeviceMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = any(is_there(value) for value in tree_leaves((args, kwargs)))
        return run(func, args, kwargs) if there else func(*args, **kwargs)


class _BackendModule(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def lstm(sequence, states, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    """The operator of that name, of which there is no version that autograd could go through for such a device."""
    sequence = sequence.transpose(0, 1) if batch_first else sequence
    lasts = []
    for layer in range(num_layers):
        input_weight, hidden_weight, input_bias, hidden_bias = weights[4 * layer : 4 * layer + 4]
        hidden, cell = states[0][layer], states[1][layer]
        outputs = []
        for step in F.linear(sequence, input_weight, input_bias):
            opened, kept, new, shown = (step + F.linear(hidden, hidden_weight, hidden_bias)).chunk(4, -1)
            cell = kept.sigmoid() * cell + opened.sigmoid() * new.tanh()
            hidden = shown.sigmoid() * cell.tanh()
            outputs.append(hidden)
        sequence = torch.stack(outputs)
        lasts.append((hidden, cell))
    hidden, cell = (torch.stack(parts) for parts in zip(*lasts))
    return sequence.transpose(0, 1) if batch_first else sequence, hidden, cell


def moved(to: Callable) -> Callable:
    """A module's `to` by which parameters stay the same objects, as on a GPU, so that optimizers keep hold of them."""

    def swapping(*args, **kwargs):
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return to(*args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    return swapping


# what is registered lasts as long as these
_libraries: list[torch.library.Library] = []


def start() -> None:
    """Adds the device `second` to this process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_BackendModule())
    # `torch.tensor(…, device=…)` passes by all of the above
    aten, fallbacks = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend((aten, fallbacks))
    aten.impl(
        "empty_strided",
        lambda size, stride, **kwargs: SecondDeviceTensor(torch.empty_strided(size, stride, dtype=kwargs["dtype"])),
        "PrivateUse1",
    )
    aten.impl(
        "_copy_from",
        lambda source, target, non_blocking=False: (target.here.copy_(brought_here(source)), target)[1],
        "PrivateUse1",
    )
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        aten.impl("lstm.input", lstm, key)
    fallbacks.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    nn.Module.to = moved(nn.Module.to)
    # threads of its own would know nothing of the mode
    torch.autograd.set_multithreading_enabled(False)
    _SecondDeviceMode().__enter__()


def there(function: Callable, *args):
    """What a function returns, or raises, in a process of its own that has the second device; no tensors."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        start()
        try:
            sender.send((function(*args), None))
        except Exception as error:
            sender.send((None, error))

    process = context.Process(target=work)
    process.start()
    sender.close()
    result, error = receiver.recv()
    process.join()
    if error is not None:
        raise error
    return result
