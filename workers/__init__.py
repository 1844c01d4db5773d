"""Workers and what they share with the web tier: journal, futures, storage, text, session, engine."""
