"""Text to tokens and back, for web tier and workers alike: no torch, no transformers, no numpy.

`tokenizer` reads a model folder, `chat` renders its chat template in a sandbox, `turns` finds the
assistant's turns in the rendering, `prompts` makes sampling prompts, `streaming` turns sampled tokens
into text as they come. `batches` makes the rows (`rows`) of a batch: `admission` says what its loss does
not take, `examples` and `responses` tokenize, `rewards` makes advantages. Of ours it imports `schemas`.
"""
