// The entry point of a library for ov::Core::add_extension. There are two, which differ in what float32 involutions
// compute in.
#include "conversion.h"

OPENVINO_CREATE_EXTENSIONS(pyinvolution::openvino::extensions(PYINVOLUTION_BFLOAT16))
