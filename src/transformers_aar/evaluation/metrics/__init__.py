"""
The metrics of this package as modules of the `evaluate` library: each folder is one, for `evaluate.load`.
"""

from pathlib import Path

import evaluate


def load_metric(name: str, **kwargs) -> evaluate.Metric:
    """
    `evaluate.load` for a metric of this package.

    Args:
        name (`str`): one of the folders beside this file, such as `"frechet_audio_distance"`.
        kwargs: passed on, such as `experiment_id`, `num_process` and `process_id`.

    Raises:
        ValueError: for another name.
    """
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("*/*.py"))
    if name not in names:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(names)}.")
    return evaluate.load(str(folder / name), **kwargs)
