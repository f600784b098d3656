"""Drop-ins for training libraries; each module imports its library and nothing else does.

`kdkernels.integrations.transformers` holds `DistillationTrainer` for Hugging Face transformers 5.
"""
