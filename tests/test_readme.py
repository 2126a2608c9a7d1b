"""The Python examples of the README run as they stand, but for those that need an account."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from transformers_aar.data.synthesis import synthesize

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = [
    example
    for example in re.findall(
        r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    if "push_to_hub" not in example
]


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(example, tmp_path):
    (tmp_path / "generated").mkdir()
    soundfile.write(tmp_path / "generated" / "siren-1.wav", synthesize("Dog", 0, 1.5), 24_000)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
