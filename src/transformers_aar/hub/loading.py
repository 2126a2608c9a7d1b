"""Models from folders and repositories, with one sentence about what is wrong where they can't be loaded."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedModel

from ..modeling_sat import SatModel


def load_model(source: str | Path) -> PreTrainedModel:
    """
    The codec or generator in a folder, or in a repository `OWNER/NAME` on the Hub, in evaluation mode.

    Raises:
        ValueError: where there is none, or a damaged one.
    """
    source = str(source)
    if not Path(source).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise ValueError(f"{source} is no folder: name one that holds a model, or a repository OWNER/NAME on the Hub.")
    with explained(f"{source} can't be loaded as a model"):
        # never asks whether to run a folder's code: that of the package is there
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type not in ("sat", "aar"):
            raise ValueError(f"it is a {config.model_type}, neither a codec (sat) nor a generator (aar).")
        model, loading = AutoModel.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
    faulty = {*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])}
    if faulty:
        raise ValueError(f"{source} is damaged: its weights lack {min(faulty)}, or have it in another size.")
    return model.eval()


def load_codec(source: str | Path) -> SatModel:
    """The codec in a folder or repository, which may be a generator's; see [`load_model`]."""
    model = load_model(source)
    return getattr(model, "codec_model", model)


@contextmanager
def explained(what_failed: str) -> Iterator[None]:
    """Makes one sentence of the errors, many of them with many lines, that the libraries raise when loading."""
    try:
        yield
    # a damaged file makes the libraries stumble anywhere, over any kind of error
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        reason = " ".join(lines) if lines[0].rstrip().endswith(":") else lines[0]
        if not isinstance(error, (OSError, ValueError, RuntimeError, AssertionError, ImportError, SafetensorError)):
            reason = f"its files are damaged ({type(error).__name__}: {reason})."
        raise ValueError(f"{what_failed}: {reason}") from error
