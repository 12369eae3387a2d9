"""What is shown on the terminal, and which messages of libraries are hidden."""
