# The torch-free core, which the tests build on their own, too. pyinvolution_core_sources(TARGET) adds everything but the dispatch
# tables, with the flags of each instruction set; pyinvolution_dispatch(TARGET [NO_CUDA reason]) adds those, without the CUDA
# variants where there is a reason.
function(pyinvolution_core_sources target)
  set(core ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  target_sources(${target} PRIVATE
    ${core}/problem.cpp ${core}/isa.cpp ${core}/cpu_scalar.cpp
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
  target_include_directories(${target} PUBLIC ${core}/../include PRIVATE ${core} ${core}/..)
  # A product and a sum may become one FMA: the vector variants count on it.
  target_compile_options(${target} PRIVATE -ffp-contract=fast)
endfunction()

function(pyinvolution_dispatch target)
  cmake_parse_arguments(PARSE_ARGV 1 ARG "" "NO_CUDA" "")
  set(core ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  target_sources(${target} PRIVATE ${core}/dispatch.cpp)
  target_include_directories(${target} PUBLIC ${core}/../include PRIVATE ${core}/.. ${core}/../..)
  if(ARG_NO_CUDA)
    target_compile_definitions(${target} PRIVATE "PYINVOLUTION_NO_CUDA=\"${ARG_NO_CUDA}\"")
  endif()
endfunction()
