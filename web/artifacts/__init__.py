"""Artifacts: what save_state and complete wrote, listed and served."""
