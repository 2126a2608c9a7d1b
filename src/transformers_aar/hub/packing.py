"""What a checkpoint that comes with the package can do without."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def slim_down(folder: Path) -> None:
    """
    Leaves out of a generator's folder what the package has already (the code) and what only training needs (sums of
    code vectors).

    Args:
        folder (`Path`): as `save_pretrained` has left it; it then loads in fp32, whatever its weights are in.
    """
    weights = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if not name.endswith("codebook_sum")}
    save_file(kept, weights, metadata={"format": "pt"})
    for path in folder.glob("*.py"):
        path.unlink()
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(cleaned(json.loads(path.read_text())), indent=2) + "\n")


def cleaned(entry):
    """A saved configuration without references to code, that loads in fp32."""
    if isinstance(entry, dict):
        entry = {name: cleaned(value) for name, value in entry.items() if name != "auto_map"}
        return entry | {"dtype": "float32"} if "dtype" in entry else entry
    return entry
