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
// Memory  a stage's input and gradient as fp32, and zeros around them: as much as a multiprocessor has for each of the
//         blocks that its registers hold (see blocked_grad_weight_tiling.h).
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
  static_assert(kColumns % 4 == 0);
  // Terms are added up in parts before they join the sums: a long running sum loses bits with every term, and equal
  // terms would round the same way every time (32x128x56x56, 31x31: a thread's sum has 1568 terms). Where multiply-adds
  // are all that counts, as for the large tiles, parts are as long as the sums of them. 16-bit results hide it.
  static constexpr bool kSumsParts = sizeof(T) == 4;
  static constexpr bool kIsLarge = kRows * kColumns > 20;
  static constexpr int kPartTerms = 64;
  static constexpr int kPartRounds = kIsLarge ? max_int(1, kPartTerms / kStrip / kRows) : 1;  // of kRows rows
  static constexpr int kPartRows = kIsLarge || kRows <= 3 ? kRows : (kRows + 1) / 2;          // of a round
  // A thread's registers are its sums, those of a part, and the rows of a strip.
  static constexpr bool kIsRoomy = kSumsParts && kRows * kColumns > kBlockedFewTaps;
  static constexpr BlockedGradWeightShape kShape = blocked_grad_weight_shape(kRows, kColumns, kIsRoomy);
  static constexpr int kThreads = kShape.threads, kBlocks = kShape.blocks;
};

// How a launch is cut.
struct BlockedGradWeightTiling : BlockedGradWeightCut {
  bool channels_last;
  int input_lanes, grad_lanes;  // threads that copy a row
  bool grad_vectors;            // rows of grad_output are whole words of four columns

  // Kernel rows are dealt to threads from both ends: those as far from the middle meet as many rows of the image.
  __device__ int tile_of(int place) const {
    return place >= tiles_h ? place : place % 2 == 0 ? place / 2 : tiles_h - 1 - place / 2;
  }
  __device__ int place_of(int tile_h) const {
    return 2 * tile_h < tiles_h ? 2 * tile_h : 2 * (tiles_h - 1 - tile_h) + 1;
  }
};

// kVector columns a copy; `column_stride`: elements from column to column. From row to row, all is added to.
template <int kVector>
__device__ __forceinline__ void copy_rows(const Rectangle<float, float>& r, int lanes, int64_t column_stride) {
  const int first = r.low + static_cast<int>(threadIdx.x % lanes) * kVector, columns = lanes * kVector;
  const int rows = blockDim.x / lanes;  // at once
  if (r.rows <= 0) return;
  int image = 0, row = threadIdx.x / lanes;
  const float* global = r.global + (r.first_row + row) * r.row_stride + (r.first_column + first) * column_stride;
  float* shared = r.shared + row * r.pitch + first;
  const int64_t next_rows = rows * r.row_stride, next_columns = columns * column_stride;
  const int64_t next_image = r.image_stride - r.rows * r.row_stride;
  const int shared_rows = rows * r.pitch, shared_image = r.image_pitch - r.rows * r.pitch;
#pragma unroll 1
  while (true) {
    while (row >= r.rows) row -= r.rows, ++image, global += next_image, shared += shared_image;
    if (image >= r.images) return;
    const bool in_bounds = static_cast<unsigned>(r.first_row + row) < static_cast<unsigned>(r.height);
    const float* from = global;
#pragma unroll 1
    for (int k = first; k < r.high; k += columns, from += next_columns) {
      const bool valid = in_bounds && static_cast<unsigned>(r.first_column + k) < static_cast<unsigned>(r.width);
      copy_async<4 * kVector>(shared + k - first, valid ? from : r.global, valid);
    }
    row += rows, global += next_rows, shared += shared_rows;
  }
}

// As fp32; `vectors`: whole vectors of four columns, as they lie.
template <class T>
__device__ __forceinline__ void copy_as_float(const Rectangle<float, T>& r, int lanes, int64_t column_stride,
                                              bool vectors) {
  if constexpr (sizeof(T) == 4) {
    if (vectors)
      copy_rows<4>(r, lanes, column_stride);
    else
      copy_rows<1>(r, lanes, column_stride);
  } else {
    for_each_vector<1, 2>(
        r, lanes,
        [&](float*, const T* row, int column) {
          return load_or_zero<1>(row + column * column_stride,
                                 row != nullptr && static_cast<unsigned>(column) < static_cast<unsigned>(r.width));
        },
        [](float* shared, const Vector<T, 1>& value) { *shared = to_float(value.value[0]); });
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
  float* const shared_input = reinterpret_cast<float*>(shared_memory);
  float* const shared_grad = shared_input + tiling.input_elements();
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
  for (int idx = begin; idx < end; ++idx) {
    const int column_tile = idx % tiling.num_column_tiles, rest = idx / tiling.num_column_tiles;
    const int64_t first_image = static_cast<int64_t>(rest / tiling.num_bands) * tiling.images;
    const int images = static_cast<int>(min(static_cast<int64_t>(tiling.images), args.n - first_image));
    const int first_row = rest % tiling.num_bands * tiling.band_rows;
    const int rows = min(tiling.band_rows, args.out_h - first_row);
    const int first_column = column_tile * tiling.tile_columns;
    // Input rows that the band meets; row `above` rows before its first row is the first that is loaded.
    const int first_input_row = max(0, first_row - args.padding_h);
    const int last_input_row = min(args.h, first_row + rows + args.kernel_h - 1 - args.padding_h);
    const int input_rows = max(0, last_input_row - first_input_row);

    {
      const int64_t in_c = args.out_c / args.multiplier;
      const int64_t in_step = tiling.channels_last ? in_c : 1, grad_step = tiling.channels_last ? args.out_c : 1;
      const int64_t in_plane = tiling.channels_last ? 1 : static_cast<int64_t>(args.h) * args.w;
      const int64_t grad_plane = tiling.channels_last ? 1 : static_cast<int64_t>(args.out_h) * args.out_w;
      const int64_t in_image = in_c * args.h * args.w, out_image = args.out_c * args.out_h * args.out_w;
      Rectangle<float, T> in, out;
      in.shared = shared_input;
      in.pitch = input_pitch;
      in.image_pitch = tiling.input_rows * input_pitch;
      in.global = static_cast<const T*>(args.input) + first_image * in_image + channel / args.multiplier * in_plane;
      in.image_stride = in_image;
      in.row_stride = args.w * in_step;
      in.images = images;
      in.rows = input_rows;
      in.first_row = first_input_row;
      in.height = args.h;
      in.first_column = first_column - args.padding_w;
      in.width = args.w;
      in.low = one_column_tile ? args.padding_w : 0;
      in.high = one_column_tile ? min(args.w + args.padding_w, input_pitch) : input_pitch;
      copy_as_float(in, tiling.input_lanes, in_step, false);
      out.shared = shared_grad + (kRows - 1) * grad_pitch;
      out.pitch = grad_pitch;
      out.image_pitch = grad_image;
      out.global = static_cast<const T*>(args.grad_output) + first_image * out_image + channel * grad_plane;
      out.image_stride = out_image;
      out.row_stride = args.out_w * grad_step;
      out.images = images;
      out.rows = tiling.band_rows;  // zeros below a band that is cut short
      out.first_row = first_row;
      out.height = first_row + rows;
      out.first_column = first_column;
      out.width = args.out_w;
      out.low = 0;
      out.high = one_column_tile ? args.out_w : grad_pitch;
      copy_as_float(out, tiling.grad_lanes, grad_step, tiling.grad_vectors);
      wait_for_all_copies();
    }

    if (args.partial_bias != nullptr || args.grad_bias != nullptr)
      bias += sum_every(shared_grad + (kRows - 1) * grad_pitch + threadIdx.x, blockDim.x,
                        divide_up(images * grad_image - static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)));

    // Step s multiplies input row first_row + s + tile_h * kRows - padding_h by the rows s, s - 1, ... of the strip.
    const int input_shift = first_row + tile_h * kRows - args.padding_h - first_input_row;
    const int first_step = max(0, -input_shift), last_step = min(rows + kRows - 1, input_rows - input_shift);
    const auto march = [&](const float* input, const float* grad, int steps) {
      float strip[kRows][kStrip];  // row s in strip[s % kRows], steps counted from 0
      float part[kRows][kColumns] = {};
#pragma unroll
      for (int r = 1; r < kRows; ++r) {
        const float4 four = *reinterpret_cast<const float4*>(grad - r * grad_pitch);
        strip[kRows - r][0] = four.x, strip[kRows - r][1] = four.y;
        strip[kRows - r][2] = four.z, strip[kRows - r][3] = four.w;
      }
      const auto take_step = [&](int phase) {
        float window[kColumns + 4];
#pragma unroll
        for (int k = 0; k < kColumns + 4; k += 4) {
          const float4 four = *reinterpret_cast<const float4*>(input + k);
          window[k] = four.x, window[k + 1] = four.y, window[k + 2] = four.z, window[k + 3] = four.w;
        }
        const float4 four = *reinterpret_cast<const float4*>(grad);
        strip[phase][0] = four.x, strip[phase][1] = four.y, strip[phase][2] = four.z, strip[phase][3] = four.w;
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
      for (int unit = group; unit < images * strips; unit += tiling.groups) {
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
      const int column_tile = idx % tiling.num_column_tiles, rest = idx / tiling.num_column_tiles;
      const int64_t first_image = static_cast<int64_t>(rest / tiling.num_bands) * tiling.images;
      const int first_row = rest % tiling.num_bands * tiling.band_rows;
      const int first_column = column_tile * tiling.tile_columns;
      total += exact_grad_weight<T>(
          args, tiling.channels_last, channel, tap / args.kernel_w, tap % args.kernel_w,
          {first_image, min(first_image + tiling.images, args.n), first_row,
           min(first_row + tiling.band_rows, args.out_h), first_column, first_column + tiling.tile_columns});
    }
    store_grad_weight<T>(args, blockIdx.y, channel * taps + tap, args.out_c * taps, total);
  }
}

// Tiles of variants.h's table: NCHW, channels_last.
template <class Traits>
int launch_blocked_grad_weight(const GradWeightArgs& args, int tile, cudaStream_t stream) {
  const DeviceLimits& device = device_limits();
  const int share = min_int(device.shared_bytes / Traits::kBlocks - (1 << 10), kBlockedMostSharedBytes);
  BlockedGradWeightTiling tiling{
      blocked_grad_weight_cut(args, Traits::kShape, args.splits, max_int(share, kBlockedSharedBytes)), tile == 1};
  tiling.input_lanes = row_lanes(min_int(args.w, tiling.input_pitch));
  tiling.grad_vectors = sizeof(typename Traits::T) == 4 && !tiling.channels_last && args.out_w % 4 == 0 &&
                        reinterpret_cast<uintptr_t>(args.grad_output) % 16 == 0;
  tiling.grad_lanes = row_lanes(tiling.tile_columns / (tiling.grad_vectors ? 4 : 1));
  const int bytes = tiling.shared_bytes(Traits::kShape);
  if (const int error = allow_shared_bytes(blocked_grad_weight_kernel<Traits>, bytes)) return error;
  blocked_grad_weight_kernel<Traits>
      <<<dim3(static_cast<unsigned>(args.out_c), args.splits), tiling.threads(), bytes, stream>>>(args, tiling, bytes);
  return cudaGetLastError();
}

}  // namespace depthwise
