"""End a process in order after a signal, and keep it running after its terminal is closed or a disk is full."""
