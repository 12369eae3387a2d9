"""Writing a trained student for use in other programs: as a pipeline folder or a LoRA file, with a model card."""
