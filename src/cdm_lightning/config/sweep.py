"""Name the folders of the jobs of a Hydra sweep (`--multirun`)."""

import hashlib
import re

from cdm_lightning.config.secrets import masked_text

LONGEST_NAME = 120  # characters in the name of a job's folder, well below the limits of file systems


def job_folder(override_dirname: str) -> str:
    """Return the name of the folder of one job in a Hydra sweep (`--multirun`).

    `override_dirname` is a text with the job's overrides, such as "seed=1,data.batch_size=8". The name is short and has
    no slash and no secret. The same overrides give the same name.
    """
    shown = masked_text(override_dirname)
    name = re.sub(r"[^\w.,=+-]+", ".", shown) or "defaults"
    if shown != override_dirname:  # two bytes tell the jobs of a sweep apart, but do not let anyone guess a secret
        return f"{name[:LONGEST_NAME]}-{hashlib.blake2b(override_dirname.encode(), digest_size=2).hexdigest()}"
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.blake2b(override_dirname.encode(), digest_size=6).hexdigest()
    return f"{name[:LONGEST_NAME]}-{digest}"
