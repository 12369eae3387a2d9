"""Writing a trained student for use elsewhere: pipeline folders, LoRA files and model cards."""
