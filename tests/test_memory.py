"""Programs that keep what they have freed."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from transformers_aar import memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

NUM_PAGES = 2**26 // os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
# fewest pages that the system has to give to one of several blocks of 64 MB, each freed before the next
COUNT_FAULTS = """
import ctypes
import resource

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size  # a constant Python would compute once and for all
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages
size = 2**26
print(min(faults() for _ in range(6)))
"""
KEEP = f"import runpy\nrunpy.run_path({str(Path(memory.__file__))!r})['keep_freed_memory']()"
COMMAND = """
import sys
from transformers_aar.cli import main
sys.argv = ["transformers-aar", "convert"]
try:
    main()
except SystemExit:
    pass
"""
SCRIPT = """
import sys
from dataclasses import dataclass
from transformers_aar.training.runs import run_script

@dataclass
class Arguments:
    number: int = 1

sys.argv = ["script.py", "--number", "2"]
run_script(lambda arguments: None, Arguments)
"""


def count_faults(setup: str, **environment: str) -> int:
    kept = {name: value for name, value in os.environ.items() if name not in memory._ENVIRONMENT}
    script = [sys.executable, "-c", setup + COUNT_FAULTS]
    finished = subprocess.run(script, env=kept | environment, capture_output=True, text=True, check=True)
    return int(finished.stdout.split()[-1])


@pytest.fixture(scope="module", autouse=True)
def usual_faults() -> int:
    """How many there are where nothing keeps memory."""
    if (count := count_faults("")) == 0:
        pytest.skip("this system counts no page faults")
    return count


@pytest.mark.parametrize(
    "program", [KEEP, pytest.param(COMMAND, marks=pytest.mark.slow), pytest.param(SCRIPT, marks=pytest.mark.slow)]
)
def test_freed_memory_is_used_again(usual_faults, program):
    assert usual_faults > NUM_PAGES // 2
    assert count_faults(program) < NUM_PAGES // 10


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "100000"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=100000"}]
)
def test_the_environment_comes_first(environment):
    assert count_faults(KEEP, **environment) > NUM_PAGES // 2
