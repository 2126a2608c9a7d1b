"""What a machine can do at most, and how long a computation would take if it did (roofline, Williams et al. 2009)."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from ..linear_aar import AarInt8Linear, AarLinear, has_int8_products, has_packed_products


def lstm_flops(inputs: tuple, *weights: tuple, factor: int = 2, **_) -> int:
    """Operations of LSTM layers, from the shapes of their sequence `(…, …, features)` and of their matrices."""
    return factor * math.prod(inputs[:-1]) * sum(map(math.prod, weights))


def cpu_lstm_flops(inputs: tuple, input_weight: tuple, hidden_weight: tuple, *_, **kwargs) -> int:
    """Of one layer, in a CPU's kernel."""
    return lstm_flops(inputs, input_weight, hidden_weight, **kwargs)


def gpu_lstm_flops(inputs: tuple, weights: Sequence[tuple], *_, **kwargs) -> int:
    """Of all layers, in cuDNN's kernel, which takes their matrices and biases in one list."""
    return lstm_flops(inputs, *(weight for weight in weights if len(weight) == 2), **kwargs)


def attention_flops(query: tuple, key: tuple, *_, **__) -> int:
    """Operations of attention, from the shapes `(batch_size, heads, length, head_dim)` of queries and keys."""
    return 4 * math.prod(query) * key[2]


def attention_backward_flops(_: tuple, query: tuple, key: tuple, *__, **___) -> int:
    """Five matrix products, one of them again, in place of attention's two."""
    return 10 * math.prod(query) * key[2]


def linear_flops(inputs: tuple, weight: tuple, *_, **__) -> int:
    """Operations of a linear layer, from the shapes of its input and its weights."""
    return 2 * math.prod(inputs) * weight[0]


# kernels that PyTorch's counter doesn't know
LSTM_FLOPS = {
    torch.ops.aten.mkldnn_rnn_layer: cpu_lstm_flops,
    torch.ops.aten.mkldnn_rnn_layer_backward: partial(cpu_lstm_flops, factor=4),
    torch.ops.aten._cudnn_rnn: gpu_lstm_flops,
    torch.ops.aten._cudnn_rnn_backward: partial(gpu_lstm_flops, factor=4),
}
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def int8_linear_flops(inputs: tuple, _: float, __: int, weight: tuple, *___) -> int:
    """The same for 8-bit integers, whose weights are packed the other way round."""
    return 2 * math.prod(inputs) * weight[1]


# absent from builds without oneDNN
LINEAR_FLOPS = {
    getattr(torch.ops.mkldnn, "_linear_pointwise", None): linear_flops,
    getattr(torch.ops.onednn, "qlinear_pointwise", None): int8_linear_flops,
}


@dataclass(frozen=True)
class Ceilings:
    """
    Args:
        flops (`dict[torch.dtype, float]`): operations per second of large matrix products, by their dtype.
        bandwidth (`float`): bytes per second that are read from memory.
    """

    flops: dict[torch.dtype, float]
    bandwidth: float


def measure_ceilings(device: torch.device) -> Ceilings:
    """
    Measures products of large matrices in fp32, bf16 and, on a processor that has them, fp16 and 8-bit integers, and
    the reading of a gigabyte, which is more than its caches hold. The best of five each.
    """
    size, flops, dtypes = 2048, {}, [torch.float32, torch.bfloat16]
    if device.type == "cpu" and has_packed_products(torch.float16):
        dtypes.append(torch.float16)
    for dtype in dtypes:
        left, right = torch.randn(2, size, size, device=device).to(dtype)
        flops[dtype] = 2 * size**3 / _best_seconds(partial(torch.mm, left, right), device)
    if device.type == "cpu" and has_int8_products():
        layer, rows = AarInt8Linear(AarLinear(size, size, bias=False)), torch.full((size, size), 129).to(torch.uint8)
        flops[torch.uint8] = 2 * size**3 / _best_seconds(partial(layer.multiply, rows), device)
    data = torch.ones(250_000_000, device=device)
    return Ceilings(flops, data.nbytes / _best_seconds(data.sum, device))


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


class FloorCounter(TorchDispatchMode):
    """
    Within this context `seconds` grows by what each matrix product, convolution, LSTM and attention takes at least:
    its operations at the ceiling of its dtype, or its tensors' bytes at that of the memory, whichever is longer. All
    else is taken to cost nothing.
    """

    def __init__(self, ceilings: Ceilings):
        super().__init__()
        self.ceilings = ceilings
        self.seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if (count := {**LSTM_FLOPS, **ATTENTION_FLOPS, **LINEAR_FLOPS}.get(packet)) is not None:
            flops = count(*tree_map(lambda value: value.shape if isinstance(value, torch.Tensor) else value, args))
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        else:
            return output
        outputs = output if isinstance(output, (tuple, list)) else [output]
        tensors = [value for value in (*args, *outputs) if isinstance(value, torch.Tensor)]
        flops_per_second = self.ceilings.flops.get(tensors[0].dtype, self.ceilings.flops[torch.float32])
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        self.seconds += max(flops / flops_per_second, num_bytes / self.ceilings.bandwidth)
        return output
