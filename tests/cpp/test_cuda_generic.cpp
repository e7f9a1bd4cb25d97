// The CUDA variant `generic` in the emulator: every parameter class, dtype and layout, both index widths.
#include "cuda/variants.h"

#include "cuda_emulator/emulator.h"
#include "oracle.h"

namespace {

void run_and_check(const Trial& trial, uint64_t seed = 1) {
  Setting setting(trial, Device::cuda, seed);
  const std::string error =
      checks::message_of([&] { cuda::generic_run(setting.problem, trial.pass, setting.buffers(), {}); });
  if (CHECK(error.empty(), trial.text() + ": " + error)) setting.check();
}

void every_class() {
  std::vector<Case> all = basic_cases();
  for (const auto& more : {shifted_cases(), upsampled_cases()}) all.insert(all.end(), more.begin(), more.end());
  for (const Case& shape : all)
    for (const Layout layout : layouts)
      for (const DType dtype : dtypes)
        for (const Pass pass : passes) run_and_check({shape, layout, dtype, pass});
}

void random_shapes() {
  uint64_t seed = 1;
  for (const Case& shape : random_cases(100, 7)) {
    ++seed;
    for (const Pass pass : passes) run_and_check({shape, layouts[seed % 4], dtypes[seed / 4 % 4], pass}, seed);
  }
}

void special_values() {
  for (const Case& shape : {Case{2, 4, 2, 8, 9, 3, 3, 1, 1, 1, 1}, Case{1, 6, 2, 9, 9, 5, 5, 2, 2, 2, 2},
                            Case{1, 2, 1, 4, 4, 2, 3, 3, 2, 2, 1}})
    for (const Layout layout : {Layout::contiguous, Layout::channels_last})
      for (const DType dtype : dtypes)
        for (const Pass pass : passes)
          for (uint64_t seed = 1; seed <= 4; ++seed) run_and_check({shape, layout, dtype, pass, Values::special}, seed);
}

// Strides of one dimension above 2^31 elements: tensors as large as that, of which a few pages exist.
void large_offsets() {
  const Case shape{2, 4, 2, 5, 6, 3, 3, 1, 1, 1, 1};
  constexpr int64_t far = (int64_t{1} << 31) + 12345;
  for (const int far_tensor : {0, 1, 2})
    for (const Pass pass : passes)
      for (const DType dtype : {DType::f16, DType::f32}) {
        Strides strides = strides_of(shape, Layout::contiguous, pass);
        (far_tensor == 0 ? strides.x : far_tensor == 1 ? strides.w : strides.y)[far_tensor == 1 ? 4 : 0] = far;
        const Trial trial{shape, Layout::contiguous, dtype, pass};
        Setting setting(trial, Device::cuda, 1, strides);
        cuda::generic_run(setting.problem, pass, setting.buffers(), {});
        setting.check();
      }
}

// More elements than the threads of the largest grid: the loop over the grid goes round more than once.
void more_than_a_grid() {
  emulator::forget_statistics();
  const Case shape{1, 1, 1, 4104, 4104, 1, 1};
  const Trial trial{shape, Layout::expanded, DType::f16, Pass::forward};
  Strides strides = strides_of(shape, Layout::expanded, Pass::forward);
  strides.x[2] = 0;
  strides.w[5] = 0;
  Setting setting(trial, Device::cuda, 1, strides);
  cuda::generic_run(setting.problem, trial.pass, setting.buffers(), {});
  CHECK(emulator::statistics().blocks * 256 < setting.y.count(), "the grid covers all elements at once");
  const double w = setting.w.get(0);
  bool right = true;
  for (int64_t i = 0; i < setting.y.count(); i += 4099)
    right &= std::fabs(setting.y.get(i) - w * setting.x.get(i % 4104)) <= 0x1p-11 * std::fabs(w) + 0x1p-24;
  CHECK(right, "elements of a later round");
}

}  // namespace

int main() {
  every_class();
  random_shapes();
  special_values();
  large_offsets();
  more_than_a_grid();
  return checks::report("cuda generic");
}
