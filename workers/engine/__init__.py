"""The training engine: load, adapt, batch, forward and backward, losses, AdamW, sample, export.

Pure torch. Nothing here imports Celery, Flask, Redis or SQL; transformers is imported only where a model
is loaded, so that importing a module of this package costs no more than torch itself.
"""

# Part of every fingerprint: raised when the same operations on the same setting give other numbers.
ENGINE = "3"
