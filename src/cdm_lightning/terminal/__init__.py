"""The terminal output of a command: progress of long tasks, masked secrets, and no irrelevant messages of libraries."""
