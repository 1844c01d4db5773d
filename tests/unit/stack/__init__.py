"""The stack's pure parts: environment, options, configuration, records; no process, no socket."""
