"""`python -P -m web.stack up …`: the server's commands where the client's is not installed."""

from web.stack.commands import GROUP

if __name__ == "__main__":
    GROUP()
