"""Passes: one technique, one file. Find them by name through `resplice.registry`."""
