// As much of ONNX Runtime's C++ header of this name as the program in docs/onnx.md uses, on top of our declaration of its
// C ABI: no package has the header. Where ONNXRUNTIME_INCLUDE names a release's headers, the test takes those.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"

extern "C" const pyinvolution::ort::ApiBase* OrtGetApiBase() noexcept;

enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };

namespace Ort {

namespace abi = pyinvolution::ort;
struct EnvObject;
struct SessionObject;
struct MemoryInfoObject;

constexpr abi::Function<3, abi::Status*, int, const char*, EnvObject**> CreateEnv;
constexpr abi::Function<7, abi::Status*, EnvObject*, const char*, const abi::SessionOptions*, SessionObject**>
    CreateSession;
constexpr abi::Function<9, abi::Status*, SessionObject*, const void*, const char* const*, const abi::Value* const*,
                        size_t, const char* const*, size_t, abi::Value**>
    RunSession;
constexpr abi::Function<10, abi::Status*, abi::SessionOptions**> CreateSessionOptions;
constexpr abi::Function<49, abi::Status*, const MemoryInfoObject*, void*, size_t, const int64_t*, size_t,
                        abi::ElementType, abi::Value**>
    CreateTensorWithDataAsOrtValue;
constexpr abi::Function<64, abi::Status*, const abi::TensorTypeAndShapeInfo*, size_t*> GetTensorShapeElementCount;
constexpr abi::Function<69, abi::Status*, OrtAllocatorType, OrtMemType, MemoryInfoObject**> CreateCpuMemoryInfo;
constexpr abi::Function<92, void, EnvObject*> ReleaseEnv;
constexpr abi::Function<94, void, MemoryInfoObject*> ReleaseMemoryInfo;
constexpr abi::Function<95, void, SessionObject*> ReleaseSession;
constexpr abi::Function<96, void, abi::Value*> ReleaseValue;
constexpr abi::Function<100, void, abi::SessionOptions*> ReleaseSessionOptions;
constexpr abi::Function<228, abi::Status*, abi::SessionOptions*, const char*> RegisterCustomOpsLibrary_V2;

struct Exception : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline const abi::Api& api() { return *OrtGetApiBase()->GetApi(abi::api_version); }

inline void check(abi::Status* status) {
  if (status == nullptr) return;
  const std::string message = abi::GetErrorMessage(api(), status);
  abi::ReleaseStatus(api(), status);
  throw Exception(message);
}

template <class Object, const auto& release>
struct Owner {
  struct Release {
    void operator()(Object* object) const { release(api(), object); }
  };
  std::unique_ptr<Object, Release> owned;
  operator Object*() const { return owned.get(); }
};

struct Env : Owner<EnvObject, ReleaseEnv> {
  Env() {
    EnvObject* made = nullptr;
    check(CreateEnv(api(), 2, "", &made));
    owned.reset(made);
  }
};

struct SessionOptions : Owner<abi::SessionOptions, ReleaseSessionOptions> {
  SessionOptions() {
    abi::SessionOptions* made = nullptr;
    check(CreateSessionOptions(api(), &made));
    owned.reset(made);
  }
  void RegisterCustomOpsLibrary(const char* path) { check(RegisterCustomOpsLibrary_V2(api(), owned.get(), path)); }
};

struct MemoryInfo : Owner<MemoryInfoObject, ReleaseMemoryInfo> {
  static MemoryInfo CreateCpu(OrtAllocatorType allocator, OrtMemType type) {
    MemoryInfoObject* made = nullptr;
    check(CreateCpuMemoryInfo(api(), allocator, type, &made));
    MemoryInfo info;
    info.owned.reset(made);
    return info;
  }
};

struct TensorTypeAndShapeInfo : Owner<abi::TensorTypeAndShapeInfo, abi::ReleaseTensorTypeAndShapeInfo> {
  size_t GetElementCount() const {
    size_t count = 0;
    check(GetTensorShapeElementCount(api(), owned.get(), &count));
    return count;
  }
};

struct Value : Owner<abi::Value, ReleaseValue> {
  template <class T>
  static Value CreateTensor(const MemoryInfo& info, T* data, size_t count, const int64_t* shape, size_t dimensions) {
    static_assert(sizeof(T) == sizeof(float));
    abi::Value* made = nullptr;
    check(CreateTensorWithDataAsOrtValue(api(), info, data, count * sizeof(T), shape, dimensions, abi::ElementType::f32,
                                         &made));
    Value value;
    value.owned.reset(made);
    return value;
  }
  template <class T>
  const T* GetTensorData() const {
    void* data = nullptr;
    check(abi::GetTensorMutableData(api(), owned.get(), &data));
    return static_cast<const T*>(data);
  }
  TensorTypeAndShapeInfo GetTensorTypeAndShapeInfo() const {
    abi::TensorTypeAndShapeInfo* made = nullptr;
    check(abi::GetTensorTypeAndShape(api(), owned.get(), &made));
    TensorTypeAndShapeInfo info;
    info.owned.reset(made);
    return info;
  }
};

struct RunOptions {
  explicit RunOptions(std::nullptr_t) {}
};

struct Session : Owner<SessionObject, ReleaseSession> {
  Session(const Env& env, const char* path, const SessionOptions& options) {
    SessionObject* made = nullptr;
    check(CreateSession(api(), env, path, options, &made));
    owned.reset(made);
  }
  std::vector<Value> Run(const RunOptions&, const char* const* inputs, const Value* values, size_t input_count,
                         const char* const* outputs, size_t output_count) {
    std::vector<const abi::Value*> given;
    for (size_t i = 0; i < input_count; ++i) given.push_back(values[i]);
    std::vector<abi::Value*> made(output_count);
    check(
        RunSession(api(), owned.get(), nullptr, inputs, given.data(), input_count, outputs, output_count, made.data()));
    std::vector<Value> results(output_count);
    for (size_t i = 0; i < output_count; ++i) results[i].owned.reset(made[i]);
    return results;
  }
};

}  // namespace Ort
