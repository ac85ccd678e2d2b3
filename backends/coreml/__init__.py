"""Core ML: programs become `.mlpackage` files and are run without a Mac."""
