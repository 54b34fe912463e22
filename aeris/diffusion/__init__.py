"""The diffusion objective and its sampler: noise, loss, solvers. Tensor maths; a network is any callable."""
