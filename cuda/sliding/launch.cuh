// Launches of `sliding` for one dtype.
#pragma once

#include "kernels.cuh"

namespace pyinvolution::cuda::sliding {

template <class T>
View view(const Problem& p, const Plan& plan, const int64_t (&strides)[4], const void* data) {
  const int64_t group = p.groups > 1 ? p.group_channels() : 0;
  const bool aligned = vector_of<T>(plan.vector, data, {strides[0], strides[2], strides[3], group}) == plan.vector;
  return {strides[0], int(strides[1]), int(strides[2]), int(strides[3]), strides[1] == 1 && plan.vector > 1 && aligned};
}

template <class T>
bool aligned_runs(const void* data, std::initializer_list<int64_t> strides) {
  return vector_of<T>(run_pixels, data, strides) == run_pixels &&
         reinterpret_cast<uintptr_t>(data) % (run_pixels * sizeof(T) < 16 ? run_pixels * sizeof(T) : 16) == 0;
}

inline Area area(const Plan& plan, const View& view, int rows, int columns, int pitch, int every, int64_t height,
                 int64_t width) {
  Area area{rows, columns, pitch, rows * pitch, int(height), int(width), 0, 0, 0, view.c == 1, {}, {}, {}};
  const int vectors = plan.planes * plan.vectors;
  // As many threads along positions as there are, where these are consecutive in memory.
  area.lanes =
      std::min(plan.threads, area.channels_inner ? vectors : std::clamp(plan.threads / (rows * columns), 1, vectors));
  const int others = plan.threads / area.lanes;
  area.column_lanes = std::min(columns, others), area.row_lanes = others / area.column_lanes;
  area.by_load = Division(area.channels_inner ? area.lanes : others);
  area.by_column_lanes = Division(area.column_lanes), area.by_every = Division(every);
  return area;
}

inline Classes classes_of(const Problem& p, Pass pass, int axis) {
  const int64_t dilation = axis == 0 ? p.dilation_h : p.dilation_w, padding = axis == 0 ? p.padding_h : p.padding_w;
  const int64_t in = axis == 0 ? p.in_h : p.in_w, out = axis == 0 ? p.out_h : p.out_w;
  const int x = int(p.x_stride[2 + axis]), w = int(p.w_stride[4 + axis]), y = int(p.y_stride[2 + axis]);
  const auto whole = [&](int64_t pixels) { return int(pixels % dilation == 0 ? dilation : pixels % dilation); };
  const bool shifts = p.border == Border::shift;
  const int first = shifts ? 0 : int(first_class(pass, padding, dilation));
  if (pass == Pass::grad_input) return {first, int(dilation), whole(in), whole(out), y, w, x};
  return {first, int(dilation), whole(out), whole(in), x, w, y};
}

template <class T>
KernelParams kernel_params(const Problem& problem, Pass pass, const Plan& plan, const Buffers& buffers) {
  KernelParams q{};
  const bool to_input = pass == Pass::grad_input, shifts = problem.border == Border::shift;
  const Problem p = class_of(problem, pass);
  q.in_classes = in_classes(problem);
  q.classes_h = classes_of(problem, pass, 0), q.classes_w = classes_of(problem, pass, 1);
  q.by_kernel_w = Division(p.kernel_w);
  View x = view<T>(problem, plan, problem.x_stride, buffers.x), y = view<T>(problem, plan, problem.y_stride, buffers.y);
  x.h = int(p.x_stride[2]), x.w = int(p.x_stride[3]), y.h = int(p.y_stride[2]), y.w = int(p.y_stride[3]);
  q.x = to_input ? y : x, q.y = to_input ? x : y;
  q.w_height = int(p.out_h), q.w_width = int(p.out_w);
  q.kernel_h = int(p.kernel_h), q.kernel_w = int(p.kernel_w);
  if (!to_input) {
    q.h[0] = forward_axis(p.out_h, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h);
    q.w_axis[0] = forward_axis(p.out_w, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w);
  }
  if (to_input && shifts) {
    q.h[0] = shifted_gradient_axis(p.in_h, p.kernel_h);
    q.w_axis[0] = shifted_gradient_axis(p.in_w, p.kernel_w);
  }
  // Those of all classes are alike.
  for (int i = 0; to_input && !shifts && i < (q.in_classes ? max_classes : p.stride_h); ++i)
    q.h[i] = gradient_axis(q.in_classes ? 0 : i, p.in_h, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h);
  for (int i = 0; to_input && !shifts && i < (q.in_classes ? max_classes : p.stride_w); ++i)
    q.w_axis[i] = gradient_axis(q.in_classes ? 0 : i, p.in_w, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w);

  q.group_channels = int(p.group_channels());
  q.image_units = int(plan.image_units), q.units = plan.units;
  q.unit_chunks = plan.unit_chunks, q.planes = plan.planes, q.unit_vectors = plan.unit_chunks * plan.vectors;
  q.rows = plan.rows, q.columns = plan.columns;
  q.spacing = plan.spacing, q.step = plan.step, q.phases = plan.phases, q.slides = plan.slides;
  q.every = plan.every, q.y_every = plan.y_every;
  q.w_rows = plan.w_rows, q.w_pitch = plan.w_pitch, q.w_row_pitch = plan.w_row_pitch;
  q.w_columns = plan.w_columns;
  q.w_offset = plan.w_offset, q.taps_inner = taps_are_inner(p), q.plain = p.stride_w == 1 && plan.spacing == 1;
  q.w_lane_bits = plan.w_rows * p.kernel_w * int64_t(sizeof(T)) <= 16 ? 1 : 2;
  q.slots = plan.slots, q.stages = plan.stages;
  q.vectors = int(ceil_div(p.group_channels(), plan.vector));

  q.by_classes_w = Division(plan.classes_w), q.by_classes = Division(plan.classes_h * plan.classes_w);
  q.by_chunk_blocks = Division(ceil_div(plan.chunks, plan.unit_chunks));
  q.by_unit_blocks = Division(ceil_div(plan.image_units, plan.units));
  q.by_tiles_w = Division(plan.tiles_w), q.by_tiles_h = Division(plan.tiles_h);
  q.by_groups = Division(p.groups), q.by_runs = Division(plan.runs), q.by_rows = Division(plan.rows);
  q.by_unit_chunks = Division(plan.unit_chunks), q.by_unit_vectors = Division(q.unit_vectors);
  q.by_spacing = Division(plan.spacing), q.by_phases = Division(plan.phases);
  q.by_columns = Division(plan.columns), q.by_w_columns = Division(std::max(1, q.w_columns));
  q.by_span = Division(int64_t{run_pixels} * plan.spacing);
  q.by_tap_step = Division(to_input ? p.stride_w / std::gcd(p.stride_w, p.dilation_w) : 1);
  q.by_slots = Division(std::max(1, plan.slots)), q.by_row_slots = Division(std::max(1, plan.row_slots));
  q.x_area = area(plan, q.x, plan.x_rows, plan.x_columns, plan.pitch, plan.every, to_input ? p.out_h : p.in_h,
                  to_input ? p.out_w : p.in_w);
  q.y_area = area(plan, q.y, plan.rows, plan.columns, plan.y_pitch, plan.y_every, p.out_h, p.out_w);

  const int64_t w_sizes[] = {p.batch, p.groups, p.kernel_h, p.kernel_w, problem.out_h, problem.out_w};
  q.w = {p.w_stride[0],
         int(p.w_stride[1]),
         int(p.w_stride[2]),
         int(p.w_stride[3]),
         int(p.w_stride[4]),
         int(p.w_stride[5]),
         reach(w_sizes, problem.w_stride) + 1,
         false,
         plan.spacing == 1 && p.w_stride[5] == 1};
  // Where columns are dense there is one class of them, or each has one pixel.
  const bool whole_runs = plan.spacing == 1 && p.out_w % run_pixels == 0;
  const int64_t (&w_stride)[6] = problem.w_stride;
  q.w.vectors = whole_runs && p.w_stride[5] == 1 &&
                aligned_runs<T>(buffers.w, {w_stride[0], w_stride[1], w_stride[2], w_stride[3], w_stride[4]});
  q.store_vectors = plan.spacing == 1 && q.y.w == 1 && q.y.c != 1 &&
                    (to_input ? p.in_w % run_pixels == 0 && p.stride_w == 1 : whole_runs) &&
                    aligned_runs<T>(to_input ? buffers.x : buffers.y,
                                    {q.y.n, q.y.c, to_input ? problem.x_stride[2] : problem.y_stride[2]});
  return q;
}

template <class T, int V, int M, bool ToInput, bool Shifts = false>
void run_apply(bool staged, const Grid& grid, const KernelParams& q, const T* x, const T* w, T* y,
               const Execution& execution) {
  launch<KernelParams, const T*, const T*, T*>(
      ToInput ? "sliding grad_input" : "sliding forward",
      staged ? apply<T, V, M, ToInput, true, Shifts> : apply<T, V, M, ToInput, Shifts, Shifts>, grid, execution, q, x,
      w, y);
}

// Calls `body` with the width of a vector as an integral_constant.
template <class Body>
void with_vector(int vector, const Body& body) {
  if (vector == 1) return body(std::integral_constant<int, 1>{});
  if (vector == 2) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, 4>{});
}

template <DType dtype>
void run(const Problem& p, Pass pass, const Buffers& buffers, const Execution& execution) {
  using T = Storage<dtype>;
  const Plan plan = plan_of(p, pass);
  const KernelParams q = kernel_params<T>(p, pass, plan, buffers);
  const Grid grid{plan.blocks(), plan.threads, int(plan.shared_bytes)};
  const bool staged = is_staged(class_of(p, pass), pass);
  T* x = static_cast<T*>(buffers.x);
  T* w = static_cast<T*>(buffers.w);
  T* y = static_cast<T*>(buffers.y);
  const auto run_grad_weight = [&](auto vector, auto shifts) {
    constexpr int V = vector.value;
    constexpr bool Shifts = shifts.value;
    launch<KernelParams, const T*, T*, const T*>(
        "sliding grad_weight", slot_taps(plan, p) == 4 ? grad_weight<T, V, 4, Shifts> : grad_weight<T, V, 8, Shifts>,
        grid, execution, q, x, w, y);
  };
  if (p.border == Border::shift) {
    if (pass == Pass::grad_weight) return run_grad_weight(std::integral_constant<int, 4>{}, std::true_type{});
    if (pass == Pass::grad_input) return run_apply<T, 4, 1, true, true>(true, grid, q, y, w, x, execution);
    if constexpr (dtype != DType::f64)
      if (plan.vectors == 2) return run_apply<T, 4, 2, false, true>(true, grid, q, x, w, y, execution);
    return run_apply<T, 4, 1, false, true>(true, grid, q, x, w, y, execution);
  }
  if constexpr (dtype != DType::f64)
    if (plan.vectors == 2 && pass == Pass::forward)
      return run_apply<T, 4, 2, false>(staged, grid, q, x, w, y, execution);
  with_vector(plan.vector, [&](auto vector) {
    switch (pass) {
      case Pass::forward: return run_apply<T, vector.value, 1, false>(staged, grid, q, x, w, y, execution);
      case Pass::grad_input: return run_apply<T, vector.value, 1, true>(staged, grid, q, y, w, x, execution);
      case Pass::grad_weight: return run_grad_weight(vector, std::false_type{});
    }
  });
}

}  // namespace pyinvolution::cuda::sliding
