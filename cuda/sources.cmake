# The files with kernels, which the tests also compile for the host.
set(PYINVOLUTION_CUDA_KERNELS
  ${CMAKE_CURRENT_LIST_DIR}/generic/generic.cu)
