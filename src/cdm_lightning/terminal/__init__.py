"""What a command shows on the terminal: the progress of long tasks, and no messages of libraries that do not apply."""
