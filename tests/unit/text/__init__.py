"""Tests of workers/text."""
