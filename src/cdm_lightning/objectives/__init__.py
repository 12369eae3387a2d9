"""The training objectives: CDM, DMD2 and consistency distillation. An objective says which networks are trained, and by which
losses.
"""
