"""Triton kernels, a file each, with the torch reference they must equal beside them.

Nothing outside this package imports it before it holds a CUDA tensor: triton stays out of processes without a GPU.
"""
