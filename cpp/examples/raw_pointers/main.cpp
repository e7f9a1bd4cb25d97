// One layer of RedNet-50 on plain memory and the threads of this program: raw_pointers [IN OUT]
// IN holds x (1,56,56,64) and the kernels (1,56,56,4,7,7) as float32, OUT gets y (1,56,56,64); without them, all ones.
#include <pyinvolution/involution.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

// A thread for each share of the tasks. An application gives its own thread pool instead.
void parallel_for(int64_t begin, int64_t end, int64_t, pyinvolution::ParallelBody body, void* state) {
  const int64_t threads = std::min<int64_t>(std::thread::hardware_concurrency(), end - begin);
  std::vector<std::jthread> running;
  for (int64_t i = 0; i < threads; ++i)
    running.emplace_back(
        [=] { body(begin + (end - begin) * i / threads, begin + (end - begin) * (i + 1) / threads, state); });
}

void run(const char* in, const char* out) {
  using namespace pyinvolution;
  const Problem problem = make_problem(DType::f32, Device::cpu, {1, 64, 56, 56}, /*groups=*/4, {}, Layout::nhwc);
  std::vector<float> x(56 * 56 * 64, 1), weight(56 * 56 * 4 * 49, 1), y(x.size());
  if (in != nullptr) {
    std::ifstream file(in, std::ios::binary);
    for (std::vector<float>* values : {&x, &weight})
      file.read(reinterpret_cast<char*>(values->data()), std::streamsize(values->size() * sizeof(float)));
    if (!file) throw std::runtime_error(std::string("cannot read ") + in);
  }

  Execution execution;
  execution.parallel_for = parallel_for;
  execution.threads = int(std::thread::hardware_concurrency());
  pyinvolution::run(problem, Pass::forward, {x.data(), weight.data(), y.data()}, execution);

  for (const Verdict& verdict : explain(problem, Pass::forward))
    std::printf("%s %s: %s\n", verdict.chosen ? "->" : "  ", verdict.variant,
                verdict.refusal.empty() ? "can run" : verdict.refusal.c_str());
  std::printf("pyinvolution %s: y has %ld x %ld pixels, the middle one is %g\n", version(), long(problem.out_h),
              long(problem.out_w), double(y[(28 * 56 + 28) * 64]));
  if (out != nullptr)
    std::ofstream(out, std::ios::binary)
        .write(reinterpret_cast<const char*>(y.data()), std::streamsize(y.size() * sizeof(float)));
}

}  // namespace

int main(int arguments, char** argument) {
  try {
    run(arguments == 3 ? argument[1] : nullptr, arguments == 3 ? argument[2] : nullptr);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "raw_pointers: error: %s\n", error.what());
    return 1;
  }
}
