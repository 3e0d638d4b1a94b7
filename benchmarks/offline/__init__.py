"""What the GPU kernels are, as far as it can be said without a GPU: compiled, their resources and instructions."""
