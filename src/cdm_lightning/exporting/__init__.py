"""Write a trained student for other programs: as a pipeline folder or a LoRA file, with a model card."""
