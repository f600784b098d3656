"""Drop-ins for training libraries; each module imports its library and nothing else does.

`kdkernels.integrations.transformers` holds `DistillationTrainer` for Hugging Face transformers 5
and `capture` of queries, keys, values and hidden states (which `kdkernels.integrations.capture`
offers to models of plain torch).
"""
