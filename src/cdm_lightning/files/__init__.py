"""Files and folders that are written completely or not at all, and read only if they are regular and of a bounded size.

A device, a pipe or a socket is neither written nor read: a read could wait or go on for ever, and a write would replace the
device. Everything in the package that writes or reads small files goes through these functions.
"""

from cdm_lightning.files.disk import append_text, disk_error, disk_errors
from cdm_lightning.files.leftovers import sweep, sweep_folder
from cdm_lightning.files.locks import locked
from cdm_lightning.files.reading import first_line, irregular, open_regular, read_text, require_name, require_regular
from cdm_lightning.files.records import read_record, require_entries, restoring
from cdm_lightning.files.writing import replacing, replacing_folder, require_replaceable, sync, write_text

__all__ = (
    "append_text",
    "disk_error",
    "disk_errors",
    "first_line",
    "irregular",
    "locked",
    "open_regular",
    "read_record",
    "read_text",
    "replacing",
    "replacing_folder",
    "require_entries",
    "require_name",
    "require_regular",
    "require_replaceable",
    "restoring",
    "sweep",
    "sweep_folder",
    "sync",
    "write_text",
)
