"""Triton kernels, imported as `ramify.kernels`: one file per op family, named as in `csrc/cpu` and `csrc/cuda`."""
