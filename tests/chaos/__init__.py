"""`make chaos SEED=…`: whatever dies, tears, doubles or jumps, no number of a run changes (docs/chaos.md)."""
