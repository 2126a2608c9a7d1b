"""What every test shares: no network, a Hub cache of its own, one thread per process, and the reference's fixtures."""

import os
import tempfile
from pathlib import Path

# The libraries read these once, when they are imported; processes started by a test inherit them.
_hub_cache = tempfile.TemporaryDirectory(prefix="transformers-aar-tests-")
os.environ["HF_HOME"] = _hub_cache.name
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Folder with the reference's tiny checkpoints and the numbers that they must give."""
    return Path(__file__).parent / "fixtures"
