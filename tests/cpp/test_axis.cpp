// Where windows lie (pyinvolution/axis.h): against a rule that moves a window step by step, and the readers of each
// position against a search among all outputs.
#include "pyinvolution/axis.h"

#include "oracle.h"

namespace {

std::string text_of(const Axis<int64_t>& axis) {
  std::string text = axis.border == Border::shift ? "shift" : "zeros";
  for (const int64_t value :
       {axis.size, axis.outputs, axis.kernel, axis.stride, axis.padding, axis.dilation, axis.upsample})
    text += " " + std::to_string(value);
  return text;
}

void check_axis(const Axis<int64_t>& axis) {
  const int64_t margin = axis.padding + axis.dilation * axis.kernel;
  std::vector<std::vector<int64_t>> readers(size_t(axis.size + 2 * margin) + 1);
  bool agrees = true;
  for (int64_t p = 0; p < axis.outputs; ++p) {
    const int64_t first = axis.first(p);
    agrees &= first == first_tap(axis.border, axis.size, axis.kernel, axis.stride, axis.padding, axis.dilation,
                                 axis.upsample, p);
    const size_t slot = size_t(first + margin);
    if (CHECK(slot < readers.size(), text_of(axis) + ": a window out of reach")) readers[slot].push_back(p);
  }
  CHECK(agrees, text_of(axis) + ": another first tap than the stepwise rule has");
  bool found = true;
  for (size_t slot = 0; slot < readers.size(); ++slot) {
    std::vector<int64_t> listed;
    const auto positions = axis.readers(int64_t(slot) - margin);
    for (int64_t i = positions.begin; i < positions.end; i += positions.step) {
      const auto outputs = axis.outputs_at(i);
      for (int64_t p = outputs.begin; p < outputs.end; p += outputs.step) listed.push_back(p);
    }
    found &= listed == readers[slot];
  }
  CHECK(found, text_of(axis) + ": other readers than a search finds");
}

}  // namespace

int main() {
  for (int64_t size = 0; size <= 24; ++size)
    for (int64_t kernel = 1; kernel <= 9; ++kernel)
      for (int64_t dilation = 1; dilation <= 8; ++dilation)
        for (const auto& [stride, upsample] : {std::pair{1, 1}, {2, 1}, {3, 1}, {5, 1}, {1, 2}, {1, 3}}) {
          if (kernel * dilation <= size || size == 0)
            check_axis(
                {Border::shift, size, (size + stride - 1) / stride * upsample, kernel, stride, 0, dilation, upsample});
          if (dilation > 4) continue;
          for (const int64_t padding : {0, 1, 4}) {
            const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
            const int64_t outputs = room < 0 ? 0 : (room / stride + 1) * upsample;
            check_axis({Border::zeros, size, outputs, kernel, stride, padding, dilation, upsample});
          }
        }
  return checks::report("axis");
}
