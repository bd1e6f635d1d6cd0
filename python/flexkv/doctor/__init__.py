"""What `flexkv doctor` looks at. See README.md in this folder."""
