// What an error of the CUDA runtime means for this library. For code that nvcc compiles.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "variants.h"

namespace pyinvolution::cuda {

// "12.8" of 12080.
inline std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Says of errors that mean that the library does not fit the machine what is missing, else nothing. Any call can be the
// first one to notice: with lazy loading it is the first that asks for a kernel.
inline std::string advice(cudaError_t error) {
  std::string gpu = "the GPU";
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
    gpu += " of compute capability " + std::to_string(major) + "." + std::to_string(minor);
  int of_driver = 0, of_runtime = 0;
  cudaDriverGetVersion(&of_driver);
  cudaRuntimeGetVersion(&of_runtime);
  cudaGetLastError();
  const std::string driver =
      of_driver == 0 ? "there is no NVIDIA driver" : "the driver is of CUDA " + version_text(of_driver);
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
      return "this build (" + std::string(build()) + ") has no code for " + gpu +
             "; build it with PYINVOLUTION_CUDA_ARCHITECTURES, 80 or newer";
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorInvalidPtx:
      return "this build (" + std::string(build()) + ") has no code for " + gpu +
             " but PTX, which its driver does not "
             "compile, and " +
             driver + "; update the driver, or build with PYINVOLUTION_CUDA_ARCHITECTURES";
    case cudaErrorInsufficientDriver:
    case cudaErrorCallRequiresNewerDriver:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorStubLibrary:
      return "this build is for CUDA " + version_text(of_runtime) + ", and " + driver +
             "; update the driver, or build with an older CUDA toolkit";
    case cudaErrorNoDevice:
    case cudaErrorDevicesUnavailable: return "CUDA finds no GPU that it may use (CUDA_VISIBLE_DEVICES selects them)";
    default: return "";
  }
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string text = std::string(what) + ": " + cudaGetErrorString(error);
  cudaGetLastError();  // so that the next launch does not report it again
  if (const std::string more = advice(error); !more.empty()) text += " (" + more + ")";
  throw std::runtime_error(text);
}

}  // namespace pyinvolution::cuda
