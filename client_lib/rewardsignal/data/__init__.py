"""Data for training loops: rows from JSONL files, datasets, batches. Standard library only.

    from rewardsignal.data import Batches, read_chat

    batches = Batches(read_chat("chats.jsonl"), batch_size=8, shuffle=True, seed=7, epochs=3)
    for batch in batches:
        run.forward_backward_async(batch)
        run.optim_step_async()
        keep(batches.state())  # plain JSON; Batches(…, state=…) goes on with the batches that are left

Files are read line by line, and each wrong line is named by its number and its field.
"""

from rewardsignal.data._batches import Batches
from rewardsignal.data._dataset import Dataset
from rewardsignal.data._errors import DataError
from rewardsignal.data._limits import MAX_EXAMPLES, MAX_MESSAGES, MAX_TEXT, ROLES
from rewardsignal.data._order import shuffled
from rewardsignal.data._readers import read_answers, read_chat, read_jsonl, read_preferences

__all__ = [
    "MAX_EXAMPLES",
    "MAX_MESSAGES",
    "MAX_TEXT",
    "ROLES",
    "Batches",
    "DataError",
    "Dataset",
    "read_answers",
    "read_chat",
    "read_jsonl",
    "read_preferences",
    "shuffled",
]
