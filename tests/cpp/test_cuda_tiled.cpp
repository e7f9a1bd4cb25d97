// The CUDA variant `tiled` in the emulator: kernels, strides, group widths, layouts and dtypes; every schedule gives
// the same bits; each removed synchronisation is noticed.
#include "../../cuda/tiled/tiled.h"

#include "cuda_emulator/emulator.h"
#include "oracle.h"

namespace {

using emulator::Schedule;

constexpr DType tiled_dtypes[] = {DType::f32, DType::f16, DType::bf16};

std::vector<char> run_and_check(const Trial& trial, uint64_t seed = 1) {
  Setting setting(trial, Device::cuda, seed);
  const char* refusal = cuda::tiled_refusal(setting.problem, trial.pass);
  if (!CHECK(refusal == nullptr, trial.text() + ": refused, " + (refusal ? refusal : ""))) return {};
  const std::string error =
      checks::message_of([&] { cuda::tiled_run(setting.problem, trial.pass, setting.buffers(), {}); });
  if (CHECK(error.empty(), trial.text() + ": " + error)) setting.check();
  return setting.written().bytes();
}

// Narrow and wide tiles, whole ones and parts, of each kernel and stride.
void kernels_and_strides() {
  for (const int64_t k : {3, 5, 7})
    for (const int64_t s : {1, 2})
      for (const Case& shape :
           {Case{2, 16, 1, 7, 7, k, k, s, s, k / 2, k / 2}, Case{1, 32, 2, 11, 18, k, k, s, s, k / 2, k / 2},
            Case{1, 8, 1, 18, 35, k, k, s, s, k / 2 - 1, k / 2 + 1}})
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
        const Strides first = strides_of(shape, Layout::contiguous, pass),
                      last = strides_of(shape, Layout::channels_last, pass);
        Strides strides{mix & 1 ? last.x : first.x, mix & 2 ? last.w : first.w, mix & 4 ? last.y : first.y};
        if (mix & 8) {
          strides.x = strides_in_order({2, 33, 9, 11}, {0, 2, 3, 1});
          strides.y = strides_in_order({2, 35, 9, 11}, {0, 2, 3, 1});
        }
        const Trial trial{shape, Layout::contiguous, dtype, pass};
        Setting setting(trial, Device::cuda, uint64_t(mix), strides);
        CHECK(cuda::tiled_refusal(setting.problem, pass) == nullptr, "mixed layouts are not refused");
        cuda::tiled_run(setting.problem, pass, setting.buffers(), {});
        setting.check();
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
        emulator::options() = {};
        emulator::forget_statistics();
        const std::vector<char> right = run_and_check(trial);
        for (const Schedule schedule : emulator::schedules) {
          emulator::options() = {schedule, 3, -1};
          CHECK(run_and_check(trial) == right,
                trial.text() + ": other bits in the schedule " + emulator::to_string(schedule));
        }
        const auto sites = emulator::sync_sites();
        for (size_t dropped = 0; dropped < sites.size(); ++dropped) {
          int caught = 0;
          for (const Schedule schedule : emulator::schedules) {
            emulator::options() = {schedule, 3, int(dropped)};
            Setting setting(trial, Device::cuda);
            cuda::tiled_run(setting.problem, pass, setting.buffers(), {});
            caught += setting.written().bytes() != right;
          }
          CHECK(caught > 0, trial.text() + ": nobody missed the synchronisation at " + sites[dropped].text());
        }
      }
  emulator::options() = {};
}

void refusals() {
  const auto refused = [](const Case& shape, DType dtype, Layout layout, Pass pass, const char* part) {
    const Problem problem = problem_of(shape, dtype, Device::cuda, strides_of(shape, layout, pass));
    const char* refusal = cuda::tiled_refusal(problem, pass);
    CHECK(refusal != nullptr && std::string(refusal).find(part) != std::string::npos,
          std::string("expected a refusal with \"") + part + "\", got " + (refusal ? refusal : "none"));
  };
  const Case good{1, 32, 2, 8, 8, 3, 3, 1, 1, 1, 1};
  Case shape = good;
  refused(shape, DType::f64, Layout::contiguous, Pass::forward, "double");
  refused(shape, DType::f32, Layout::gapped, Pass::forward, "dense");
  shape.kw = 5;
  refused(shape, DType::f32, Layout::contiguous, Pass::forward, "square");
  shape = good, shape.kh = shape.kw = 2;
  refused(shape, DType::f32, Layout::contiguous, Pass::forward, "3, 5 and 7");
  shape = good, shape.dh = 2;
  refused(shape, DType::f32, Layout::contiguous, Pass::forward, "dilation");
  shape = good, shape.sh = shape.sw = 3;
  refused(shape, DType::f32, Layout::contiguous, Pass::forward, "strides");
  shape = good, shape.g = 8;
  refused(shape, DType::f32, Layout::contiguous, Pass::forward, "channels a group");
  shape = good, shape.h = 2, shape.ph = 0;
  refused(shape, DType::f32, Layout::contiguous, Pass::grad_input, "no pixels");
  shape = good, shape.h = shape.w = 40000;
  refused(shape, DType::f32, Layout::contiguous, Pass::forward, "32-bit");
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
