// Choosing by measurement: at the first call of a problem, while `autotunes` (pyinvolution/dispatch.h).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "pyinvolution/dispatch.h"
#include "store.h"

namespace pyinvolution::ops {

// What a candidate computes, in new tensors. `checked` > 0: the results to compare, of the first so many images, in memory
// that held NaN.
using Trial = std::function<std::vector<torch::stable::Tensor>(int64_t checked)>;

struct Candidate {
  const char* name;
  Trial run;
};

// Whether a measurement may begin: there is none in this process now, the thread does not pause, and the store knows the
// device. Ends with `end_measurement` where true.
bool begin_measurement(Device);
void end_measurement();

// The fastest of the candidates whose results for `checked` images are those of the last one, which is kept for the
// problem. Measures nothing while the current stream of `where` is captured.
void measure(const torch::stable::Tensor& where, Device, const std::string& problem, int64_t checked,
             const std::vector<Candidate>&);

// Chooses the variant that `choose` will take from now on. `run(variant, checked)` is a Trial.
template <class Problem, class Op, class Run>
void tune(const torch::stable::Tensor& where, Device device, const Problem& problem, Op op, int64_t checked,
          const Run& run) {
  if (!autotunes()) return;
  recall(device);
  if (candidates(problem, op).empty() || !begin_measurement(device)) return;
  struct End {
    ~End() { end_measurement(); }
  } end;
  std::vector<Candidate> trials;
  // Again: another thread may have measured it just before.
  for (const auto* variant : candidates(problem, op))
    trials.push_back({variant->name, [&run, variant](int64_t images) { return run(*variant, images); }});
  if (!trials.empty()) measure(where, device, describe(problem, op), checked, trials);
}

// How many images of a batch are compared: all are computed alike, and a few are enough for the slowest variant.
int64_t images_to_check(const Problem&);

// The first images of a result, all for 0.
torch::stable::Tensor first_images(torch::stable::Tensor result, int64_t checked);

// An empty tensor like `tensor`, filled with NaN where it is to be checked.
torch::stable::Tensor trial_result(const torch::stable::Tensor& tensor, int64_t checked);

}  // namespace pyinvolution::ops
