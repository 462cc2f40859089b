"""Triton kernels (Tillet et al., MAPL 2019), one file an operation, each the fused twin of a plain torch reference.

Importing a file here imports triton; nothing on the CPU's path does. Every launch is fixed by the shapes of its
arguments, waits for nothing and reads nothing back, so all of it can be captured in a CUDA graph.
"""
