"""A node and three engines under load and faults for a while: is every byte right, does nothing grow? See scripts/soak."""
