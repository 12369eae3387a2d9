"""Find the folder of a single transformers model on disk or on the Hugging Face hub, and check that its files are there."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from cdm_lightning.backbones.pipeline_folder import HUB_ID, require_plain
from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line

WEIGHTS = "*.safetensors"


def locate_model(pretrained: str, needed: Sequence[str], what: str, option: str, more: Sequence[str] = ()) -> Path:
    """Return the folder of `pretrained`, which is a folder or a hub id. Of a hub id, only the files named are downloaded.

    `needed` are names or patterns of files that must be there, such as "config.json" and "*.safetensors", and `more` of
    files that may be. `what` is the model's name for messages, and `option` the option that sets it. Raises `UserError`
    if `pretrained` is neither a folder nor a hub id that can be downloaded, and if a needed file is missing.
    """
    folder = Path(pretrained).expanduser()
    if not folder.is_dir():
        if folder.exists() or not HUB_ID.fullmatch(pretrained):
            raise UserError(
                f"the {what} folder {pretrained} does not exist; pass a folder or a hub id (owner/name): {option}=FOLDER"
            )
        try:
            folder = Path(snapshot_download(pretrained, allow_patterns=[*needed, *more]))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{pretrained} is not a local folder and cannot be downloaded from the Hugging Face hub ({first_line(error)}); without "
                f"a network, copy the model to this machine and pass its folder: {option}=FOLDER"
            ) from error
    require_plain(folder, pretrained)
    if missing := [pattern for pattern in needed if not any(folder.glob(pattern))]:
        name = missing[0].replace("*.", "model.")
        raise UserError(f"{pretrained} has no {name}; copy the {what} model again, with all of its files")
    return folder
