"""Helpers that tests share; never imported by the project itself."""
