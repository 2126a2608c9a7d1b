"""Publishing a saved model on the Hugging Face Hub, once it is sure that the folder loads."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel

from ..configuration_aar import AarConfig
from ..configuration_sat import SatConfig

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
        folder (`str` or `Path`): what `save_pretrained` wrote; everything in it goes along, subfolders too.
        repo_id (`str`): `name` or `owner/name`.
        private (`bool`): whether a new repository is private.
        commit_message (`str`, *optional*): "Upload SatModel" or the like by default.
        token (`str`, *optional*): the Hub's access token; the one of `hf auth login` by default.

    Returns:
        `str`: address of the commit.

    Raises:
        ValueError: where the folder doesn't load, holds pickles, or the Hub refuses.
    """
    architecture = check_folder(Path(folder))
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {architecture}",
        )
    except (HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{folder} couldn't be published as {repo_id} on {api.endpoint}: {reason}") from error
    return commit.commit_url


def check_folder(folder: Path) -> str:
    """The class of the model in `folder`; an error where the folder doesn't hold a complete model in safetensors."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give a folder that save_pretrained wrote.")
    if pickles := sorted(path.name for path in folder.rglob("*") if path.suffix in PICKLES):
        raise ValueError(f"{folder} holds {', '.join(pickles)}: only safetensors are published, take pickles out.")
    try:
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in (SatConfig.model_type, AarConfig.model_type):
            raise ValueError(f"its config.json describes a {config.model_type}, and not a SAT or an AAR")
        model, info = AutoModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} doesn't load: {str(error).strip().splitlines()[0]}") from error
    if incomplete := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(incomplete)} tensors of its model, among them {incomplete[0]}.")
    return type(model).__name__
