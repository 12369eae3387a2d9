"""What libraries say on the terminal that does not apply here. To be called before they are imported."""

import logging
import warnings

UNFIT_WARNINGS = (
    ".*does not have many workers.*",  # reading a line of text needs none
    ".*in eval mode at the start of training.*",  # the student's average is meant to be
    ".*sync_dist=True.*",  # callbacks put together what the processes measured before they log it
    ".*LeafSpec.*is deprecated.*",  # Lightning's own use of torch
)
NO_EXCEPTIONS = "should be kept in float32: []"  # diffusers, of a cast that leaves no layer out


def quiet_libraries() -> None:
    """Keep libraries' advice off the terminal; their warnings stay, but for those that do not apply here."""
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for library in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
        logging.getLogger(library).setLevel(logging.ERROR)  # of torchao, which no model here is stored in
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_names_a_layer)
    for message in UNFIT_WARNINGS:
        warnings.filterwarnings("ignore", message)


def _names_a_layer(record: logging.LogRecord) -> bool:
    return NO_EXCEPTIONS not in record.getMessage()
