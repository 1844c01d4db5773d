"""What the server takes of one call; a row beyond it is found in its file, not after an hour of training."""

# Examples of one forward_backward or forward; also prompts of one sample.
MAX_EXAMPLES = 128
# Turns of one conversation, and characters of one text.
MAX_MESSAGES = 50
MAX_TEXT = 32_768
ROLES = ("system", "user", "assistant", "tool")
