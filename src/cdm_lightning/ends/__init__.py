"""The ways in which a process ends, and the protection from unwanted ends: signals, closed terminals and full disks."""
