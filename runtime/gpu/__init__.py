"""A decode step on the GPU by kernels of our own, over the weights of a CUDA bundle's graphs."""
