"""Programs that keep what they have freed."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

# fewest pages that the system has to give to one of several blocks of 64 MB, each freed before the next
COUNT_FAULTS = """
import resource
import torch

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(6)))
"""
KEEP = "from transformers_aar.memory import keep_freed_memory\nkeep_freed_memory()"
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
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    script = [sys.executable, "-c", setup + COUNT_FAULTS]
    finished = subprocess.run(script, env=kept | environment, capture_output=True, text=True, check=True)
    return int(finished.stdout.split()[-1])


def test_freed_memory_is_used_again():
    pages = 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert count_faults("") > pages // 2
    for program in (KEEP, COMMAND, SCRIPT):
        assert count_faults(program) < pages // 10


@pytest.mark.parametrize(
    "environment", [{"MALLOC_TRIM_THRESHOLD_": "100000"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=100000"}]
)
def test_the_environment_comes_first(environment):
    assert count_faults(KEEP, **environment) > 2**26 // os.sysconf("SC_PAGE_SIZE") // 2
