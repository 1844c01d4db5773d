"""Idempotency keys: a repeated POST gets the first answer.

Operations are remembered by the journal itself; every other POST by a table here.
"""
