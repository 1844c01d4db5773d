"""Whether this process lives, and whether it reaches what it needs."""
