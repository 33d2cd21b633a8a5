// Small planes laid out for warps whose lanes are images: fp32, in shared memory.
//
// A unit is 32 planes, one for each lane of a warp, or 16, one for a lane of each half: 1 << channel_bits neighbouring
// channels of as many images as fill the lanes, lane = image << channel_bits | channel. Rows lie lane_pitch apart and
// planes lane_plane apart, so that lanes that read kGranule floats each at the same place of their planes meet no bank
// twice.
#pragma once

#include "async_copy.cuh"
#include "direct.cuh"
#include "images_fma_tiling.h"

namespace depthwise {

// The planes of a block: `units` units of neighbouring channels, of the same images.
struct LaneSlots {
  int units, channel_bits, plane_bits;                       // 1 << plane_bits planes a unit
  int first_image, num_images, first_channel, num_channels;  // num_: of the whole tensor

  // Of the block, as many as exist.
  __device__ __forceinline__ int images() const {
    return min((1 << plane_bits) >> channel_bits, num_images - first_image);
  }
  __device__ __forceinline__ int channels() const { return min(units << channel_bits, num_channels - first_channel); }
  // The place of a plane in shared memory.
  __device__ __forceinline__ int slot(int image, int channel) const {
    return (channel >> channel_bits << plane_bits) + (image << channel_bits) + (channel & ((1 << channel_bits) - 1));
  }
};

// A tensor of planes kWidth wide and at most kMaxHeight high, which is aligned to 16 bytes.
template <int kWidth, int kMaxHeight, int kGranule, bool kChannelsLast>
struct LanePlanes {
  static constexpr int kPitch = lane_pitch(kWidth, kGranule);
  static constexpr int kVector = kChannelsLast || kWidth % 2 != 0 ? 1 : kWidth % 4 != 0 ? 2 : kGranule;

  // visit(pointer to global memory, offset in shared memory) for every kVector elements of all planes.
  template <class Pointer, class Visit>
  static __device__ __forceinline__ void for_each(Pointer tensor, const LaneSlots& slots, int height, Visit visit) {
    const int thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32, warps = blockDim.x / 32;
    const int plane = lane_plane(height, kWidth, kGranule), images = slots.images();
    if constexpr (kChannelsLast) {
      // A warp takes rows of an image, of all channels of a unit.
      constexpr int kFewestImages = 4, kSteps = divide_up(kWidth, kFewestImages);
      const int step = 32 >> slots.channel_bits, first_column = lane >> slots.channel_bits;
      const int64_t column_step = ptx::opaque(static_cast<int64_t>(step) * slots.num_channels);
      const int64_t row_step = ptx::opaque(static_cast<int64_t>(warps) * kWidth * slots.num_channels);
#pragma unroll 1
      for (int unit = 0; unit < slots.units; ++unit) {
        const int channel = (unit << slots.channel_bits) + (lane & ((1 << slots.channel_bits) - 1));
        if (channel >= slots.channels()) continue;
        const int64_t pixel = (static_cast<int64_t>(slots.first_image) * height + warp) * kWidth + first_column;
        Pointer row = tensor + pixel * slots.num_channels + slots.first_channel + channel;
        int image = 0, y = warp;
        while (y >= height) y -= height, ++image;
#pragma unroll 1
        while (image < images) {
          Pointer at = row;
          const int offset = slots.slot(image, channel) * plane + y * kPitch + first_column;
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
            if (first_column + k * step < kWidth) visit(at, offset + k * step);
            at = ptx::opaque(at + column_step);
          }
          row = ptx::opaque(row + row_step);
          y += warps;
          while (y >= height) y -= height, ++image;
        }
      }
    } else {
      // A warp takes whole planes.
      constexpr int kVectors = kWidth / kVector, kSteps = divide_up(kMaxHeight * kVectors, 32);
      constexpr int kPlanesAtOnce = kSteps <= 2 ? 4 : 2;
      const int vectors = height * kVectors;
      int offset[kSteps];  // of this lane's vectors
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const int vector = lane + 32 * k;
        offset[k] = vector / kVectors * kPitch + vector % kVectors * kVector;
      }
      const int64_t image_elements = static_cast<int64_t>(slots.num_channels) * (height * kWidth);
      const int64_t step = ptx::opaque(warps * image_elements);
      const unsigned shared_step = ptx::opaque(static_cast<unsigned>((warps << slots.channel_bits) * plane));
#pragma unroll 1
      for (int channel = 0; channel < slots.channels(); ++channel) {
        Pointer at = tensor + (slots.first_image + warp) * image_elements +
                     static_cast<int64_t>(slots.first_channel + channel) * (height * kWidth) + lane * kVector;
        unsigned first = slots.slot(warp, channel) * plane;
        const auto visit_plane = [&] {
#pragma unroll
          for (int k = 0; k < kSteps; ++k)
            if (lane + 32 * k < vectors) visit(at + 32 * k * kVector, static_cast<int>(first) + offset[k]);
          at = ptx::opaque(at + step);
          first = ptx::opaque(first + shared_step);
        };
        int image = warp;
#pragma unroll 1
        for (; image + (kPlanesAtOnce - 1) * warps < images; image += kPlanesAtOnce * warps)
#pragma unroll
          for (int k = 0; k < kPlanesAtOnce; ++k) visit_plane();
#pragma unroll 1
        for (; image < images; image += warps) visit_plane();
      }
    }
  }

  // To be waited for with wait_for_all_copies. Planes that do not exist are left alone.
  static __device__ __forceinline__ void load(float* shared, const void* tensor, const LaneSlots& slots, int height) {
    const CopyTarget<float> target(shared);
    for_each(static_cast<const float*>(tensor), slots, height,
             [&](const float* from, int offset) { target.template copy_async<4 * kVector>(offset, from); });
  }

  // Zeros for the planes that do not exist.
  static __device__ __forceinline__ void clear_missing(float* shared, const LaneSlots& slots, int height) {
    if (slots.images() == (1 << slots.plane_bits) >> slots.channel_bits &&
        slots.channels() == slots.units << slots.channel_bits)
      return;
    const int plane = lane_plane(height, kWidth, kGranule), images = slots.images(), channels = slots.channels();
    for (int slot = threadIdx.x / 32; slot < slots.units << slots.plane_bits; slot += blockDim.x / 32) {
      const int image = (slot & ((1 << slots.plane_bits) - 1)) >> slots.channel_bits;
      const int channel = (slot >> slots.plane_bits << slots.channel_bits) + (slot & ((1 << slots.channel_bits) - 1));
      if (image >= images || channel >= channels)
        for (int k = threadIdx.x % 32; k < plane; k += 32) shared[slot * plane + k] = 0.f;
    }
  }

  static __device__ __forceinline__ void store(void* tensor, const float* shared, const LaneSlots& slots, int height) {
    for_each(static_cast<float*>(tensor), slots, height, [&](float* to, int offset) {
      const Vector<float, kVector> values = *reinterpret_cast<const Vector<float, kVector>*>(shared + offset);
      store_streaming<kVector>(to, values.value);
    });
  }
};

// How many blocks of `threads` threads of `registers` registers a multiprocessor holds: each of its four parts has 16384
// registers.
constexpr int lane_blocks(int threads, int registers) { return max_int(1, 512 / registers * 128 / threads); }

// A row of a lane's plane, kGranule floats at once, of which the last may lie beyond it.
template <int kGranule, int kWidth>
__device__ __forceinline__ void load_lane_row(float (&row)[kWidth], const float* from) {
#pragma unroll
  for (int k = 0; k < kWidth; k += kGranule) {
    VectorWord<float, kGranule> bits;
    bits.word = *reinterpret_cast<const decltype(bits.word)*>(from + k);
#pragma unroll
    for (int e = 0; e < kGranule; ++e)
      if (k + e < kWidth) row[k + e] = bits.vector.value[e];
  }
}

template <int kWidth>
__device__ __forceinline__ void store_lane_row(float* to, const float (&row)[kWidth]) {
#pragma unroll
  for (int k = 0; k < kWidth; k += 4)
    *reinterpret_cast<float4*>(to + k) =
        make_float4(row[k], k + 1 < kWidth ? row[k + 1] : 0.f, k + 2 < kWidth ? row[k + 2] : 0.f,
                    k + 3 < kWidth ? row[k + 3] : 0.f);
}

}  // namespace depthwise
