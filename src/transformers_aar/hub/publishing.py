"""Publishing a saved model on the Hugging Face Hub, once it is sure that the folder loads."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoProcessor, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports

from ..configuration_aar import AarConfig
from ..configuration_sat import SatConfig
from ..feature_extraction_sat import SatFeatureExtractor
from ..processing_aar import AarProcessor

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def push(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Uploads a model's folder to a repository on the Hub, which is created where it doesn't exist.

    Args:
        folder (`str` or `Path`): what `save_pretrained` wrote; everything in it goes along, subfolders too. Where it
            has left out the code that loads it without this package, the code is added to what is uploaded.
        repo_id (`str`): `name` or `owner/name`.
        private (`bool`): whether a new repository is private.
        commit_message (`str`, *optional*): "Upload SatModel" or the like by default.
        token (`str`, *optional*): the Hub's access token; the one of `hf auth login` by default.

    Returns:
        `str`: address of the commit.

    Raises:
        ValueError: where the folder doesn't load, is incomplete, holds pickles, or the Hub refuses.
    """
    model, processor = check_folder(Path(folder))
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        with folder_with_code(Path(folder), model, processor) as complete:
            commit = api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=complete,
                commit_message=commit_message or f"Upload {type(model).__name__}",
            )
    except (HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{folder} couldn't be published as {repo_id} on {api.endpoint}: {reason}") from error
    return commit.commit_url


def check_folder(folder: Path) -> tuple[PreTrainedModel, SatFeatureExtractor | AarProcessor]:
    """What `folder` holds; an error where that is no complete model in safetensors with its processor and code."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give a folder that save_pretrained wrote.")
    if pickles := sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLES):
        raise ValueError(f"{folder} holds {', '.join(pickles)}: only safetensors are published, take pickles out.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.model_type not in (SatConfig.model_type, AarConfig.model_type):
            raise ValueError(f"its config.json describes a {config.model_type}, and not a SAT or an AAR")
        model, info = AutoModel.from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
        auto_class = AutoProcessor if config.model_type == AarConfig.model_type else AutoFeatureExtractor
        processor = auto_class.from_pretrained(folder, trust_remote_code=False)
        missing = missing_modules(folder)
    # a damaged file makes the libraries stumble anywhere, over any kind of error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} doesn't load: {reason}") from error
    if incomplete := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(incomplete)} tensors of its model, among them {incomplete[0]}.")
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, code that it needs: save model and processor again.")
    return model, processor


def missing_modules(folder: Path) -> list[str]:
    """Files with code that the configurations in `folder`, or that code itself, name and that aren't there."""
    references = []

    def note_references(entry: dict) -> dict:
        for names in entry.get("auto_map", {}).values():
            references.extend(names if isinstance(names, list) else [names])
        return entry

    # a processor's configuration has the one of its feature extractor inside
    for path in folder.glob("*config.json"):
        json.loads(path.read_text(encoding="utf-8"), object_hook=note_references)
    # tokenizers name None for a class that they lack; with "--" it lies in another repository
    modules = [name.split(".")[0] for name in references if name is not None and "--" not in name]
    needed, checked = {f"{module}.py" for module in modules}, set()
    while unchecked := needed - checked:
        checked |= unchecked
        for file in filter(Path.is_file, (folder / name for name in unchecked)):
            needed |= {f"{module}.py" for module in get_relative_imports(file)}
    return sorted(name for name in needed if not (folder / name).is_file())


@contextmanager
def folder_with_code(
    folder: Path, model: PreTrainedModel, processor: SatFeatureExtractor | AarProcessor
) -> Iterator[Path]:
    """`folder` itself, or where its configuration names no code, a copy for the time being that brings it."""
    if "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        yield folder
        return
    with TemporaryDirectory() as name:
        saved, complete = Path(name, "saved"), Path(name, "complete")
        model.save_pretrained(saved)
        processor.save_pretrained(saved)
        # weights, model card and what else there is stay as they are
        shutil.copytree(folder, complete)
        for path in (*saved.glob("*.py"), *saved.glob("*config.json")):
            shutil.copy(path, complete)
        yield complete
