"""Tests of workers.engine on the tiny model."""
