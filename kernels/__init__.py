"""The Triton kernels, one file an op; installed as ``nnfast.kernels``."""
