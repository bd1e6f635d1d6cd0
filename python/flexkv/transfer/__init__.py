"""Import paths of the original: see flexkv.manager."""
