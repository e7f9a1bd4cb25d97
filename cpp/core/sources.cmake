# The torch-free core, which the tests build on their own too: pyinvolution_core_sources(TARGET) adds the sources with the flags of
# each instruction set and CUDA variants that refuse where NO_CUDA gives a reason.
function(pyinvolution_core_sources target)
  cmake_parse_arguments(PARSE_ARGV 1 ARG "" "NO_CUDA" "")
  set(core ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  target_sources(${target} PRIVATE
    ${core}/plan.cpp ${core}/involution.cpp ${core}/isa.cpp ${core}/cpu_scalar.cpp
    ${core}/cpu_columns.cpp ${core}/cpu_columns_baseline.cpp
    ${core}/cpu_channels.cpp ${core}/cpu_channels_baseline.cpp)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    set(avx2 ${core}/cpu_columns_avx2.cpp ${core}/cpu_channels_avx2.cpp)
    set(avx512 ${core}/cpu_columns_avx512.cpp ${core}/cpu_channels_avx512.cpp)
    target_sources(${target} PRIVATE ${avx2} ${avx512})
    set_source_files_properties(${avx2} PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
    set_source_files_properties(${avx512} PROPERTIES COMPILE_OPTIONS
      "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c;-mprefer-vector-width=512")
    target_compile_definitions(${target} PRIVATE PYINVOLUTION_X86_VECTORS=1)
  endif()
  if(ARG_NO_CUDA)
    target_sources(${target} PRIVATE ${core}/cuda_stub.cpp)
    set_source_files_properties(${core}/cuda_stub.cpp PROPERTIES
      COMPILE_DEFINITIONS "PYINVOLUTION_NO_CUDA_REASON=\"${ARG_NO_CUDA}\"")
  endif()
  target_include_directories(${target} PUBLIC ${core}/../include PRIVATE ${core})
  # A product and a sum may become one FMA: the vector variants count on it.
  target_compile_options(${target} PRIVATE -ffp-contract=fast)
endfunction()
