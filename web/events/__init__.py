"""Events of a run: what happened to it beside its operations, as a list, a long poll or a stream."""
