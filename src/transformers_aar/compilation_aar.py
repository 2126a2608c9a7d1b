"""Next-scale generation through `torch.compile`: one graph for each scale, which later calls use again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import CompileConfig
from transformers.cache_utils import Cache
from transformers.utils import logging

logger = logging.get_logger(__name__)

# graphs of one function that PyTorch keeps: its own limits would be reached by one call for each of a few batch sizes
_MAX_GRAPHS = 10_000


def scale_logits(
    model: nn.Module, prepared: dict, scale_input: torch.Tensor | None, past_key_values: Cache, first_slot: int
) -> torch.Tensor:
    """Logits `(rows, n_s, codebook_size)` of one scale; the arguments are those of [`AarModel.forward_scale`]."""
    return model.lm_head(model.model.forward_scale(prepared, scale_input, past_key_values, first_slot))


class CompiledScales:
    """
    `scale_logits` of one model, compiled; called with the same arguments. Lengths are constants in a graph, so every
    scale has its own, for each number of rows and dtype. Where compilation fails it goes on without, and says so once.

    Args:
        arguments (`dict`): what `torch.compile` gets, without `dynamic`.
    """

    def __init__(self, arguments: dict):
        self.arguments = arguments
        self._compiled: Callable | None = None
        self._has_failed = False
        self._caches: dict[tuple, Cache] = {}

    def __call__(
        self,
        model: nn.Module,
        prepared: dict,
        scale_input: torch.Tensor | None,
        past_key_values: Cache,
        first_slot: int,
    ) -> torch.Tensor:
        inputs = (model, prepared, scale_input, past_key_values, first_slot)
        if not self._has_failed:
            try:
                return self._call_compiled(*inputs)
            # compilers fail in many ways; what is no fault of theirs fails again below
            except Exception as error:
                self._has_failed = True
                self._warn(error)
                # a pass that broke off may have written to some of them
                for layer in past_key_values.layers:
                    layer.length = first_slot
        return scale_logits(*inputs)

    @staticmethod
    def _warn(error: Exception) -> None:
        # the compilers' own errors wrap the reason, and go on for pages
        reason = getattr(error, "inner_exception", error)
        sentence = str(reason).strip().split("\n", 1)[0]
        logger.warning(
            f"`torch.compile` failed, so generation goes on without it ({type(reason).__name__}: {sentence})."
        )

    def _call_compiled(self, *inputs) -> torch.Tensor:
        if self._compiled is None:
            self._compiled = torch.compile(scale_logits, dynamic=False, **self.arguments)
        limits = {"recompile_limit": _MAX_GRAPHS, "accumulated_recompile_limit": _MAX_GRAPHS}
        with torch._dynamo.config.patch(limits):
            # a CUDA graph writes its next result to the same place
            return self._compiled(*inputs).clone()

    @contextmanager
    def static_cache(self, model: nn.Module, prepared: dict, new_cache: Callable[[], Cache]) -> Iterator[Cache]:
        """
        An empty cache for the rows in `prepared`, in the same memory in each call, as CUDA graphs need it (where this
        has not been run yet). While one call has it, another one, of a streamer or a thread, gets a new one.
        """
        start = prepared["start"]
        device_type = start.device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        key = (len(start), start.dtype, start.device, autocast)
        cache = self._caches.pop(key, None)
        if cache is None:
            cache = new_cache()
            # a first pass allocates it, and knows dtypes and devices
            model.model.forward_scale(prepared, None, cache, 0)
            for layer in cache.layers:
                torch._dynamo.mark_static_address(layer.keys)
                torch._dynamo.mark_static_address(layer.values)
        cache.reset()
        try:
            yield cache
        finally:
            self._caches[key] = cache


# apart from the models, so that a copy of one has graphs and caches of its own
_COMPILED: WeakKeyDictionary[nn.Module, CompiledScales] = WeakKeyDictionary()


def compiled_scales(model: nn.Module, compile_config: CompileConfig) -> CompiledScales:
    """The model's own [`CompiledScales`], the same one until another configuration is given."""
    arguments = compile_config.to_dict()
    if arguments.pop("dynamic"):
        raise ValueError("Each scale is compiled for its own length; leave `dynamic` out of `compile_config`.")
    known = _COMPILED.get(model)
    if known is None or known.arguments != arguments:
        known = _COMPILED[model] = CompiledScales(arguments)
    return known
