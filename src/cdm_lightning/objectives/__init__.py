"""The training objectives, such as CDM, DMD2 and consistency distillation.

An objective says which networks are trained, and with which losses.
"""
