"""MIL ops in torch, one family a file; `registry.py` finds them."""
