"""The client's commands of `signal`, a file per noun. Loaded one by one, by the entry points."""
