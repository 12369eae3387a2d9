"""Writing a trained student for use in other programs: pipeline folders, LoRA files and model cards."""
