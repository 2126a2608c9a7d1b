"""Checks that torchaudio imports, and repairs the one case that installing from the package index leaves broken.

The index carries torchaudio built for CUDA only. Beside a CPU build of torch its native extension can't be loaded, and
then `import torchaudio` fails, as do the parts of transformers that try it. Everything this project uses of torchaudio
is pure Python, and torchaudio itself goes without the extension where the file isn't there, so the file is removed.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

MISSING_CUDA_LIBRARY = re.compile(r"lib\w*cuda\w*\.so[.\d]*: cannot open shared object file")


def run_python(program: str) -> subprocess.CompletedProcess:
    """Run a program in a fresh interpreter of this environment and capture what it prints."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def torch_is_cpu_build() -> bool:
    """Whether torch is installed here and was built without CUDA and ROCm."""
    return run_python("import torch; raise SystemExit(bool(torch.version.cuda or torch.version.hip))").returncode == 0


def native_extension() -> Path | None:
    """The file of torchaudio's native extension, found without importing torchaudio."""
    spec = importlib.util.find_spec("torchaudio")
    return spec and next(Path(spec.origin).parent.glob("lib/_torchaudio*.so"), None)


def main() -> None:
    result = run_python("import torchaudio")
    extension = native_extension()
    if extension and MISSING_CUDA_LIBRARY.search(result.stderr) and torch_is_cpu_build():
        extension.unlink()
        print(f"Removed torchaudio's {extension.name}: it was built for CUDA and can't be loaded beside a CPU torch.")
        result = run_python("import torchaudio")
    if result.returncode != 0:
        reason = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        sys.exit(f"torchaudio can't be imported ({reason}): install torchaudio 2.11 or newer, built for this torch.")


if __name__ == "__main__":
    main()
