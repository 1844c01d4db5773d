"""Text to tokens and back, for web tier and workers alike: no torch, no transformers, no numpy.

`tokenizer` reads a model folder, `chat` renders its chat template in a sandbox, `turns` finds the
assistant's turns in the rendering, `rows` makes training rows and `prompts` sampling prompts,
`streaming` turns sampled tokens into text as they come. Imports `schemas.errors` and nothing else of ours.
"""
