"""Tests: unit (no sockets, fast), integration (the real stack), and what they share in support."""
