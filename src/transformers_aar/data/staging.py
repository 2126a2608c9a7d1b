"""Output files that appear only once they are complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_file(path: str | Path) -> Iterator[Path]:
    """
    Gives a path beside `path` to write to. What was written there takes the place of `path` when the block ends
    without an error, and vanishes otherwise.

    Raises:
        OSError: where the folder can't be written, in one sentence.
    """
    path = Path(path)
    # the suffix stays last, since libraries choose the format by it
    staged = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield staged
        staged.replace(path)
    except OSError as error:
        raise OSError(f"{path} can't be written: {error.strerror or error}.") from error
    finally:
        staged.unlink(missing_ok=True)
