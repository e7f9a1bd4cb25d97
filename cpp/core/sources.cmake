# The torch-free core, which the tests build on their own, too. pyinvolution_core_sources(TARGET) adds everything but the dispatch
# tables, with the flags of each instruction set; pyinvolution_dispatch(TARGET [NO_CUDA reason]) adds those, without the CUDA
# variants where there is a reason.
function(pyinvolution_core_sources target)
  set(core ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  set(cpu ${core}/../cpu)
  target_sources(${target} PRIVATE
    ${core}/problem.cpp ${core}/phases.cpp ${core}/isa.cpp ${cpu}/kernels.cpp ${cpu}/shift.cpp ${cpu}/tasks.cpp
    ${cpu}/scalar/variant.cpp ${cpu}/scalar/span.cpp
    ${cpu}/columns/variant.cpp ${cpu}/columns/tiling.cpp ${cpu}/channels/variant.cpp ${cpu}/channels/tiling.cpp
    ${cpu}/batch_norm/batch_norm.cpp ${cpu}/generation/generation.cpp)
  # The rows of PYINVOLUTION_ISAS (isa.h).
  pyinvolution_instance(baseline "")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    pyinvolution_instance(avx2 "-mavx2;-mfma;-mf16c")
    pyinvolution_instance(avx512
      "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c;-mprefer-vector-width=512")
    pyinvolution_instance(avx512_bf16
      "-mavx512bf16;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx2;-mfma;-mf16c;-mprefer-vector-width=512")
  endif()
  target_include_directories(${target} PUBLIC ${core}/../include PRIVATE ${core} ${core}/..)
  # A product and a sum may become one FMA: the vector variants count on it.
  target_compile_options(${target} PRIVATE -ffp-contract=fast)
endfunction()

# The loops of every strategy for one instruction set, into ${target} of the calling function.
macro(pyinvolution_instance isa flags)
  target_sources(${target} PRIVATE ${cpu}/instances/${isa}.cpp)
  set_source_files_properties(${cpu}/instances/${isa}.cpp PROPERTIES COMPILE_OPTIONS "${flags}")
endmacro()

function(pyinvolution_dispatch target)
  cmake_parse_arguments(PARSE_ARGV 1 ARG "" "NO_CUDA" "")
  set(core ${CMAKE_CURRENT_FUNCTION_LIST_DIR})
  target_sources(${target} PRIVATE ${core}/dispatch.cpp)
  target_include_directories(${target} PUBLIC ${core}/../include PRIVATE ${core}/.. ${core}/../..)
  if(ARG_NO_CUDA)
    target_compile_definitions(${target} PRIVATE "PYINVOLUTION_NO_CUDA=\"${ARG_NO_CUDA}\"")
  endif()
endfunction()
