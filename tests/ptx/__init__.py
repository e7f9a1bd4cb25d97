"""An interpreter of the PTX that nvcc makes of the CUDA kernels; README.md says what it checks and how to run it."""
