// Grad of weight and bias, channels_last, by whole rows of images.
//
// Serves  kernels whose sums fit registers, strides 1 and 2 not above the kernel's size, any padding; fp16, bf16; aligned
//         tensors of a multiple of eight channels, multiplier 1; rows of which two bands fit shared memory.
// Owns    a block: all channels, or as many as fit, and a run of bands, image after image, each kRows rows of grad_output.
//         A thread: all taps of kVector channels in fp32 registers, of a tile of kRows rows and four columns of every
//         band; neighbouring threads take neighbouring channels. So a block reads whole rows, which memory likes (3x3 at
//         stride 2, 32x96x112x112, bf16, H200: 40.1 us; half of the channels a block 47.7, a quarter 49.1).
// Memory  rings in shared memory, filled asynchronously up to three bands ahead: rows of input, of which the next band meets
//         the last ones too, and bands of grad_output. The columns of the padding are zeros from the beginning; its rows
//         are left out. Of 227 KB on an H100, 144x56x56 takes 193 KB, one band ahead.
// Reduces the block's threads in order through shared memory, then the splits in order (grad_weight.cu). No atomics.
// Zeros   times infinity would poison a sum: a block whose sums are not all finite takes them again, pair by pair.
// Chosen  select_grad_weight.h.
#pragma once

#include "grad_weight_march.cuh"
#include "grad_weight_rows_tiling.h"

namespace depthwise {

template <class T_, int kKernelH_, int kKernelW_, int kStrideH_, int kStrideW_, int kDilationH_, int kDilationW_,
          int kRows_>
struct GradWeightRowsTraits : NhwcTraits<T_, kKernelH_, kKernelW_, kStrideH_, kStrideW_, kDilationH_, kDilationW_> {
  static_assert(kDilationH_ == 1 && kDilationW_ == 1 && kKernelH_ >= kStrideH_ && kKernelW_ >= kStrideW_);
  static constexpr GradWeightRowsShape kShape =
      grad_weight_rows_shape(kKernelH_, kKernelW_, kStrideH_, kStrideW_, kRows_);
  static constexpr int kTaps = kKernelH_ * kKernelW_, kColumns = kGradWeightRowsColumns, kRows = kRows_;
  static constexpr int kVector = kShape.vector, kWindowRows = kShape.window_rows, kWindow = kShape.window_columns;
  static constexpr int kNewRows = kRows * kStrideH_;  // of input, of a band that follows another
  static constexpr uint64_t kUsed = window_mask(kColumns, kStrideW_, kKernelW_, 1);
};

template <class T, int kVector>
__device__ __forceinline__ void load_pixel(float (&to)[kVector], const T* from) {
  const auto pixel = *reinterpret_cast<const Vector<T, kVector>*>(from);
#pragma unroll
  for (int e = 0; e < kVector; ++e) to[e] = to_float(pixel.value[e]);
}

// A thread's share of the copies of one tensor's rows: eight channels of pixels a constant step apart.
template <class T>
struct RowCopier {
  const T* next;  // its first pixel of the next row
  int place;      // where that goes in the first row of shared memory; elements
  int count;      // pixels of a row

  // Rows [first, first + rows) of an image of `height` rows, to places from row `slot` of `slots` on. `step`: pixels.
  __device__ __forceinline__ void copy(CachePolicy policy, const CopyTarget<T>& target, int rows, int first, int height,
                                       int pitch, int step, int slot, int slots, int slot_pitch, int place_step) {
#pragma unroll 1
    for (int row = first; row < first + rows; ++row) {
      if (static_cast<unsigned>(row) < static_cast<unsigned>(height)) {
        const T* from = next;
        int to = place + slot * slot_pitch;
#pragma unroll 1
        for (int k = count; k > 0; --k) {
          policy.template copy_async<16>(target, ptx::opaque(to), from, true);
          from += step;
          to += place_step;
        }
      }
      next += pitch;
      slot = slot + 1 == slots ? 0 : slot + 1;
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(kGradWeightRowsThreads, 1)
    grad_weight_rows_nhwc_kernel(const GradWeightArgs args, const __grid_constant__ GradWeightRowsTiling tiling) {
  using T = typename Traits::T;
  constexpr int kTaps = Traits::kTaps, kVector = Traits::kVector, kRows = Traits::kRows, kColumns = Traits::kColumns;
  constexpr int kStrideH = Traits::kStrideH, kStrideW = Traits::kStrideW, kWindow = Traits::kWindow;
  constexpr int kNewRows = Traits::kNewRows, kWindowRows = Traits::kWindowRows;
  constexpr int kEight = 8;  // channels a copy

  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int thread = threadIdx.x, out_c = static_cast<int>(args.out_c);
  const int first_channel = blockIdx.x * tiling.lanes * kVector;
  const int split = blockIdx.y, share = tiling.units / args.splits, more = tiling.units % args.splits;
  const int begin = split * share + min(split, more), end = begin + share + (split < more ? 1 : 0);
  const int in_row = tiling.in_columns * tiling.pixel, grad_row = tiling.grad_columns * tiling.pixel;
  T* const input_ring = reinterpret_cast<T*>(shared_memory);
  T* const grad_ring = input_ring + tiling.ring_rows * in_row;
  const int stages = tiling.ahead + 1;  // of grad_output

  // Copying. Threads that own no tile copy nothing: as many pixels at once as there are lanes of tiles for eight channels.
  const int eights = tiling.lanes * kVector / kEight, at_once = tiling.lanes * tiling.tiles_w / eights;
  const int copy_column = thread / eights, copy_channel = (thread - copy_column * eights) * kEight;
  const int in_columns = max(0, min(args.w, tiling.in_columns - args.padding_w));
  const auto copies_of = [&](int columns) {
    const bool copies = copy_column < min(at_once, columns) && first_channel + copy_channel < out_c;
    return ptx::opaque(copies ? (columns - copy_column - 1) / at_once + 1 : 0);
  };
  const CachePolicy policy(args);
  const auto target = policy.target(input_ring);
  RowCopier<T> input{nullptr, ptx::opaque((copy_column + args.padding_w) * tiling.pixel + copy_channel),
                     copies_of(in_columns)};
  RowCopier<T> grad_output{nullptr, ptx::opaque(tiling.ring_rows * in_row + copy_column * tiling.pixel + copy_channel),
                           copies_of(args.out_w)};
  const int step = at_once * out_c, place_step = at_once * tiling.pixel;
  int next_unit = begin, next_image = begin / tiling.bands, next_band = begin - next_image * tiling.bands;
  int next_slot = 0, next_stage = 0;
  const auto request = [&] {
    if (next_unit < end) {
      const bool is_first = next_band == 0 || next_unit == begin;
      const int new_rows = is_first ? kWindowRows : kNewRows, first_row = next_band * kRows;
      const int first_new = first_row * kStrideH - args.padding_h + kWindowRows - new_rows;
      if (is_first) {
        const int64_t in_pixel = (static_cast<int64_t>(next_image) * args.h + first_new) * args.w + copy_column;
        const int64_t grad_pixel =
            (static_cast<int64_t>(next_image) * args.out_h + first_row) * args.out_w + copy_column;
        const int channel = first_channel + copy_channel;
        input.next = static_cast<const T*>(args.input) + in_pixel * out_c + channel;
        grad_output.next = static_cast<const T*>(args.grad_output) + grad_pixel * out_c + channel;
      }
      input.copy(policy, target, new_rows, first_new, args.h, args.w * out_c, step, next_slot, tiling.ring_rows, in_row,
                 place_step);
      grad_output.copy(policy, target, kRows, first_row, args.out_h, args.out_w * out_c, step, next_stage * kRows,
                       stages * kRows, grad_row, place_step);
      next_slot += new_rows;
      if (next_slot >= tiling.ring_rows) next_slot -= tiling.ring_rows;
      next_stage = next_stage + 1 == stages ? 0 : next_stage + 1;
      if (++next_band == tiling.bands) next_band = 0, ++next_image;
      ++next_unit;
    }
    commit_copies();
  };
  for (int k = 0; k < tiling.ahead; ++k) request();

  // The columns of the padding, and those beyond the last of the tiles.
  const auto clear_columns = [&](T* rows, int count, int columns, int first, int last) {
    if (first >= last || copy_column >= at_once) return;
    for (int row = copy_column; row < count; row += at_once)
      for (int column = first; column < last; ++column)
        *reinterpret_cast<uint4*>(rows + (row * columns + column) * tiling.pixel + copy_channel) = uint4{};
  };
  clear_columns(input_ring, tiling.ring_rows, tiling.in_columns, 0, min(args.padding_w, tiling.in_columns));
  clear_columns(input_ring, tiling.ring_rows, tiling.in_columns, args.padding_w + in_columns, tiling.in_columns);
  clear_columns(grad_ring, stages * kRows, tiling.grad_columns, args.out_w, tiling.grad_columns);

  // The last warp may have threads to spare.
  const int tile = thread / tiling.lanes, lane = thread - tile * tiling.lanes;
  const bool has_tile = tile < tiling.tiles_w;
  const int input_corner = ptx::opaque(tile * kColumns * kStrideW * tiling.pixel + lane * kVector);
  const int grad_corner = ptx::opaque(tile * kColumns * tiling.pixel + lane * kVector);
  const bool wants_bias = args.partial_bias != nullptr || args.grad_bias != nullptr;
  float sum[kTaps][kVector] = {}, bias[kVector] = {};
  const auto compute = [&](int band, int slot, int stage) {
    const int first_row = band * kRows, rows = min(kRows, args.out_h - first_row);
    const int first = first_row * kStrideH - args.padding_h;
    const int last = min(args.h, first + (rows - 1) * kStrideH + Traits::kKernelH);
    float grad[kRows][kColumns][kVector];
#pragma unroll
    for (int r = 0; r < kWindowRows; ++r) {
      if (r % kStrideH == 0 && r / kStrideH < kRows) {
        const int g = min_int(r / kStrideH, kRows - 1);
        if (g < rows) {
          const T* from = grad_ring + grad_corner + (stage * kRows + g) * grad_row;
#pragma unroll
          for (int v = 0; v < kColumns; ++v, from += tiling.pixel) load_pixel(grad[g][v], from);
          if (wants_bias) {
#pragma unroll
            for (int e = 0; e < kVector; ++e)
              bias[e] += (grad[g][0][e] + grad[g][1][e]) + (grad[g][2][e] + grad[g][3][e]);
          }
        } else {
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
#pragma unroll
            for (int e = 0; e < kVector; ++e) grad[g][v][e] = 0;
        }
      }
      if (first + r >= 0 && first + r < last) {
        float window[kWindow][kVector];
        const T* from = input_ring + input_corner + slot * in_row;
#pragma unroll
        for (int w = 0; w < kWindow; ++w, from += tiling.pixel)
          if (Traits::kUsed >> w & 1) load_pixel(window[w], from);
#pragma unroll
        for (int g = 0; g < kRows; ++g) {
          const int i = r - g * kStrideH;
          if (i < 0 || i >= Traits::kKernelH) continue;
#pragma unroll
          for (int j = 0; j < Traits::kKernelW; ++j)
#pragma unroll
            for (int e = 0; e < kVector; ++e)
#pragma unroll
              for (int v = 0; v < kColumns; ++v)
                sum[i * Traits::kKernelW + j][e] =
                    fmaf(grad[g][v][e], window[v * kStrideW + j][e], sum[i * Traits::kKernelW + j][e]);
        }
      }
      slot = slot + 1 == tiling.ring_rows ? 0 : slot + 1;
    }
  };

  int band = begin - begin / tiling.bands * tiling.bands, slot = 0, stage = 0;
#pragma unroll 1
  for (int unit = begin; unit < end; ++unit) {
    wait_for_stage(tiling.ahead);
    __syncthreads();  // and all are done with the band before, whose place the next request takes
    request();
    if (has_tile) compute(band, slot, stage);
    stage = stage + 1 == stages ? 0 : stage + 1;
    band = band + 1 == tiling.bands ? 0 : band + 1;
    slot += band == 0 ? kWindowRows : kNewRows;
    if (slot >= tiling.ring_rows) slot -= tiling.ring_rows;
  }

  let_second_pass_begin();

  // Adds what the block's threads leave in shared memory, and stores it: neighbouring threads take neighbouring taps.
  float* const shared = reinterpret_cast<float*>(shared_memory);
  const int pitch = tiling.threads + 1;
  __syncthreads();
#pragma unroll
  for (int tap = 0; tap <= kTaps; ++tap)
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      shared[(tap * kVector + e) * pitch + thread] = tap < kTaps ? sum[min_int(tap, kTaps - 1)][e] : bias[e];
  __syncthreads();
  const int count = min(tiling.lanes * kVector, out_c - first_channel) * (kTaps + 1);
  bool finite = true;
  for (int k = thread; k < count; k += tiling.threads) {
    const int channel = k / (kTaps + 1), tap = k % (kTaps + 1);
    const float* const of_lane = shared + (tap * kVector + channel % kVector) * pitch + channel / kVector;
    float total = of_lane[0];
#pragma unroll 4
    for (int t = 1; t < tiling.tiles_w; ++t) total += of_lane[t * tiling.lanes];
    store_sum<Traits>(args, split, first_channel + channel, tap, total);
    finite = finite && isfinite(total);
  }
  if (__syncthreads_and(finite)) return;

  for (int k = thread; k < count; k += tiling.threads) {
    const int channel = first_channel + k / (kTaps + 1), tap = k % (kTaps + 1);
    if (tap == kTaps) continue;
    float total = 0;
    for (int unit = begin; unit < end; ++unit) {
      const int image = unit / tiling.bands, first_row = unit % tiling.bands * kRows;
      const T* const grad = static_cast<const T*>(args.grad_output) +
                            static_cast<int64_t>(image) * args.out_h * args.out_w * out_c + channel;
      const T* const from =
          static_cast<const T*>(args.input) + static_cast<int64_t>(image) * args.h * args.w * out_c + channel;
      for (int column = 0; column < args.out_w; column += kColumns)
        total += sum_of_pairs<Traits>(args, {image, 0, first_row, min(first_row + kRows, args.out_h), column}, tap,
                                      grad, from, out_c);
    }
    store_sum<Traits>(args, split, channel, tap, total);
  }
}

template <class Traits>
int launch_grad_weight_rows_nhwc(const GradWeightArgs& args, int, cudaStream_t stream) {
  const DeviceLimits& device = device_limits();
  const GradWeightRowsTiling tiling =
      grad_weight_rows_tiling(Traits::kShape, args.n, static_cast<int>(args.out_c), args.out_h, args.out_w,
                              device.shared_bytes, device.shared_bytes_block);
  const auto kernel = grad_weight_rows_nhwc_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, tiling.bytes)) return error;
  kernel<<<dim3(tiling.groups, args.splits), tiling.threads, tiling.bytes, stream>>>(args, tiling);
  return cudaGetLastError();
}

}  // namespace depthwise
