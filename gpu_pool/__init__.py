"""The pool: which devices there are, who holds them, and the agent that runs workers on a host.

Also home of the SQL basis (`database`) that the web tier builds its own tables on. Never imports
torch.
"""
