# The files with kernels, which the tests also compile for the host.
set(PYINVOLUTION_CUDA_KERNELS
  ${CMAKE_CURRENT_LIST_DIR}/generic/generic.cu
  ${CMAKE_CURRENT_LIST_DIR}/tiled/tiled.cu
  ${CMAKE_CURRENT_LIST_DIR}/tiled/tiled_f32.cu
  ${CMAKE_CURRENT_LIST_DIR}/tiled/tiled_f16.cu
  ${CMAKE_CURRENT_LIST_DIR}/tiled/tiled_bf16.cu
  ${CMAKE_CURRENT_LIST_DIR}/mma/mma.cu
  ${CMAKE_CURRENT_LIST_DIR}/mma/mma_f16.cu
  ${CMAKE_CURRENT_LIST_DIR}/mma/mma_bf16.cu
  ${CMAKE_CURRENT_LIST_DIR}/fused/fused.cu
  ${CMAKE_CURRENT_LIST_DIR}/fused/backward_f16.cu
  ${CMAKE_CURRENT_LIST_DIR}/fused/backward_bf16.cu)
