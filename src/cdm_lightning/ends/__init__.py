"""How a process ends when a signal asks it to, and how it survives a closed terminal or a full disk."""
