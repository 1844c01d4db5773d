"""The primitives: from a request to entries of the journal, and from an entry to an answer."""
