# The headers and libtorch_cpu of the torch that the building Python has: target `TorchStable::TorchStable` and
# TorchStable_VERSION. torch is never imported (a build in an isolated environment could not), only found.
execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_torch.py OUTPUT_VARIABLE torch)
if(NOT torch)
  message(FATAL_ERROR
    "pyinvolution needs PyTorch 2.10 or newer in the environment it is built in, and ${Python_EXECUTABLE} has none.\n"
    "Install it first (pip install torch) and then pyinvolution; the build does not download a torch of its own.")
endif()
list(GET torch 0 TorchStable_ROOT)
list(GET torch 1 TorchStable_VERSION)
if(TorchStable_VERSION MATCHES "^[0-9]" AND TorchStable_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "pyinvolution needs PyTorch 2.10 or newer, and ${TorchStable_ROOT} is ${TorchStable_VERSION}.\n"
    "Install a newer one first: pip install --upgrade torch")
endif()

add_library(TorchStable::TorchStable INTERFACE IMPORTED)
target_include_directories(TorchStable::TorchStable SYSTEM INTERFACE ${TorchStable_ROOT}/include)
# The stable ABI of 2.10: the binary runs with that version and every later one.
target_compile_definitions(TorchStable::TorchStable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(TorchStable::TorchStable INTERFACE ${TorchStable_ROOT}/lib/libtorch_cpu.so)
message(STATUS "pyinvolution: torch ${TorchStable_VERSION}")
