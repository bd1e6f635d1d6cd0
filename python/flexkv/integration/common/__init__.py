"""What the adapters of several engines share. Imports no engine."""
