"""Reading and writing of files: writes are complete or do not happen, and reads are limited to regular files of a bounded size.

Devices, pipes and sockets are refused. Reading from one could last for ever, and writing would replace it by a file. The whole
package reads and writes its small files by these functions.
"""

from cdm_lightning.files.disk import PASSING, append_text, disk_error, disk_errors
from cdm_lightning.files.leftovers import sweep, sweep_folder
from cdm_lightning.files.locks import locked
from cdm_lightning.files.reading import first_line, irregular, open_regular, read_text, require_name, require_regular
from cdm_lightning.files.records import read_record, require_entries, restoring
from cdm_lightning.files.writing import (
    replacing,
    replacing_folder,
    require_replaceable,
    scratch_folder,
    sync,
    write_text,
)

__all__ = (
    "PASSING",
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
    "scratch_folder",
    "sweep",
    "sweep_folder",
    "sync",
    "write_text",
)
