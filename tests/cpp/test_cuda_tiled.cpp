// The CUDA variant `tiled` in the emulator: kernels, strides, group widths, layouts and dtypes; every schedule gives
// the same bits; each removed synchronisation is noticed.
#include "cuda/variants.h"

#include "variant.h"

namespace {

constexpr CudaVariant tiled{cuda::tiled_refusal, cuda::tiled_run};
constexpr DType tiled_dtypes[] = {DType::f32, DType::f16, DType::bf16};

void run_and_check(const Trial& trial, uint64_t seed = 1) {
  run_and_check(tiled, trial, strides_of(trial.shape, trial.layout, trial.pass), seed);
}

// Narrow and wide tiles, whole ones and parts, of each kernel and stride.
void kernels_and_strides() {
  for (const int64_t k : {3, 5, 7})
    for (const int64_t s : {1, 2})
      for (const Case& shape :
           {Case{2, 16, 1, 7, 7, k, k, s, s, k / 2, k / 2}, Case{1, 32, 2, 11, 18, k, k, s, s, k / 2, k / 2},
            Case{1, 8, 1, 18, 35, k, k, s, s, k / 2 - 1, k / 2 + 1}, Case{2, 24, 3, 8, 24, k, k, s, s, k / 2, k / 2}})
        for (const Layout layout : {Layout::contiguous, Layout::channels_last})
          for (const DType dtype : tiled_dtypes)
            for (const Pass pass : passes) run_and_check({shape, layout, dtype, pass}, uint64_t(k * 10 + s));
}

void group_widths_and_paddings() {
  int next = 0;
  for (const int64_t width : {8, 16, 24, 32})
    for (const int64_t padding : {0, 1, 3, 7})
      for (const Layout layout : layouts)
        for (const Pass pass : passes) {
          const int64_t k = padding == 7 ? 7 : 3 + 2 * (next % 3);
          Trial trial{
              {2, 2 * width, 2, 8, 9, k, k, 1, 1, padding, padding / 2}, layout, tiled_dtypes[++next % 3], pass};
          if (layout == Layout::gapped || (layout == Layout::expanded && pass == Pass::forward)) continue;
          if (trial.shape.out_h() > 0 && trial.shape.out_w() > 0) run_and_check(trial, uint64_t(next));
        }
}

// Layouts that differ between the tensors, and channels_last memory whose rows are not aligned to vectors.
void mixed_layouts() {
  for (int mix = 0; mix < 32; ++mix)
    for (const Pass pass : passes)
      for (const DType dtype : tiled_dtypes) {
        const int64_t s = 1 + mix / 16;
        const Case shape{2, 32, 2, 9, 11, 5, 5, s, s, 2, 2};
        Strides strides = mixed_strides(shape, mix);
        if (mix & 8) {
          strides.x = strides_in_order({2, 33, 9, 11}, {0, 2, 3, 1});
          strides.y = strides_in_order({2, 35, 9, 11}, {0, 2, 3, 1});
        }
        run_and_check(tiled, {shape, Layout::contiguous, dtype, pass}, strides, uint64_t(mix));
      }
}

void special_values() {
  for (const Case& shape : {Case{2, 16, 2, 8, 9, 3, 3, 1, 1, 1, 1}, Case{1, 16, 1, 9, 9, 7, 7, 2, 2, 3, 3},
                            Case{1, 16, 2, 8, 6, 5, 5, 2, 2, 2, 1}, Case{1, 8, 1, 9, 8, 3, 3, 2, 2, 0, 1},
                            Case{1, 8, 1, 5, 17, 7, 7, 1, 1, 3, 3}})
    for (const Layout layout : {Layout::contiguous, Layout::channels_last})
      for (const Pass pass : passes)
        for (uint64_t seed = 1; seed <= 3; ++seed)
          run_and_check({shape, layout, tiled_dtypes[seed % 3], pass, Values::special}, seed);
}

void schedules_and_races() {
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const Layout layout : {Layout::contiguous, Layout::channels_last})
      for (int pass_and_stride = 0; pass_and_stride < 6; ++pass_and_stride) {
        const Pass pass = passes[pass_and_stride / 2];
        const int64_t s = 1 + pass_and_stride % 2;
        const Trial trial{{1, 32, 2, 10, 17, 5, 5, s, s, 2, 2}, layout, dtype, pass};
        check_schedules(tiled, trial, strides_of(trial.shape, layout, pass));
      }
}

void refusals() {
  const Case good{1, 32, 2, 8, 8, 3, 3, 1, 1, 1, 1};
  check_usual_refusals(tiled, good, DType::f32, 8);
  check_refused(tiled, good, DType::f64, Layout::contiguous, Pass::forward, "float64");
}

}  // namespace

int main() {
  kernels_and_strides();
  group_widths_and_paddings();
  mixed_layouts();
  special_values();
  schedules_and_races();
  refusals();
  return checks::report("cuda tiled");
}
