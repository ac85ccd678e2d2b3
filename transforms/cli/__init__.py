"""The `resplice` command."""
