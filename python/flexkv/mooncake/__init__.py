"""Processes that a node starts for itself, in which Mooncake runs: it has no interface that a node could load."""
