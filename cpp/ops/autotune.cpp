#include "autotune.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <sstream>

#include "call.h"
#include "runtime.h"
#ifndef PYINVOLUTION_NO_CUDA
#include "cuda/variants.h"
#endif

namespace pyinvolution::ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double enough_seconds = 0.1;
constexpr int least_turns = 3, most_turns = 10;
// A candidate that takes long, and this many times as long as the fastest, in a first and cold run, is not run again.
constexpr double hopeless = 4, long_seconds = 0.02;
// By so much must a variant be faster than those before it in the table, so that chance does not choose.
constexpr double clearly = 0.97;

std::atomic_flag busy = ATOMIC_FLAG_INIT;
thread_local bool paused = false;

enum class Asked { no, now, yes, refused };
std::atomic<Asked> asked[2] = {Asked::no, Asked::no};

std::mutex store_mutex;
std::shared_ptr<const Store>& store_slot() {
  static auto* slot = new std::shared_ptr<const Store>(std::make_shared<Store>());  // outlives every thread
  return *slot;
}
std::shared_ptr<const Store> store() {
  const std::lock_guard<std::mutex> lock(store_mutex);
  return store_slot();
}

// How far results may differ, relative to the largest one.
double tolerance(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 1e-10;
    case ScalarType::Float: return 1e-4;
    case ScalarType::Half: return 5e-3;
    default: return 3e-2;
  }
}

double number(const Tensor& scalar) {
  const Tensor host = torch::stable::to(scalar, ScalarType::Double, std::nullopt,
                                        torch::stable::Device(torch::stable::DeviceType::CPU));
  return *static_cast<const double*>(host.const_data_ptr());
}

bool alike(const std::vector<Tensor>& results, const std::vector<Tensor>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double relative = tolerance(expected[i].scalar_type());
    const Tensor ours = torch::stable::to(results[i], ScalarType::Double);
    const Tensor theirs = torch::stable::to(expected[i], ScalarType::Double);
    const std::optional<double> zero = 0.0;
    const double largest =
        number(call("aten::max", "", call("aten::abs", "", call("aten::nan_to_num", "", theirs, zero, zero, zero))));
    const Tensor close = call("aten::isclose", "", ours, theirs, 0.0, relative * largest, true);
    if (number(call("aten::all", "", close)) == 0) return false;
  }
  return true;
}

// Seconds that a call takes on the device of `where`.
class Clock {
 public:
  Clock(const Tensor& where, Device device) : device_(device), where_(where) {}

  double operator()(const std::function<void()>& work) const {
#ifndef PYINVOLUTION_NO_CUDA
    if (device_ == Device::cuda) {
      // This gives the host the time to enqueue the work, and takes the operands out of the cache.
      Tensor flushed = torch::stable::new_empty(where_, {int64_t{1} << 27}, ScalarType::Byte);
      torch::stable::zero_(flushed);
      return cuda::seconds(current_stream(where_), work);
    }
#endif
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

 private:
  Device device_;
  const Tensor& where_;
};

struct Timed {
  const Candidate* candidate;
  double seconds;
};

// The candidates whose results are right, each with the time that its check took.
std::vector<Timed> check(const std::vector<Candidate>& candidates, int64_t checked, const Clock& clock) {
  std::vector<Tensor> expected;
  std::vector<Timed> right;
  for (auto candidate = candidates.rbegin(); candidate != candidates.rend(); ++candidate) {
    const bool oracle = candidate == candidates.rbegin();
    try {
      std::vector<Tensor> results;
      const double seconds = clock([&] { results = candidate->run(checked); });
      if (oracle) expected = results;
      if (oracle || alike(results, expected)) right.insert(right.begin(), {&*candidate, seconds});
    } catch (const std::exception&) {
      // A variant that fails is no choice; without the oracle there is none at all.
      if (oracle) throw;
    }
  }
  return right;
}

const Candidate& fastest(std::vector<Timed>& timed, const Clock& clock) {
  const auto faster = [](const Timed& a, const Timed& b) { return a.seconds < b.seconds; };
  const double limit = std::max(long_seconds, hopeless * std::min_element(timed.begin(), timed.end(), faster)->seconds);
  timed.erase(std::remove_if(timed.begin(), timed.end(), [&](const Timed& one) { return one.seconds > limit; }),
              timed.end());
  for (Timed& one : timed) one.seconds = std::numeric_limits<double>::infinity();
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  for (int turn = 0; turn < least_turns || (turn < most_turns && elapsed() < enough_seconds); ++turn)
    for (Timed& one : timed) one.seconds = std::min(one.seconds, clock([&] { one.candidate->run(0); }));
  const Timed* best = &timed.front();
  for (const Timed& one : timed)
    if (one.seconds < clearly * best->seconds) best = &one;
  return *best->candidate;
}

void measure_on_stream(const Tensor& where, Device device, const std::string& problem, int64_t checked,
                       const std::vector<Candidate>& candidates) {
  std::string chosen = candidates.front().name;
  std::ostringstream times;
  try {
    const Clock clock(where, device);
    if (candidates.size() > 1) {
      std::vector<Timed> timed = check(candidates, checked, clock);
      chosen = fastest(timed, clock).name;
      for (const Timed& one : timed)
        times << (&one == timed.data() ? "" : ", ") << one.candidate->name << " " << one.seconds * 1e6 << " us";
    }
  } catch (const std::exception&) {
    // Nothing could be compared, for want of memory perhaps: the table decides, and not again at every call.
    keep_choice(problem, chosen);
    return;
  }
  keep_choice(problem, chosen);
  if (candidates.size() > 1)
    if (const auto kept = store(); kept->remember) kept->remember(to_string(device), problem, chosen, times.str());
}

}  // namespace

void set_store(Store replacement) {
  const std::lock_guard<std::mutex> lock(store_mutex);
  store_slot() = std::make_shared<Store>(std::move(replacement));
  for (auto& each : asked) each = Asked::no;
}

void pause_autotune(bool pause) { paused = pause; }

void recall(Device device) {
  std::atomic<Asked>& state = asked[int(device)];
  Asked expected = Asked::no;
  if (state != Asked::no || !autotunes() || !state.compare_exchange_strong(expected, Asked::now)) return;
  const auto known = store();
  state = !known->recall || known->recall(to_string(device)) ? Asked::yes : Asked::refused;
}

bool begin_measurement(Device device) { return !paused && asked[int(device)] == Asked::yes && !busy.test_and_set(); }

void end_measurement() { busy.clear(); }

void measure(const Tensor& where, Device device, const std::string& problem, int64_t checked,
             const std::vector<Candidate>& candidates) {
#ifndef PYINVOLUTION_NO_CUDA
  if (device == Device::cuda) {
    const torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
    cuda::unless_captured(current_stream(where),
                          [&] { measure_on_stream(where, device, problem, checked, candidates); });
    return;
  }
#endif
  measure_on_stream(where, device, problem, checked, candidates);
}

int64_t images_to_check(const Problem& p) {
  const int64_t multiply_adds = p.channels * p.taps() * p.out_h * p.out_w;
  return std::clamp<int64_t>((int64_t{1} << 26) / std::max<int64_t>(multiply_adds, 1), 1, p.batch);
}

Tensor first_images(Tensor result, int64_t checked) {
  return checked > 0 ? torch::stable::narrow(result, 0, 0, checked) : result;
}

Tensor trial_result(const Tensor& tensor, int64_t checked) {
  const Tensor result = torch::stable::empty_like(tensor);
  return checked > 0 ? torch::stable::fill_(result, std::numeric_limits<double>::quiet_NaN()) : result;
}

}  // namespace pyinvolution::ops
