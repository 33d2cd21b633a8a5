// How images_grad_weight brings the planes of a stage into shared memory: [channel][image][row], rows of kColumns
// elements, of which those beyond the width hold anything. From NCHW as they lie, asynchronously where vectors do not
// straddle rows; from channels_last two pixels at a time, put planar on the way.
#pragma once

#include "async_copy.cuh"
#include "direct.cuh"
#include "images_tiling.h"

namespace depthwise {

// One of the two tensors. A unit is what one copy takes: `vector` elements, see copy_planes and transpose_planes.
struct ImagesTensor {
  int64_t image_stride;  // global memory
  int height, width, vector;
  int pitch;    // shared memory: elements from image to image
  int units;    // NCHW: of a block's channels
  int sharing;  // NCHW: images that the threads of a block copy at a time
  SmallDivider by_units, by_plane, by_width, by_height;
};

// Planes of a stage: where one tensor has them in global memory, and where they go.
template <class T>
struct StagePlanes {
  const T* global;  // the block's first channel of the stage's first image
  T* shared;
  int channels, images;  // channels_last: images beyond the last are zeros, up to a multiple of sixteen
};

// Loads to registers under way in a thread, of so many registers each. Before the first stage no sums are held.
template <class Traits, bool kFirst>
constexpr int loads_at_once(int registers) {
  if (Traits::kChannelsLast) return (Traits::kWarps < 16 ? 64 : kFirst ? 32 : 16) / registers;
  return (kFirst ? (Traits::kNarrow ? 32 : 16) : 4) / registers;
}

// NCHW: the block's channels are contiguous. kInRow: vectors stay within a row, and are copied asynchronously.
template <class Traits, bool kFirst, int kVector, bool kInRow>
__device__ __forceinline__ void copy_planes(const StagePlanes<typename Traits::T>& p, const ImagesTensor& tensor) {
  using T = typename Traits::T;
  constexpr int kLanes = kInRow ? 32 : Traits::kCopyLanes, kThreads = Traits::kTensorThreads / 32 * kLanes;
  const int channel_pitch = Traits::kStageImages * tensor.pitch, plane = tensor.height * tensor.width;
  const auto offset_of = [&](int element) {
    const int channel = Traits::kChannels == 1 ? 0 : tensor.by_plane.quotient(element);
    const int rest = element - channel * plane, row = tensor.by_width.quotient(rest);
    return channel * channel_pitch + row * Traits::kColumns + rest - row * tensor.width;
  };
  const int lane = threadIdx.x % 32, thread = threadIdx.x % Traits::kTensorThreads / 32 * kLanes + lane;
  const int first_image = tensor.by_units.quotient(thread);
  if (lane >= kLanes || (first_image > 0 && first_image >= tensor.sharing)) return;
  const int units = p.channels == Traits::kChannels ? tensor.units : p.channels * plane / kVector;
#pragma unroll 1
  for (int unit = thread - first_image * tensor.units; unit < units; unit += kThreads) {
    const T* global = p.global + unit * kVector + first_image * tensor.image_stride;
    T* shared = p.shared + first_image * tensor.pitch;
    const int64_t global_step = tensor.sharing * tensor.image_stride;
    const int shared_step = tensor.sharing * tensor.pitch;
    if constexpr (kInRow) {
      shared += offset_of(unit * kVector);
#pragma unroll 2
      for (int image = first_image; image < p.images; image += tensor.sharing) {
        copy_async<kVector * sizeof(T)>(shared, global);
        global += global_step;
        shared += shared_step;
      }
    } else {
      constexpr int kBatch = loads_at_once<Traits, kFirst>(1);
      T* to[kVector];
#pragma unroll
      for (int k = 0; k < kVector; ++k) to[k] = shared + offset_of(unit * kVector + k);
#pragma unroll 1
      for (int image = first_image; image < p.images; image += kBatch * tensor.sharing) {
        Vector<T, kVector> values[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {  // without conditions: there are more loads than predicates
          values[b] = load_or_zero<kVector>(global, true);
          global += image + (b + 1) * tensor.sharing < p.images ? global_step : 0;
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
#pragma unroll
          for (int k = 0; k < kVector; ++k) {
            if (image + b * tensor.sharing < p.images) *to[k] = values[b].value[k];
            to[k] += shared_step;
          }
      }
    }
  }
}

// `vector`: 8, 4 or 2 elements of a row; -2: two that may straddle rows; 1.
template <class Traits, bool kFirst>
__device__ __forceinline__ void copy_planes(const StagePlanes<typename Traits::T>& p, const ImagesTensor& tensor) {
  switch (tensor.vector) {
    case 8: return copy_planes<Traits, kFirst, 8, true>(p, tensor);
    case 4: return copy_planes<Traits, kFirst, 4, true>(p, tensor);
    case 2: return copy_planes<Traits, kFirst, 2, true>(p, tensor);
    case -2: return copy_planes<Traits, kFirst, 2, false>(p, tensor);
    default: return copy_planes<Traits, kFirst, 1, false>(p, tensor);
  }
}

// Zeros for the images that the last sixteen lack.
template <class Traits>
__device__ __forceinline__ void clear_planes(const StagePlanes<typename Traits::T>& p, const ImagesTensor& tensor) {
  const int missing = (divide_up(p.images, 16) * 16 - p.images) * tensor.pitch / 8;  // in 16 bytes
#pragma unroll 1
  for (int k = threadIdx.x % Traits::kTensorThreads; k < p.channels * missing; k += Traits::kTensorThreads) {
    const int channel = k / missing, image = channel * Traits::kStageImages + p.images;
    reinterpret_cast<uint4*>(p.shared + image * tensor.pitch)[k - channel * missing] = uint4{};
  }
}

// channels_last: two neighbouring pixels of kVector channels, stored as one word into each channel's plane.
template <class Traits, bool kFirst, int kVector>
__device__ __forceinline__ void transpose_planes(const StagePlanes<typename Traits::T>& p, const ImagesTensor& tensor,
                                                 int64_t pixel_stride) {
  using T = typename Traits::T;
  constexpr int kLanes = Traits::kColumns / 2, kStep = Traits::kTensorThreads / kLanes;
  constexpr int kBatch = kVector == 1 ? 1 : loads_at_once<Traits, kFirst>(8);
  const int channel_pitch = Traits::kStageImages * tensor.pitch;
  const int thread = threadIdx.x % Traits::kTensorThreads, column = thread % kLanes * 2;
  const int rows = divide_up(p.images, 16) * 16 * tensor.height;
  // Loads without conditions, as there are more of them than predicates: columns that do not exist hold anything, and
  // images are made zeros afterwards.
  const int first_column = column < tensor.width ? column : 0;
  const int64_t second = column + 1 < tensor.width ? pixel_stride : 0;
#pragma unroll 1
  for (int first = thread / kLanes; first < rows; first += kBatch * kStep) {
    Vector<T, kVector> pixels[kBatch][2];
#pragma unroll 1
    for (int c = 0; c < p.channels; c += kVector) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int idx = first + b * kStep, image = tensor.by_height.quotient(idx), row = idx - image * tensor.height;
        const T* const global = p.global + min(image, p.images - 1) * tensor.image_stride +
                                (row * tensor.width + first_column) * pixel_stride + c;
        pixels[b][0] = load_or_zero<kVector>(global, true);
        pixels[b][1] = load_or_zero<kVector>(global + second, true);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int idx = first + b * kStep, image = tensor.by_height.quotient(idx), row = idx - image * tensor.height;
        const unsigned mask = image < p.images ? ~0u : 0u;
        T* const shared = p.shared + c * channel_pitch + image * tensor.pitch + row * Traits::kColumns + column;
        if (idx < rows) {
#pragma unroll
          for (int k = 0; k < kVector; ++k)
            *reinterpret_cast<unsigned*>(shared + k * channel_pitch) =
                (pixels[b][0].value[k].bits | static_cast<unsigned>(pixels[b][1].value[k].bits) << 16) & mask;
        }
      }
    }
  }
}

template <class Traits, bool kFirst>
__device__ __forceinline__ void transpose_planes(const StagePlanes<typename Traits::T>& p, const ImagesTensor& tensor,
                                                 int64_t pixel_stride) {
  switch (tensor.vector) {
    case 8: return transpose_planes<Traits, kFirst, 8>(p, tensor, pixel_stride);
    case 4: return transpose_planes<Traits, kFirst, 4>(p, tensor, pixel_stride);
    default: return transpose_planes<Traits, kFirst, 1>(p, tensor, pixel_stride);
  }
}

template <class Traits>
ImagesTensor images_tensor(const void* tensor, int64_t all_channels, int channels, int height, int width) {
  int vector;
  if constexpr (Traits::kChannelsLast) {
    vector = channels >= 4 && copy_width(tensor, all_channels, channels) == channels ? channels : 1;
  } else {
    vector = copy_width(tensor, width);
    const bool even = height * width % 2 == 0 || (channels % 2 == 0 && all_channels % 2 == 0);
    if (vector == 1 && even && copy_width(tensor, 2, 2) == 2) vector = -2;
  }
  const int units = channels * height * width / (vector == -2 ? 2 : vector);
  return {all_channels * height * width,
          height,
          width,
          vector,
          images_pitch(height, Traits::kColumns),
          units,
          max_int(1, Traits::kTensorThreads / 32 * (vector == 1 || vector == -2 ? Traits::kCopyLanes : 32) / units),
          SmallDivider(units),
          SmallDivider(height * width),
          SmallDivider(width),
          SmallDivider(height)};
}

}  // namespace depthwise
