"""A run's history: branches, certificates, replays, moving, and going on from a saved state."""
