#include "../variants.h"
#include "config.cuh"

namespace pyinvolution::cuda {

Refusal sliding_refusal(const Problem& p, Pass pass) {
  const bool shifts = p.border == Border::shift;
  if (shifts && (p.upsample_h != 1 || p.upsample_w != 1))
    return needs("an upsampling of 1", p.upsample_h, p.upsample_w);
  if (const Refusal refusal = shifts ? image_refusal(p) : pixels_refusal(p)) return refusal;
  if (shifts && pass == Pass::grad_input && (p.stride_h > 1 || p.stride_w > 1))
    return needs("a stride of 1 for the gradient of the input with a shifted border", p.stride_h, p.stride_w);
  if (shifts && ((p.stride_h > 1 && p.dilation_h > 1) || (p.stride_w > 1 && p.dilation_w > 1)))
    return needs("a stride of 1 where a shifted border has a dilation", p.stride_h, p.stride_w);
  if (p.batch < 1 || p.channels < 1) return needs("images with channels", p.batch, p.channels);
  if (pass == Pass::grad_input && (p.stride_h > sliding::max_classes || p.stride_w > sliding::max_classes))
    return needs("a stride of at most 4 (vertical and horizontal)", p.stride_h, p.stride_w);
  // Tiles begin and end outside the image.
  const Problem one = sliding::class_of(p, pass);
  Problem image = one;
  image.batch = 1;
  image.in_h += 256 * one.stride_h, image.in_w += 32 * one.stride_w;
  image.out_h += 256 + one.padding_h + one.dilation_h * one.kernel_h;
  image.out_w += 32 + one.padding_w + one.dilation_w * one.kernel_w;
  if (!within(image, tile_limit))
    return needs("an image whose offsets fit in 32 bits (height and width)", p.in_h, p.in_w);
  if (p.batch * p.groups >= tile_limit) return needs("fewer than 2^30 groups of images", p.batch * p.groups);
  const sliding::Plan plan = sliding::plan_of(p, pass);
  if (plan.threads == 0)
    return needs("the pixels below four outputs in 99 KB of shared memory (reach of the kernel)",
                 one.dilation_h * (one.kernel_h - 1) + 1, one.dilation_w * (one.kernel_w - 1) + 1);
  return tiles_refusal(plan.blocks());
}

// By counting; not measured.
Refusal sliding_slower(const Problem& p, Pass pass) {
  if (p.border == Border::shift)
    return pass != Pass::grad_weight && p.group_channels() <= 2
               ? needs("more than 2 channels per group where the border is shifted", p.group_channels())
               : Refusal{};
  const int64_t products = p.taps() * p.group_channels();
  if (products < sliding::least_products && sliding::taps_are_inner(p))
    return needs("at least 24 products for each pixel and group, where taps are dense", products);
  if (pass == Pass::grad_input && sliding::taps_are_inner(p)) {
    // Without the halos of a dilation, it is the faster one for narrower groups.
    const bool classes = sliding::in_classes(p);
    if (classes && p.group_channels() < 8)
      return needs("at least 8 channels per group for grad_input where taps are dense, with a dilation",
                   p.group_channels());
    if (!classes && p.group_channels() <= 16)
      return needs("more than 16 channels per group for grad_input where taps are dense", p.group_channels());
  }
  if (p.group_channels() >= 16 && sliding::taps_are_inner(p) && !tiled_refusal(p, pass))
    return needs("a weight with dense columns, or a problem that tiled cannot run");
  if (products < sliding::least_products && p.out_h * p.out_w < sliding::small_image)
    return needs("at least 24 products for each pixel and group, with less than 1024 pixels", products);
  return {};
}

void sliding_run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  if (problem.batch == 0) return;
  with_dtype(problem.dtype, [&](auto dtype) { sliding::run<dtype.value>(problem, pass, buffers, execution); });
}

}  // namespace pyinvolution::cuda
