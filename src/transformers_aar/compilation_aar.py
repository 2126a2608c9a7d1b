"""Next-scale generation through `torch.compile`: one graph for each scale, which later calls use again."""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import CompileConfig
from transformers.cache_utils import Cache
from transformers.utils import logging

from .cuda_graphs_aar import Recordable, RecordedCalls
from .layers_aar import AarPreparedScales

logger = logging.get_logger(__name__)

# graphs of one function that PyTorch keeps: its own limits would be reached by one call for each of a few batch sizes
_MAX_GRAPHS = 10_000
# modes of `torch.compile` with CUDA graphs, and the same without: here whole calls are recorded, since the host takes
# longer to find the graph of each scale, and to launch what draws its tokens, than a GPU to compute it
_MODES_WITH_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def scale_logits(
    model: nn.Module,
    prepared: AarPreparedScales,
    scale_input: torch.Tensor | None,
    past_key_values: Cache,
    first_slot: int,
) -> torch.Tensor:
    """Logits `(rows, n_s, codebook_size)` of one scale; the arguments are those of [`AarModel.forward_scale`]."""
    return model.lm_head(model.model.forward_scale(prepared, scale_input, past_key_values, first_slot))


class CompiledScales:
    """
    `scale_logits` of one model, compiled; called with the same arguments. Lengths are constants in a graph, so every
    scale has its own, for each number of rows and dtype. Where compilation fails it goes on without, and says so once.

    Args:
        arguments (`dict`):
            What `torch.compile` gets, without `dynamic`. Modes with CUDA graphs are compiled without: `run` has them.
    """

    def __init__(self, arguments: dict):
        self.arguments = arguments
        self._compiled: Callable | None = None
        self._has_failed = False
        self.recorded = RecordedCalls() if arguments["mode"] in _MODES_WITH_CUDA_GRAPHS else None

    def __call__(
        self,
        model: nn.Module,
        prepared: AarPreparedScales,
        scale_input: torch.Tensor | None,
        past_key_values: Cache,
        first_slot: int,
    ) -> torch.Tensor:
        inputs = (model, prepared, scale_input, past_key_values, first_slot)
        if not self._has_failed:
            try:
                return self._call_compiled(*inputs)
            except torch.OutOfMemoryError:
                raise  # with less to do at once it may be as well as ever
            # compilers fail in many ways; what is no fault of theirs fails again below
            except Exception as error:
                self._has_failed = True
                self._warn("`torch.compile`", error)
                # a pass that broke off may have written to some of them
                for layer in past_key_values.layers:
                    layer.length = first_slot
        return scale_logits(*inputs)

    @staticmethod
    def _warn(what: str, error: Exception) -> None:
        # the compilers' own errors wrap the reason, and go on for pages
        reason = getattr(error, "inner_exception", error)
        sentence = str(reason).strip().split("\n", 1)[0]
        logger.warning(f"{what} failed, so generation goes on without it ({type(reason).__name__}: {sentence}).")

    def _call_compiled(self, *inputs) -> torch.Tensor:
        if self._compiled is None:
            mode = self.arguments["mode"]
            arguments = self.arguments | {"mode": _MODES_WITH_CUDA_GRAPHS.get(mode, mode)}
            self._compiled = torch.compile(scale_logits, dynamic=False, **arguments)
        limits = {"recompile_limit": _MAX_GRAPHS, "accumulated_recompile_limit": _MAX_GRAPHS}
        with torch._dynamo.config.patch(limits):
            return self._compiled(*inputs)

    def run(
        self,
        model: nn.Module,
        key: tuple,
        function: Recordable,
        inputs: dict[str, torch.Tensor],
        generators: list[torch.Generator] | torch.Generator | None,
    ) -> dict:
        """
        What `function` returns of inputs and generators: where CUDA graphs are wanted and the model is one for them,
        through [`RecordedCalls`], whose arguments these are. Where recording fails it goes on without, and warns.
        """
        recorded = self.recorded  # which another thread may take away
        if recorded is not None and recorded.can_record(model, generators):
            try:
                return recorded(model, (key, _autocast_dtype(model.device.type)), function, inputs, generators)
            except torch.OutOfMemoryError:
                raise
            # what is no fault of the recording's fails again below
            except Exception as error:
                self.recorded = None
                self._warn("Recording a CUDA graph", error)
        return function(inputs, generators)


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


# apart from the models, so that a copy of one has graphs and caches of its own
_COMPILED: WeakKeyDictionary[nn.Module, CompiledScales] = WeakKeyDictionary()


def compiled_scales(model: nn.Module, compile_config: CompileConfig) -> CompiledScales:
    """The model's own [`CompiledScales`], the same one until another configuration is given, for one call."""
    arguments = compile_config.to_dict()
    if arguments.pop("dynamic"):
        raise ValueError("Each scale is compiled for its own length; leave `dynamic` out of `compile_config`.")
    known = _COMPILED.get(model)
    if known is None or known.arguments != arguments:
        known = _COMPILED[model] = CompiledScales(arguments)
    if known.recorded is not None:
        known.recorded.check(model)
    return known
