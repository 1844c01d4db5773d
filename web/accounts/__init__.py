"""Accounts: users, their API keys, and who asks."""
