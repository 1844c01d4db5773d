"""What the server takes of one call; a row beyond it is found in its file, not after an hour of training."""

from rewardsignal._schemas import MAX_BATCH

# Examples of one forward_backward or forward.
MAX_EXAMPLES = MAX_BATCH
# Turns of one conversation, and characters of one text.
MAX_MESSAGES = 50
MAX_TEXT = 32_768
ROLES = ("system", "user", "assistant", "tool")
