// What the choice by measurement asks of a stream.
#include <cuda_runtime_api.h>

#include "errors.cuh"

namespace pyinvolution::cuda {
namespace {

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "an event"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(void* stream) const { check(cudaEventRecord(event_, static_cast<cudaStream_t>(stream)), "an event"); }
  double since(const Event& start) const {
    float milliseconds = 0;
    check(cudaEventSynchronize(event_), "an event");
    check(cudaEventElapsedTime(&milliseconds, start.event_, event_), "an event");
    return 1e-3 * double(milliseconds);
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// While it lives, this thread may make calls that would invalidate the captures of others.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

void unless_captured(void* stream, const std::function<void()>& work) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  // An error, too, says that a graph is being captured: by a stream that the legacy stream would wait for.
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) {
    cudaGetLastError();
    return;
  }
  if (status != cudaStreamCaptureStatusNone) return;
  const Relaxed relaxed;
  work();
}

double seconds(void* stream, const std::function<void()>& work) {
  const Event start, end;
  start.record(stream);
  work();
  end.record(stream);
  return end.since(start);
}

}  // namespace pyinvolution::cuda
