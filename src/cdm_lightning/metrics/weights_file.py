"""A single file of weights that a metric needs: on the disk, or in a repository of the Hugging Face hub.

Only tensors are read from it: by safetensors, or by torch with `weights_only=True`, which runs no code.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from cdm_lightning.errors import UserError
from cdm_lightning.files import first_line, require_regular

HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w.+-]+\.(?:safetensors|pt|pth|bin))")


def locate_weights(weights: str | Path, option: str) -> Path:
    """Return the path of the file `weights`, which is a path or OWNER/NAME/FILE on the hub, from where it is downloaded.

    `option` is the option that sets it, for messages. Raises `UserError` if there is no such file.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    found = HUB_FILE.fullmatch(str(weights))
    if found is None or path.exists():
        raise UserError(
            f"the weights {weights} are not a file; set {option} to a file, or to OWNER/NAME/FILE on the Hugging Face hub"
        )
    from huggingface_hub import snapshot_download

    repository, name = found.groups()
    try:  # unlike hf_hub_download, this does not try for half a minute without a network
        path = Path(snapshot_download(repository, allow_patterns=[name])) / name
    except (OSError, ValueError) as error:
        raise UserError(
            f"{weights} is not a local file and cannot be downloaded from the Hugging Face hub ({first_line(error)}); without a "
            f"network, copy the file to this machine: {option}=FILE"
        ) from error
    if not path.is_file():
        raise UserError(f"{repository} on the Hugging Face hub has no file {name}; correct {option}")
    return path


def load_tensors(path: Path, option: str) -> dict[str, Tensor]:
    """Return the tensors in a file of weights by name, without the prefix "module." that data-parallel training adds.

    If the file holds them under the key "state_dict", as checkpoints do, these are returned. `option` is the option that
    sets the file. Raises `UserError` if the file cannot be read without running code, or holds something else.
    """
    try:
        require_regular(path)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds of errors
        reason = first_line(error)
        raise UserError(f"{path} cannot be read as weights ({reason}); set {option} to a file of tensors") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path} holds no tensors by name; set {option} to the file that its authors published")
    return {str(name).removeprefix("module."): value for name, value in found.items()}
