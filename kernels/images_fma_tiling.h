// How the kernels whose lanes are images are cut, and how they lay planes out: images_fma and images_fma_grad_weight. For
// what can serve, for launches and for the kernels.
#pragma once

#include "problem.h"

namespace depthwise {

constexpr int kMaxLaneImage = 20;  // rows and columns
constexpr int max_lane_height(int64_t width) { return width <= 16 ? 16 : kMaxLaneImage; }
// Output rows that the warps of a block take, at most.
constexpr int max_lane_out_height(int out_width) { return out_width <= 14 ? 14 : max_lane_height(out_width); }
// Units of planes of a block: two where whole planes are a warp's work.
constexpr int lane_units(bool whole_plane) { return whole_plane ? 2 : 1; }
// images_fma_grad_weight, but for whole planes: of wide images half as many fit, so that the halves of a warp take other
// kernel rows.
constexpr bool takes_half_lanes(bool whole_plane, int64_t width, int64_t out_width) {
  return !whole_plane && (width > 14 || out_width > 14);
}
constexpr int kLaneGradWeightWarps = 7;  // of a block, at most

// Floats from row to row and from plane to plane of shared memory, where lanes read `granule` floats at once: planes are an
// odd multiple of that, so that lanes meet different banks (images_fma_lanes.cuh).
constexpr int lane_pitch(int width, int granule = 4) { return (width + granule - 1) / granule * granule; }
constexpr int lane_plane(int height, int width, int granule = 4) {
  const int floats = height * lane_pitch(width, granule);
  return floats / granule % 2 != 0 ? floats : floats + granule;
}

// How lanes are dealt to channels and images: 1 << channel_bits channels a warp.
struct LaneCut {
  int channel_bits, shared_bytes;
  int plane_bits = 5;  // 1 << plane_bits planes a warp
};
constexpr int lane_groups(int64_t n, const LaneCut& cut) {  // of images
  const int images = (1 << cut.plane_bits) >> cut.channel_bits;
  return static_cast<int>((n + images - 1) / images);
}

// `unit_bytes`: of shared memory for the planes of all units; `channel_bytes`: for what every channel has beside.
// channels_last: eight channels, whole sectors of memory. NCHW: one, unless more leave fewer lanes without an image.
constexpr LaneCut lane_cut(int64_t n, int units, int unit_bytes, int channel_bytes, bool channels_last,
                           int plane_bits = 5) {
  LaneCut cut{0, unit_bytes + units * channel_bytes, plane_bits};
  int64_t least = 0;
  for (int bits = 0; bits <= 3; ++bits) {
    const int bytes = unit_bytes + (units << bits) * channel_bytes;
    const int64_t images = (1 << plane_bits) >> bits, padded = (n + images - 1) / images * images;
    if (bits > 0 && (bytes > kSharedBytesEverywhere || (!channels_last && padded >= least))) continue;
    least = padded;
    cut = {bits, bytes, plane_bits};
  }
  return cut;
}

// Inputs and outputs share their room.
constexpr LaneCut images_fma_cut(const DirectArgs& args, bool whole_plane, bool channels_last) {
  const int units = lane_units(whole_plane);
  const int in = lane_plane(args.h, args.w), out = lane_plane(args.out_h, args.out_w);
  return lane_cut(args.n, units, 4 * 32 * units * (in > out ? in : out), 4 * lane_plane(args.kernel_h, args.kernel_w),
                  channels_last);
}

// Floats that a lane of images_fma_grad_weight reads at once: where it does so all the time and rows are no whole words of
// four, two, as their planes leave room for more blocks.
constexpr int lane_grad_weight_granule(bool whole_plane, int64_t width, int64_t out_width) {
  return whole_plane || (width % 4 == 0 && out_width % 4 == 0) ? 4 : 2;
}

// images_fma_grad_weight of whole planes: floats from tap to tap of the lanes' sums; an odd multiple of 16 bytes. The
// sums of a kernel row at least have room where the planes were.
constexpr int kLaneTapPitch = 36;
constexpr bool lane_sums_fit(int taps, int h, int w, int out_h, int out_w) {
  return taps * kLaneTapPitch <= 32 * (lane_plane(h, w) + lane_plane(out_h, out_w));
}

// Both planes of every lane, and a float for every thread, at most. `args`: a Problem or GradWeightArgs.
template <class Args>
constexpr LaneCut images_fma_grad_weight_cut(const Args& args, bool whole_plane, bool channels_last) {
  const int units = lane_units(whole_plane), granule = lane_grad_weight_granule(whole_plane, args.w, args.out_w);
  const int plane_bits = takes_half_lanes(whole_plane, args.w, args.out_w) ? 4 : 5;
  const int planes = lane_plane(static_cast<int>(args.h), static_cast<int>(args.w), granule) +
                     lane_plane(static_cast<int>(args.out_h), static_cast<int>(args.out_w), granule);
  return lane_cut(args.n, units, 4 * units * ((planes << plane_bits) + 32 * kLaneGradWeightWarps), 0, channels_last,
                  plane_bits);
}

}  // namespace depthwise
