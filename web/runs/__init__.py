"""Runs: creating, listing, describing, ending them."""
