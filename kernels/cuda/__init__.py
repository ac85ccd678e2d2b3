"""Triton kernels of the dialect, imported on demand: importing `resplice.kernels` loads none.

A file per op holds its kernels, their configurations per architecture and a host function with the
op's signature. `register()` makes the ops use them on CUDA tensors.
"""
