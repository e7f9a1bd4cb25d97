// The part of ONNX Runtime's C ABI that the operators need, declared here because no package that pip or a system
// installs has its headers. Source: include/onnxruntime/core/session/onnxruntime_c_api.h of ONNX Runtime (MIT license).
//
// OrtApi is a table of functions to which a version only adds at the end, so an index, counted from 0, is the same in
// every later version; so are the members of OrtCustomOp, of which `version` says how many there are. GetApi(17) answers
// in ONNX Runtime 1.17 and later, and with nullptr in an older one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyinvolution::ort {

constexpr uint32_t api_version = 17;

// Types that are only passed on: OrtStatus, OrtSessionOptions and so on.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorTypeAndShapeInfo;

enum class ErrorCode : int32_t { ok = 0, fail = 1, invalid_argument = 2 };  // OrtErrorCode
// ONNXTensorElementDataType
enum class ElementType : int32_t { undefined = 0, f32 = 1, f16 = 10, f64 = 11, bf16 = 16 };
enum class Presence : int32_t { required = 0, optional = 1 };  // OrtCustomOpInputOutputCharacteristic
enum class MemoryType : int32_t { standard = 0 };              // OrtMemType

struct Api {
  void (*const functions[275])();  // of API version 17: 275 or more
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

template <size_t index, class Result, class... Arguments>
struct Function {
  Result operator()(const Api& api, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(api.functions[index])(arguments...);
  }
};

// A Status* of nullptr is success. Names are those of OrtApi.
constexpr Function<0, Status*, ErrorCode, const char*> CreateStatus;
constexpr Function<2, const char*, const Status*> GetErrorMessage;
constexpr Function<26, Status*, const char*, CustomOpDomain**> CreateCustomOpDomain;
constexpr Function<27, Status*, CustomOpDomain*, const struct CustomOp*> CustomOpDomain_Add;
constexpr Function<28, Status*, SessionOptions*, CustomOpDomain*> AddCustomOpDomain;
constexpr Function<51, Status*, Value*, void**> GetTensorMutableData;
constexpr Function<61, Status*, const TensorTypeAndShapeInfo*, size_t*> GetDimensionsCount;
constexpr Function<62, Status*, const TensorTypeAndShapeInfo*, int64_t*, size_t> GetDimensions;
constexpr Function<65, Status*, const Value*, TensorTypeAndShapeInfo**> GetTensorTypeAndShape;
constexpr Function<86, Status*, const KernelInfo*, const char*, int64_t*> KernelInfoGetAttribute_int64;
constexpr Function<88, Status*, const KernelContext*, size_t*> KernelContext_GetInputCount;
constexpr Function<90, Status*, const KernelContext*, size_t, const Value**> KernelContext_GetInput;
constexpr Function<91, Status*, KernelContext*, size_t, const int64_t*, size_t, Value**> KernelContext_GetOutput;
constexpr Function<93, void, Status*> ReleaseStatus;
constexpr Function<99, void, TensorTypeAndShapeInfo*> ReleaseTensorTypeAndShapeInfo;
constexpr Function<101, void, CustomOpDomain*> ReleaseCustomOpDomain;
constexpr Function<163, Status*, const KernelInfo*, const char*, int64_t*, size_t*> KernelInfoGetAttributeArray_int64;
// The last one that is new in 17: calls body(data, i) for each i below the total, on the session's threads, in at most
// so many batches; 0 is no limit.
constexpr Function<274, Status*, const KernelContext*, void (*)(void* data, size_t i), size_t, size_t, void*>
    KernelContext_ParallelFor;

// OrtCustomOp of version 17. A nullptr is allowed where a comment says so.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);  // nullptr with CreateKernelV2
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);  // nullptr with KernelComputeV2
  void (*KernelDestroy)(void* kernel);
  Presence (*GetInputCharacteristic)(const CustomOp*, size_t index);
  Presence (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);  // the four: nullptr without variadic inputs and outputs
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, void* context);  // nullptr: shapes are unknown until it runs
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

}  // namespace pyinvolution::ort
