"""Sampling as one continuous batch: requests join and leave between tokens.

From top to bottom: `generator` (one token for every row, who has ended, what failed), `admission` (who may
join), `lane` (rows that step together and their keys and values), `static_step` and `replays` (a step as a
function of tensors, and its capture as a CUDA graph), `prefill` (new rows of a lane: what their
prompts share is computed once), `scoring` (log-probabilities of prompts), `ticket` (a request under way),
`streaming` (text as it grows), `request` (what is asked and answered).
"""

from workers.engine.generation.generator import Generator
from workers.engine.generation.request import PromptScores, Request, SampleOutput
from workers.engine.generation.ticket import Ticket

__all__ = ["Generator", "PromptScores", "Request", "SampleOutput", "Ticket"]
