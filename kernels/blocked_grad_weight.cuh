// Grad of weight and bias by blocked multiply-adds, both layouts.
//
// Serves  fp32, and fp16 and bf16 where the tensor cores do not; stride 1, dilation 1, kernels up to 64x64, any padding
//         below the kernel's size, any image size, alignment and depth multiplier.
// Owns    a block: one channel and a share of the stages (a stage: some images, or a band of rows and a tile of columns
//         of one). A thread: kRows x kColumns taps, summed over strips of four columns of grad_output, which it marches
//         down: a step reads a window of one input row and the next row of the strip, and the kRows rows of the strip
//         met last are kept in registers: kRows * kColumns * 4 multiply-adds for (kColumns + 8) / 4 loads of 16 bytes.
//         Threads are laid out kernel rows slowest, those as far from the middle side by side, so that warps skip the
//         steps whose input row is padding. The threads' sums are added in a fixed order, and the splits by
//         add_splits_kernel: no atomics.
// Memory  a stage's input and gradient as fp32, and zeros around them, or two stages', of which one is loaded meanwhile:
//         as much as a multiprocessor has for each of the blocks that its registers hold: three, or four of few taps (see
//         blocked_grad_weight_tiling.h).
// Zeros   times infinity would poison a sum: a block whose sums are not all finite takes them again, term by term.
// Chosen  select.h.
#pragma once

#include "blocked_grad_weight_tiling.h"
#include "direct.cuh"
#include "exact_grad_weight.cuh"
#include "rectangle.cuh"

namespace depthwise {

template <class T_, int kRows_, int kColumns_>
struct BlockedGradWeightTraits {
  using T = T_;
  static constexpr int kRows = kRows_, kColumns = kColumns_;  // taps of a thread
  static constexpr int kVector = kColumns % 4 == 0 ? 4 : 2;   // floats of the window a load
  static constexpr int kWindow = (kColumns + kStrip - 1 + kVector - 1) / kVector * kVector;
  static_assert(kColumns % 2 == 0);
  // Terms are added up in parts before they join the sums: a long running sum loses bits with every term, and equal
  // terms would round the same way every time (32x128x56x56, 31x31: a thread's sum has 1568 terms). Where multiply-adds
  // are all that counts, as for the large tiles, parts are as long as the sums of them. 16-bit results hide it.
  static constexpr bool kSumsParts = sizeof(T) == 4;
  static constexpr bool kIsLarge = kRows * kColumns > 20;
  static constexpr int kPartTerms = 64;
  static constexpr int kPartRounds = kIsLarge ? max_int(1, kPartTerms / kStrip / kRows) : 1;  // of kRows rows
  static constexpr int kPartRows = kIsLarge || kRows <= 3 ? kRows : (kRows + 1) / 2;          // of a round
  static constexpr BlockedGradWeightShape kShape = blocked_grad_weight_shape(kRows, kColumns, kSumsParts);
  static constexpr int kThreads = kShape.threads, kBlocks = kShape.blocks;
};

// How a launch is cut.
struct BlockedGradWeightTiling : BlockedGradWeightCut {
  bool channels_last;
  bool grad_vectors;  // rows of grad_output are whole words of four columns

  // Kernel rows are dealt to threads from both ends: those as far from the middle meet as many rows of the image.
  __device__ int tile_of(int place) const {
    return place >= tiles_h ? place : place % 2 == 0 ? place / 2 : tiles_h - 1 - place / 2;
  }
  __device__ int place_of(int tile_h) const {
    return 2 * tile_h < tiles_h ? 2 * tile_h : 2 * (tiles_h - 1 - tile_h) + 1;
  }
};

// What a stage holds: `rows` rows from first_row on of some images' grad_output, its columns from first_column on, and the
// input rows that these meet.
struct BlockedGradWeightStage {
  int64_t first_image;
  int images, first_row, rows, first_column, first_input_row, input_rows;

  __device__ __forceinline__ BlockedGradWeightStage(const GradWeightArgs& args, const BlockedGradWeightTiling& tiling,
                                                    int idx) {
    const int rest = idx / tiling.num_column_tiles;
    first_image = static_cast<int64_t>(rest / tiling.num_bands) * tiling.images;
    images = static_cast<int>(min(static_cast<int64_t>(tiling.images), args.n - first_image));
    first_row = rest % tiling.num_bands * tiling.band_rows;
    rows = min(tiling.band_rows, args.out_h - first_row);
    first_column = idx % tiling.num_column_tiles * tiling.tile_columns;
    first_input_row = max(0, first_row - args.padding_h);
    const int last_input_row = min(args.h, first_row + rows + args.kernel_h - 1 - args.padding_h);
    input_rows = max(0, last_input_row - first_input_row);
  }
};

// kVector columns at a time, as fp32. `column_stride`: elements from column to column.
template <int kVector, class T>
__device__ __forceinline__ void copy_as_float(const Rectangle<float, T>& r, int64_t column_stride) {
  const T* const corner = r.global + r.first_row * r.row_stride + (r.first_column + r.low) * column_stride;
  float* const shared = r.shared + r.low;
  if (r.rows <= 0 || r.high <= r.low) return;
#pragma unroll 4
  for (Walk at(threadIdx.x, blockDim.x, divide_up(r.high - r.low, kVector), r.rows); at.outer < r.images;
       at.advance()) {
    const int column = at.inner * kVector;
    const bool valid = static_cast<unsigned>(r.first_row + at.middle) < static_cast<unsigned>(r.height) &&
                       static_cast<unsigned>(r.first_column + r.low + column) < static_cast<unsigned>(r.width);
    const T* const from =
        valid ? corner + at.outer * r.image_stride + at.middle * r.row_stride + column * column_stride : r.global;
    float* const to = shared + at.outer * r.image_pitch + at.middle * r.pitch + column;
    if constexpr (sizeof(T) == 4)
      copy_async<4 * kVector>(to, from, valid);
    else
      *to = to_float(load_or_zero<1>(from, valid).value[0]);
  }
}

template <int kCount>
__device__ __forceinline__ void load_strip(float (&strip)[kCount], const float* shared) {
#pragma unroll
  for (int k = 0; k < kCount; k += 4) {
    const float4 four = *reinterpret_cast<const float4*>(shared + k);
    strip[k] = four.x, strip[k + 1] = four.y, strip[k + 2] = four.z, strip[k + 3] = four.w;
  }
}

// The sum of every step-th value, in four parts: equal values would round the same way every time.
__device__ __forceinline__ float sum_every(const float* values, int step, int count) {
  float part[4] = {};
#pragma unroll 1
  for (int k = 0; k < count; k += 4)
#pragma unroll
    for (int p = 0; p < 4; ++p)
      if (k + p < count) part[p] += values[(k + p) * step];
  return part[0] + part[1] + (part[2] + part[3]);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    blocked_grad_weight_kernel(const GradWeightArgs args, const BlockedGradWeightTiling tiling,
                               const int shared_bytes) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns;
  const int taps = args.kernel_h * args.kernel_w;

  extern __shared__ __align__(16) unsigned char shared_memory[];
  for (int k = threadIdx.x; k < shared_bytes / 16; k += blockDim.x)
    reinterpret_cast<uint4*>(shared_memory)[k] = uint4{};
  __syncthreads();
  float* const buffers = reinterpret_cast<float*>(shared_memory);
  const int stage_elements = tiling.stage_elements(kRows), ahead = tiling.buffers - 1;
  const int input_pitch = tiling.input_pitch, grad_pitch = tiling.tile_columns;
  const int grad_image = (tiling.band_rows + kRows - 1) * grad_pitch;

  const int64_t channel = blockIdx.x;
  const int begin = static_cast<int>(static_cast<int64_t>(tiling.stages) * blockIdx.y / args.splits);
  const int end = static_cast<int>(static_cast<int64_t>(tiling.stages) * (blockIdx.y + 1) / args.splits);
  // Warps take turns from block to block: those of other kernel rows have other amounts of work.
  const unsigned turn = (blockIdx.x + blockIdx.y) % (blockDim.x / 32) * 32;
  const int worker = static_cast<int>((threadIdx.x + turn) % blockDim.x);
  const int tile_w = worker % tiling.tiles_w, group = worker / tiling.tiles_w % tiling.groups;
  const int tile_h = tiling.tile_of(worker / tiling.tiles_w / tiling.groups);
  const int strips = tiling.tile_columns / kStrip;
  const bool one_column_tile = tiling.num_column_tiles == 1;

  float sum[kRows][kColumns] = {};
  float bias = 0.f;
#pragma unroll 1
  for (int next = begin; next < end + ahead; ++next) {
    if (next < end) {  // load it, while the one before is multiplied
      const BlockedGradWeightStage stage(args, tiling, next);
      float* const shared_input = buffers + (ahead != 0 && (next - begin) % 2 != 0 ? stage_elements : 0);
      float* const shared_grad = shared_input + tiling.input_elements();
      const int64_t in_c = args.out_c / args.multiplier;
      const int64_t in_step = tiling.channels_last ? in_c : 1, grad_step = tiling.channels_last ? args.out_c : 1;
      const int64_t in_plane = tiling.channels_last ? 1 : static_cast<int64_t>(args.h) * args.w;
      const int64_t grad_plane = tiling.channels_last ? 1 : static_cast<int64_t>(args.out_h) * args.out_w;
      const int64_t in_image = in_c * args.h * args.w, out_image = args.out_c * args.out_h * args.out_w;
      Rectangle<float, T> in, out;
      in.shared = shared_input;
      in.pitch = input_pitch;
      in.image_pitch = tiling.input_rows * input_pitch;
      in.global =
          static_cast<const T*>(args.input) + stage.first_image * in_image + channel / args.multiplier * in_plane;
      in.image_stride = in_image;
      in.row_stride = args.w * in_step;
      in.images = stage.images;
      in.rows = stage.input_rows;
      in.first_row = stage.first_input_row;
      in.height = args.h;
      in.first_column = stage.first_column - args.padding_w;
      in.width = args.w;
      in.low = one_column_tile ? args.padding_w : 0;
      in.high = one_column_tile ? min(args.w + args.padding_w, input_pitch) : input_pitch;
      copy_as_float<1>(in, in_step);
      out.shared = shared_grad + (kRows - 1) * grad_pitch;
      out.pitch = grad_pitch;
      out.image_pitch = grad_image;
      out.global = static_cast<const T*>(args.grad_output) + stage.first_image * out_image + channel * grad_plane;
      out.image_stride = out_image;
      out.row_stride = args.out_w * grad_step;
      out.images = stage.images;
      out.rows = tiling.band_rows;  // zeros below a band that is cut short
      out.first_row = stage.first_row;
      out.height = stage.first_row + stage.rows;
      out.first_column = stage.first_column;
      out.width = args.out_w;
      out.low = 0;
      out.high = one_column_tile ? args.out_w : grad_pitch;
      if constexpr (sizeof(T) == 4) {
        if (tiling.grad_vectors)
          copy_as_float<kStrip>(out, grad_step);
        else
          copy_as_float<1>(out, grad_step);
      } else {
        copy_as_float<1>(out, grad_step);
      }
    }
    commit_copies();
    const int idx = next - ahead;
    if (idx < begin) continue;
    if (ahead == 0)
      wait_for_copies<0>();
    else
      wait_for_copies<1>();
    __syncthreads();
    const BlockedGradWeightStage stage(args, tiling, idx);
    const float* const shared_input = buffers + (ahead != 0 && (idx - begin) % 2 != 0 ? stage_elements : 0);
    const float* const shared_grad = shared_input + tiling.input_elements();

    if (args.partial_bias != nullptr || args.grad_bias != nullptr)
      bias +=
          sum_every(shared_grad + (kRows - 1) * grad_pitch + threadIdx.x, blockDim.x,
                    divide_up(stage.images * grad_image - static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)));

    // Step s multiplies input row first_row + s + tile_h * kRows - padding_h by the rows s, s - 1, ... of the strip.
    const int input_shift = stage.first_row + tile_h * kRows - args.padding_h - stage.first_input_row;
    const int first_step = max(0, -input_shift),
              last_step = min(stage.rows + kRows - 1, stage.input_rows - input_shift);
    const auto march = [&](const float* input, const float* grad, int steps) {
      float strip[kRows][kStrip];  // row s in strip[s % kRows], steps counted from 0
      float part[kRows][kColumns] = {};
#pragma unroll
      for (int r = 1; r < kRows; ++r) load_strip(strip[kRows - r], grad - r * grad_pitch);
      const auto take_step = [&](int phase) {
        float window[Traits::kWindow];
#pragma unroll
        for (int k = 0; k < Traits::kWindow; k += Traits::kVector) {
          const auto part = *reinterpret_cast<const Vector<float, Traits::kVector>*>(input + k);
#pragma unroll
          for (int e = 0; e < Traits::kVector; ++e) window[k + e] = part.value[e];
        }
        load_strip(strip[phase], grad);
#pragma unroll
        for (int w = 0; w < kStrip; ++w)
#pragma unroll
          for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
              float& to = Traits::kSumsParts ? part[i][j] : sum[i][j];
              to = fmaf(window[j + w], strip[(phase - i + kRows) % kRows][w], to);
            }
        input += input_pitch;
        grad += grad_pitch;
      };
      const auto add_part = [&] {
        if constexpr (Traits::kSumsParts) {
#pragma unroll
          for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = 0; j < kColumns; ++j) sum[i][j] += part[i][j], part[i][j] = 0.f;
        }
      };
#pragma unroll 1
      for (; steps >= kRows; steps -= kRows) {
#pragma unroll
        for (int phase = 0; phase < kRows; ++phase) {
          take_step(phase);
          if (Traits::kPartRows < kRows && (phase + 1) % Traits::kPartRows == 0) add_part();
        }
        if (steps / kRows % Traits::kPartRounds == 0) add_part();
      }
#pragma unroll
      for (int phase = 0; phase < kRows - 1; ++phase)
        if (phase < steps) take_step(phase);
      add_part();
    };
    if (first_step < last_step && tile_h < tiling.tiles_h)
      for (int unit = group; unit < stage.images * strips; unit += tiling.groups) {
        const int image = unit / strips, column = unit % strips * kStrip;
        march(shared_input + (image * tiling.input_rows + first_step + input_shift) * input_pitch + column +
                  tile_w * kColumns,
              shared_grad + image * grad_image + (kRows - 1 + first_step) * grad_pitch + column,
              last_step - first_step);
      }
    __syncthreads();
  }

  let_second_pass_begin();

  // Add the groups' sums tap by tap.
  float* const sums = reinterpret_cast<float*>(shared_memory);
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sums[(i * kColumns + j) * blockDim.x + worker] = sum[i][j];
  __syncthreads();
  bool finite = true;
  for (int tap = threadIdx.x; tap < taps; tap += blockDim.x) {
    const int i = tap / args.kernel_w, j = tap % args.kernel_w;
    const float* const first = sums + (i % kRows * kColumns + j % kColumns) * blockDim.x +
                               tiling.place_of(i / kRows) * tiling.groups * tiling.tiles_w + j / kColumns;
    const float total = sum_every(first, tiling.tiles_w, tiling.groups);
    finite = finite && is_finite(total);
    store_grad_weight<T>(args, blockIdx.y, channel * taps + tap, args.out_c * taps, total);
  }
  finite = __syncthreads_or(!finite) == 0;
  sums[threadIdx.x] = bias;
  __syncthreads();
  if (threadIdx.x < 32) {
    float total = sum_every(sums + threadIdx.x, 32, static_cast<int>(blockDim.x) / 32);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    if (threadIdx.x == 0) store_grad_bias<T>(args, blockIdx.y, channel, total);
  }
  if (finite) return;

  for (int tap = threadIdx.x; tap < taps; tap += blockDim.x) {
    float total = 0.f;
#pragma unroll 1
    for (int idx = begin; idx < end; ++idx) {
      const BlockedGradWeightStage stage(args, tiling, idx);
      total += exact_grad_weight<T>(
          args, tiling.channels_last, channel, tap / args.kernel_w, tap % args.kernel_w,
          {stage.first_image, stage.first_image + stage.images, stage.first_row, stage.first_row + stage.rows,
           stage.first_column, stage.first_column + tiling.tile_columns});
    }
    store_grad_weight<T>(args, blockIdx.y, channel * taps + tap, args.out_c * taps, total);
  }
}

// Tiles of variants.h's table: NCHW, channels_last.
template <class Traits>
int launch_blocked_grad_weight(const GradWeightArgs& args, int tile, cudaStream_t stream) {
  const DeviceLimits& device = device_limits();
  const int share = Traits::kShape.shared_bytes(device.shared_bytes);
  BlockedGradWeightTiling tiling{blocked_grad_weight_cut(args, Traits::kShape, args.splits, share, tile == 1),
                                 tile == 1};
  tiling.grad_vectors = sizeof(typename Traits::T) == 4 && !tiling.channels_last && args.out_w % kStrip == 0 &&
                        reinterpret_cast<uintptr_t>(args.grad_output) % 16 == 0;
  const int bytes = tiling.shared_bytes(Traits::kShape);
  if (const int error = allow_shared_bytes(blocked_grad_weight_kernel<Traits>, bytes)) return error;
  blocked_grad_weight_kernel<Traits>
      <<<dim3(static_cast<unsigned>(args.out_c), args.splits), tiling.threads(), bytes, stream>>>(args, tiling, bytes);
  return cudaGetLastError();
}

}  // namespace depthwise
