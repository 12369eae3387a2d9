"""How a process ends, and what must not end it: signals, a terminal that goes away, files that cannot be written."""
