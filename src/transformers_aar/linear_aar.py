"""The linear layers of AAR's blocks: with the kernels that CPUs are fastest with, packed, and with int8 weights."""

import torch
import torch.nn.functional as F
from torch import nn


def _fusible_dtypes() -> tuple[torch.dtype, ...]:
    """What this processor's oneDNN multiplies, adds a bias to and puts through a GELU, all in one pass."""
    # the operator is the compiler's, and may be absent
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return ()
    is_supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return tuple(dtype for dtype, supported in is_supported.items() if supported)


_FUSIBLE_DTYPES = _fusible_dtypes()


class AarLinear(nn.Linear):
    """
    Linear layer that takes its GELU along where a CPU's kernel can. PyTorch's own GELU of the tanh kind takes a tenth
    of the time of the product before it, and in the product nearly none; and MKL, which PyTorch multiplies fp32 with,
    needs up to twice as long as oneDNN for the few rows of a coarse scale. docs/performance.md has the figures.
    """

    def forward(self, hidden_states: torch.Tensor, with_gelu: bool = False) -> torch.Tensor:
        """`(…, in_features)` → `(…, out_features)`, through a GELU (tanh) if wanted."""
        if self._is_fusible(hidden_states):
            activation = "gelu" if with_gelu else "none"
            return torch.ops.mkldnn._linear_pointwise(hidden_states, self.weight, self.bias, activation, [], "tanh")
        hidden_states = super().forward(hidden_states)
        return F.gelu(hidden_states, approximate="tanh") if with_gelu else hidden_states

    def _is_fusible(self, hidden_states: torch.Tensor) -> bool:
        """The kernel knows no gradients and no tensors but plain ones; and it must be the faster one."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if type(hidden_states) is not torch.Tensor or type(self.weight) is not nn.Parameter:
            return False
        if hidden_states.device.type != "cpu" or hidden_states.dtype not in _FUSIBLE_DTYPES:
            return False
        if hidden_states.dtype != self.weight.dtype or self.in_features < 256:
            return False
        num_rows = hidden_states.numel() // self.in_features
        return hidden_states.dtype != torch.float32 or 2 < num_rows <= 256


class AarOutputProjection(AarLinear):
    """Last layer of a residual branch; a class of its own because it starts smaller, the deeper the model."""


class AarFixedLinear(AarLinear):
    """
    Base of layers that hold their weights in the layout of a CPU's kernels, which no other code can read. They take
    the place of others for good: there are no gradients, no other devices and no files, and a `state_dict` lacks them.

    Args:
        linear ([`AarLinear`]): the layer that it takes the place of.
    """

    def __init__(self, linear: AarLinear):
        nn.Module.__init__(self)  # there are no weights of the usual kind
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def check(self, hidden_states: torch.Tensor) -> None:
        if hidden_states.device.type != "cpu":
            raise ValueError("These weights are laid out for a CPU: load the model anew to use it on another device.")
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise ValueError("These weights let no gradients through: load the model anew to train it.")

    def __deepcopy__(self, memo: dict) -> "AarFixedLinear":
        return self  # nothing of it ever changes


class AarPackedLinear(AarFixedLinear):
    """Linear layer that doesn't lay its weights out anew in every call, as oneDNN otherwise does for few rows."""

    # in the middle of what generation has; the layout that it leads to serves any number
    num_rows = 50

    def __init__(self, linear: AarLinear):
        super().__init__(linear)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), self.num_rows)

    def forward(self, hidden_states: torch.Tensor, with_gelu: bool = False) -> torch.Tensor:
        """As [`AarLinear`], in any dtype; products are in that of the weights."""
        self.check(hidden_states)
        activation = "gelu" if with_gelu else "none"
        rows = hidden_states.to(self.packed.dtype)
        output = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, activation, [], "tanh")
        return output.to(hidden_states.dtype)


class AarInt8Linear(AarFixedLinear):
    """
    Linear layer whose products are of 8-bit integers: weights with a scale for each output, and inputs with one for
    each row, which is found anew in each call ("dynamic quantization").
    """

    def __init__(self, linear: AarLinear):
        super().__init__(linear)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        weight = linear.weight.detach().float()
        scales = _largest(weight) / 127
        self.packed = torch.ops.onednn.qlinear_prepack((weight / scales).round().to(torch.int8), None)
        self.scales = scales.flatten()
        self.zero_points = scales.new_zeros(self.out_features, dtype=torch.long)

    def forward(self, hidden_states: torch.Tensor, with_gelu: bool = False) -> torch.Tensor:
        """As [`AarLinear`], in any dtype."""
        self.check(hidden_states)
        rows = hidden_states.float()
        scales = _largest(rows) / 127
        # unsigned, with 128 for 0: signed integers have a slow kernel on many CPUs
        output = self.multiply((rows / scales).round_().add_(128).to(torch.uint8))
        output = output * scales if self.bias is None else torch.addcmul(self.bias, output, scales)
        output = F.gelu(output, approximate="tanh") if with_gelu else output
        return output.to(hidden_states.dtype)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Whole numbers plus 128, uint8 `(…, in_features)`, times the weights: fp32 `(…, out_features)`."""
        return torch.ops.onednn.qlinear_pointwise(
            *(rows, 1.0, 128, self.packed, self.scales, self.zero_points, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """Largest magnitude in each row, `(…, 1)`; more than 0."""
    return rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny * 127)


def has_int8_products() -> bool:
    """Whether this processor multiplies 8-bit integers (VNNI; without it sums would overflow), and PyTorch knows."""
    has_kernel = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return has_kernel and torch.cpu._is_vnni_supported()


def has_packed_products(dtype: torch.dtype) -> bool:
    """Whether this processor's oneDNN multiplies packed weights of that dtype, and PyTorch knows."""
    return dtype in _FUSIBLE_DTYPES and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def has_fixed_linears(module: nn.Module) -> bool:
    """Whether weights of a module were laid out for a CPU, in floating point or int8."""
    return any(isinstance(child, AarFixedLinear) for child in module.modules())


def fix_linears(module: nn.Module, layer_class: type[AarFixedLinear]) -> None:
    """Puts a layer of this class in the place of every [`AarLinear`] in a module on a CPU."""
    for name, child in module.named_children():
        if isinstance(child, AarFixedLinear):
            if type(child) is not layer_class:
                raise ValueError("These weights are laid out for a CPU already: load the model anew.")
        elif isinstance(child, AarLinear):
            setattr(module, name, layer_class(child))
        else:
            fix_linears(child, layer_class)
