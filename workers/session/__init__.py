"""Runs in memory: a worker attaches a run, applies its journal in order, and commits every outcome."""
