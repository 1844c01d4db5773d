"""Fast tests of single parts: no sockets, no processes of the stack."""
