// Grad of weight and bias by blocked multiply-adds, both layouts.
//
// Serves  fp32, and fp16 and bf16 where the tensor cores do not; stride 1, dilation 1, kernels up to 64x64, any padding
//         below the kernel's size, any image size, alignment and depth multiplier.
// Owns    a block: one channel, all of the kernel's rows or a part of them, and a share of the bands of rows, which it takes
//         in stages (some images, or neighbouring bands of a tile of columns of one). A thread: kRows x kColumns taps,
//         summed over strips of four columns of grad_output, which it marches down: a step reads a window of one input
//         row and the kRows rows of the strip that meet it: kRows * kColumns * 4 multiply-adds for (kColumns + 4) / 4 +
//         kRows loads of 16 bytes. Rows of a strip kept in registers would save loads, but for them the compiler unrolls
//         steps and shuffles their multiply-adds, half of which then read three registers of two banks, where one of
//         them could be the one before's.
//         Threads are laid out kernel rows slowest, those as far from the middle side by side, so that warps skip the
//         steps whose input row is padding. Neighbouring groups of threads take neighbouring strips, and of the last
//         ones, of which there are too few, a share of all their steps, across a strip's end. The threads' sums are
//         added in a fixed order, and the splits by add_splits_kernel: no atomics.
// Memory  a stage's input and gradient as fp32, and zeros around them, or two stages', of which one is loaded meanwhile:
//         as much as a multiprocessor has for each of the blocks that its registers hold, four of 128 threads (see
//         blocked_grad_weight_tiling.h). Strips lie one after the other, so that their rows are a constant apart.
// Zeros   times infinity would poison a sum: a block whose sums are not all finite takes them again, term by term.
// Chosen  select_grad_weight.h.
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
  static constexpr TapTile kTaps = {kRows, kColumns};
  static constexpr int kVector = kColumns % 4 == 0 ? 4 : 2;  // floats of the window a load
  static constexpr int kWindow = (kColumns + kStrip - 1 + kVector - 1) / kVector * kVector;
  static_assert(kColumns % 2 == 0);
  // Terms are added up in parts before they join the sums: a long running sum loses bits with every term, and equal
  // terms would round the same way every time (32x128x56x56, 31x31: a thread's sum has 1568 terms). 16-bit results hide
  // it.
  static constexpr bool kSumsParts = sizeof(T) == 4;
  static constexpr int kPartSteps = 64 / kStrip;
};

// How a launch is cut.
struct BlockedGradWeightTiling : BlockedGradWeightCut {
  bool channels_last;
  int split_bands, longer_splits;  // of a split; splits that have one more
  bool grad_vectors;               // rows of grad_output are whole words of kStrip columns
  int input_vector;                // columns of input that are loaded at once
  int lead;  // columns that a window begins left of tap 0, as far as its tiles have room, for words of these
  int input_lane_bits, grad_lane_bits;  // threads that copy a row
};

// What a stage holds: `rows` rows from first_row on of some images' grad_output, its columns from first_column on, and the
// input rows that these meet, of a part of the kernel's rows. Bands lie one below the other, tile by tile of columns, image
// by image.
struct BlockedGradWeightStage {
  int64_t first_image;
  int bands;  // that it takes, of one image, or all of some
  int images, first_row, rows, first_column, first_input_row, input_rows;

  // From band `band` on, before band `end`.
  __device__ __forceinline__ BlockedGradWeightStage(const GradWeightArgs& args, const BlockedGradWeightTiling& tiling,
                                                    int part_rows, int band, int end) {
    // A division takes as long as a step of a march.
    const int tile = tiling.num_bands == 1 ? band : band / tiling.num_bands;  // of columns, of all images
    const int image = tiling.num_column_tiles == 1 ? tile : tile / tiling.num_column_tiles;
    const int first_band = band - tile * tiling.num_bands;
    first_image = image;
    images = 1;
    bands = min(min(end - band, tiling.num_bands - first_band), tiling.stage_bands);
    if (tiling.images > 1 && first_band == 0 && end - band > tiling.num_bands) {
      images = min(tiling.images, (end - band) / tiling.num_bands);
      bands = images * tiling.num_bands;
    }
    first_row = first_band * tiling.band_rows;
    rows = min(bands * tiling.band_rows, args.out_h - first_row);
    first_column = (tile - image * tiling.num_column_tiles) * tiling.tile_columns;
    const int first_tap_row = static_cast<int>(blockIdx.z) * part_rows;
    const int tap_rows = min(part_rows, args.kernel_h - first_tap_row);
    first_input_row = max(0, first_row + first_tap_row - args.padding_h);
    input_rows =
        max(0, min(args.h, first_row + rows + first_tap_row + tap_rows - 1 - args.padding_h) - first_input_row);
  }
};

// kVector columns at a time, as fp32, 1 << lane_bits threads a row. `column_stride`: elements from column to column.
// kStrips: of shared memory whose pitch is from strip to strip, of whole columns.
template <int kVector, bool kStrips = false, class T>
__device__ __forceinline__ void copy_as_float(const Rectangle<float, T>& r, int64_t column_stride, int lane_bits) {
  const int columns = kVector << lane_bits, rows = blockDim.x >> lane_bits;  // that all threads copy at once
  const int first = kVector * static_cast<int>(threadIdx.x & ((1 << lane_bits) - 1)), count = r.high - r.low;
  int row = threadIdx.x >> lane_bits, image = 0;
  if (r.rows <= 0 || first >= count) return;
  const int first_column = r.first_column + r.low;
  const int row_pitch = kStrips ? kStrip : r.pitch, columns_pitch = kStrips ? columns / kStrip * r.pitch : columns;
  const T* from = r.global + (r.first_row + row) * r.row_stride + (first_column + first) * column_stride;
  float* to = r.shared + r.low + row * row_pitch + (kStrips ? first / kStrip * r.pitch + first % kStrip : first);
  const int64_t next_rows = rows * r.row_stride, next_image = r.image_stride - r.rows * r.row_stride;
  const int64_t next_columns = columns * column_stride;
#pragma unroll 1
  while (true) {
    while (row >= r.rows) row -= r.rows, ++image, from += next_image, to += r.image_pitch - r.rows * row_pitch;
    if (image >= r.images) break;
    const int width = static_cast<unsigned>(r.first_row + row) < static_cast<unsigned>(r.height) ? r.width : 0;
    const T* column_from = from;
    float* column_to = to;
#pragma unroll 4
    for (int k = first; k < count; k += columns) {
      const bool valid = static_cast<unsigned>(first_column + k) < static_cast<unsigned>(width);
      if constexpr (sizeof(T) == 4)
        copy_async<4 * kVector>(column_to, valid ? column_from : r.global, valid);
      else
        *column_to = to_float(load_or_zero<1>(valid ? column_from : r.global, valid).value[0]);
      column_from += next_columns;
      column_to += columns_pitch;
    }
    row += rows, from += next_rows, to += rows * row_pitch;
  }
}

template <int kVector, int kCount>
__device__ __forceinline__ void load_floats(float (&to)[kCount], const float* shared) {
#pragma unroll
  for (int k = 0; k < kCount; k += kVector) {
    const auto values = *reinterpret_cast<const Vector<float, kVector>*>(shared + k);
#pragma unroll
    for (int e = 0; e < kVector; ++e) to[k + e] = values.value[e];
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

// Where a march goes on when so many steps are left, among them the last of the first strip: elements from there.
struct NextStrip {
  static constexpr bool kExists = true;
  int steps, input, grad;
};
struct NoStrip {
  static constexpr bool kExists = false;
};

template <class Traits>
__global__ void __launch_bounds__(kBlockedThreads, Traits::kTaps.blocks())
    blocked_grad_weight_kernel(const GradWeightArgs args, const BlockedGradWeightTiling tiling,
                               const int shared_bytes) {
  using T = typename Traits::T;
  constexpr int kRows = Traits::kRows, kColumns = Traits::kColumns;
  const int taps = args.kernel_h * args.kernel_w;

  const int64_t channel = blockIdx.x;
  const int part_rows = tiling.tiles_h * kRows, first_tap_row = static_cast<int>(blockIdx.z) * part_rows;
  const int split = static_cast<int>(blockIdx.y);
  const int begin = split * tiling.split_bands + min(split, tiling.longer_splits);
  const int end = begin + tiling.split_bands + (split < tiling.longer_splits ? 1 : 0);
  extern __shared__ __align__(16) unsigned char shared_memory[];
  for (int k = threadIdx.x; k < shared_bytes / 16; k += blockDim.x)
    reinterpret_cast<uint4*>(shared_memory)[k] = uint4{};
  __syncthreads();
  float* const buffers = reinterpret_cast<float*>(shared_memory);
  const int stage_elements = tiling.stage_elements(kRows), ahead = tiling.buffers - 1;
  const int input_pitch = tiling.input_pitch, strip_pitch = tiling.strip_rows(kRows) * kStrip;

  // Warps take turns from block to block: those of other kernel rows have other amounts of work.
  const unsigned turn = (blockIdx.x + blockIdx.y + blockIdx.z) % (blockDim.x / 32) * 32;
  const int worker = static_cast<int>(threadIdx.x + turn - (threadIdx.x + turn < blockDim.x ? 0 : blockDim.x));
  const int all_groups = worker / tiling.tiles_w, tile_w = worker - all_groups * tiling.tiles_w;
  const int place = all_groups / tiling.groups, group = all_groups - place * tiling.groups;
  const int tile_h = blocked_grad_weight_tile(place, tiling.tiles_h);  // of the part
  const int strips = tiling.strips(), grad_image = strips * strip_pitch;
  const bool one_column_tile = tiling.num_column_tiles == 1;

  const bool takes_bias = blockIdx.z == 0 && (args.partial_bias != nullptr || args.grad_bias != nullptr);
  float sum[kRows][kColumns] = {};
  float bias = 0.f;
  int next = begin, now = begin;  // bands: of the stage that is loaded, and that is multiplied
#pragma unroll 1
  for (int idx = -ahead; now < end; ++idx) {
    if (next < end) {  // load it, while the one before is multiplied
      const BlockedGradWeightStage stage(args, tiling, part_rows, next, end);
      next += stage.bands;
      float* const shared_input = buffers + ((idx + ahead) % 2 != 0 ? ahead * stage_elements : 0);
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
      in.first_column = stage.first_column - args.padding_w - tiling.lead;
      in.width = args.w;
      in.low = one_column_tile ? args.padding_w + tiling.lead : 0;
      in.high = one_column_tile ? min(args.w + in.low, input_pitch) : input_pitch;
      out.shared = shared_grad + (kRows - 1) * kStrip;
      out.pitch = strip_pitch;
      out.image_pitch = grad_image;
      out.global = static_cast<const T*>(args.grad_output) + stage.first_image * out_image + channel * grad_plane;
      out.image_stride = out_image;
      out.row_stride = args.out_w * grad_step;
      out.images = stage.images;
      out.rows = tiling.stage_rows;  // zeros below the last one
      out.first_row = stage.first_row;
      out.height = stage.first_row + stage.rows;
      out.first_column = stage.first_column;
      out.width = args.out_w;
      out.low = 0;
      out.high = one_column_tile ? args.out_w : tiling.tile_columns;
      if constexpr (sizeof(T) == 4) {
        if (tiling.input_vector == 4)
          copy_as_float<4>(in, in_step, tiling.input_lane_bits);
        else if (tiling.input_vector == 2)
          copy_as_float<2>(in, in_step, tiling.input_lane_bits);
        else
          copy_as_float<1>(in, in_step, tiling.input_lane_bits);
        if (tiling.grad_vectors)
          copy_as_float<kStrip, true>(out, grad_step, tiling.grad_lane_bits);
        else
          copy_as_float<1, true>(out, grad_step, tiling.grad_lane_bits);
      } else {
        copy_as_float<1>(in, in_step, tiling.input_lane_bits);
        copy_as_float<1, true>(out, grad_step, tiling.grad_lane_bits);
      }
    }
    commit_copies();
    if (idx < 0) continue;
    if (ahead == 0)
      wait_for_copies<0>();
    else
      wait_for_copies<1>();
    __syncthreads();
    const BlockedGradWeightStage stage(args, tiling, part_rows, now, end);
    now += stage.bands;
    const float* const shared_input = buffers + (idx % 2 != 0 ? ahead * stage_elements : 0);
    const float* const shared_grad = shared_input + tiling.input_elements();

    if (takes_bias)
      bias +=
          sum_every(shared_grad + threadIdx.x, blockDim.x,
                    divide_up(stage.images * grad_image - static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)));

    // Step s multiplies input row first_row + s + the thread's first kernel row - padding_h by the rows s, s - 1, ... of a
    // strip.
    const int input_shift = stage.first_row + first_tap_row + tile_h * kRows - args.padding_h - stage.first_input_row;
    const int first_step = max(0, -input_shift),
              strip_steps = min(stage.rows + kRows - 1, stage.input_rows - input_shift) - first_step;
    const auto march = [&](const float* input, const float* grad, int steps, auto next_strip) {
      float part[kRows][kColumns] = {};
#pragma unroll 1
      while (steps > 0) {
#pragma unroll 1
        for (const int end = max(0, steps - Traits::kPartSteps); steps > end; --steps) {
          float window[Traits::kWindow], strip[kRows][kStrip];
          load_floats<Traits::kVector>(window, input);
#pragma unroll
          for (int i = 0; i < kRows; ++i) load_floats<kStrip>(strip[i], grad - i * kStrip);
          // In the order of which the compiler makes the fewest multiply-adds that read three registers anew.
          const auto multiply_add = [&](int i, int j, int w) {
            float& to = Traits::kSumsParts ? part[i][j] : sum[i][j];
            to = fmaf(window[j + w], strip[i][w], to);
          };
          if constexpr (Traits::kVector == 4) {
#pragma unroll
            for (int w = kStrip - 1; w >= 0; --w)
#pragma unroll
              for (int i = 0; i < kRows; ++i)
#pragma unroll
                for (int j = 0; j < kColumns; ++j) multiply_add(i, j, w);
          } else {
#pragma unroll
            for (int k = kColumns + kStrip - 2; k >= 0; --k)
#pragma unroll
              for (int w = 0; w < kStrip; ++w)
#pragma unroll
                for (int i = 0; i < kRows; ++i)
                  if (k - w >= 0 && k - w < kColumns) multiply_add(i, k - w, w);
          }
          if constexpr (decltype(next_strip)::kExists) {
            const bool is_next = steps == next_strip.steps;
            input += is_next ? next_strip.input : input_pitch;
            grad += is_next ? next_strip.grad : kStrip;
          } else {
            input += input_pitch;
            grad += kStrip;
          }
        }
        if constexpr (Traits::kSumsParts) {
#pragma unroll
          for (int i = 0; i < kRows; ++i)
#pragma unroll
            for (int j = 0; j < kColumns; ++j) sum[i][j] += part[i][j], part[i][j] = 0.f;
        }
      }
    };
    if (tile_h < tiling.tiles_h && strip_steps > 0) {
      // Groups take every so many-th strip, and of the last ones, of which there are too few, a share of all steps.
      const int units = stage.images * strips, whole = units / tiling.groups, rest = units - whole * tiling.groups;
      const float* const first_input = shared_input + (first_step + input_shift) * input_pitch + tile_w * kColumns;
      const float* const first_grad = shared_grad + (kRows - 1 + first_step) * kStrip;
      const auto input_of = [&](int unit) {
        const int image = tiling.images == 1 ? 0 : unit / strips;
        return image * (tiling.input_rows * input_pitch) + (unit - image * strips) * kStrip;
      };
      int unit = group;
#pragma unroll 1
      for (; unit < whole * tiling.groups; unit += tiling.groups)
        march(first_input + input_of(unit), first_grad + unit * strip_pitch, strip_steps, NoStrip{});
      if (rest > 0) {
        const int begin = rest * strip_steps * group / tiling.groups,
                  end = rest * strip_steps * (group + 1) / tiling.groups;
        const int before = begin / strip_steps, step = begin - before * strip_steps;
        unit = whole * tiling.groups + before;
        const int back = strip_steps - 1, from = input_of(unit);
        const NextStrip next_strip{end - (before + 1) * strip_steps + 1, input_of(unit + 1) - from - back * input_pitch,
                                   strip_pitch - back * kStrip};
        march(first_input + from + step * input_pitch, first_grad + unit * strip_pitch + step * kStrip, end - begin,
              next_strip);
      }
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
  const int first_tap = first_tap_row * args.kernel_w,
            part_taps = min(part_rows, args.kernel_h - first_tap_row) * args.kernel_w;
  int tap_row = threadIdx.x / args.kernel_w, tap_column = threadIdx.x - tap_row * args.kernel_w;
  const int next_rows = blockDim.x / args.kernel_w, next_columns = blockDim.x - next_rows * args.kernel_w;
  for (int tap = threadIdx.x; tap < part_taps; tap += blockDim.x) {
    const int j = tap_column + tiling.lead;
    const float* const first =
        sums + (tap_row % kRows * kColumns + j % kColumns) * blockDim.x +
        blocked_grad_weight_place(tap_row / kRows, tiling.tiles_h) * tiling.groups * tiling.tiles_w + j / kColumns;
    const float total = sum_every(first, tiling.tiles_w, tiling.groups);
    finite = finite && is_finite(total);
    store_grad_weight<T>(args, blockIdx.y, channel * taps + first_tap + tap, args.out_c * taps, total);
    tap_row += next_rows, tap_column += next_columns;
    if (tap_column >= args.kernel_w) tap_column -= args.kernel_w, ++tap_row;
  }
  finite = __syncthreads_or(!finite) == 0;
  if (takes_bias) {
    sums[threadIdx.x] = bias;
    __syncthreads();
    if (threadIdx.x < 32) {
      float total = sum_every(sums + threadIdx.x, 32, static_cast<int>(blockDim.x) / 32);
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
      if (threadIdx.x == 0) store_grad_bias<T>(args, blockIdx.y, channel, total);
    }
  }
  if (finite) return;

  for (int tap = first_tap + threadIdx.x; tap < first_tap + part_taps; tap += blockDim.x) {
    float total = 0.f;
#pragma unroll 1
    for (int band = begin; band < end;) {
      const BlockedGradWeightStage stage(args, tiling, part_rows, band, end);
      band += stage.bands;
      total += exact_grad_weight<T>(
          args, tiling.channels_last, channel, tap / args.kernel_w, tap % args.kernel_w,
          {stage.first_image, stage.first_image + stage.images, stage.first_row, stage.first_row + stage.rows,
           stage.first_column, stage.first_column + tiling.tile_columns});
    }
    store_grad_weight<T>(args, blockIdx.y, channel * taps + tap, args.out_c * taps, total);
  }
}

// Threads of a warp or of a part of it, whole strips each, that leave the fewest of them idle at a row's end.
inline int copy_lane_bits(int columns) {
  int bits = 5;
  for (int fewer = 4; fewer >= 2; --fewer)
    if (divide_up(columns, 1 << fewer) << fewer < divide_up(columns, 1 << bits) << bits) bits = fewer;
  return bits;
}

// Tiles of variants.h's table: NCHW, channels_last.
template <class Traits>
int launch_blocked_grad_weight(const GradWeightArgs& args, int tile, cudaStream_t stream) {
  const DeviceLimits& device = device_limits();
  BlockedGradWeightTiling tiling{
      blocked_grad_weight_cut(args, Traits::kTaps, args.splits, device.shared_bytes, tile == 1), tile == 1};
  const bool has_words = sizeof(typename Traits::T) == 4 && !tiling.channels_last;
  tiling.grad_vectors =
      has_words && args.out_w % kStrip == 0 && reinterpret_cast<uintptr_t>(args.grad_output) % 16 == 0;
  tiling.split_bands = tiling.bands / args.splits, tiling.longer_splits = tiling.bands % args.splits;
  tiling.input_vector = 1;
  for (int vector = 4; has_words && tiling.input_vector == 1 && vector > 1; vector /= 2) {
    const int lead = divide_up(args.padding_w, vector) * vector - args.padding_w;
    if (lead + args.kernel_w > tiling.tiles_w * Traits::kColumns || args.w % vector != 0 ||
        reinterpret_cast<uintptr_t>(args.input) % (4 * vector) != 0)
      continue;
    tiling.input_vector = vector;
    tiling.lead = lead;
  }
  tiling.input_lane_bits = copy_lane_bits(divide_up(min_int(args.w, tiling.input_pitch), tiling.input_vector));
  tiling.grad_lane_bits = copy_lane_bits(tiling.tile_columns / (tiling.grad_vectors ? kStrip : 1));
  const int bytes = tiling.shared_bytes(Traits::kTaps);
  // More shared memory than a block needs keeps the first rounds from leaving few blocks for the last.
  const int64_t blocks = divide_up<int64_t>(args.out_c * args.splits * tiling.parts, device.multiprocessors);
  const int places = tiling.places(Traits::kTaps, device.shared_bytes, static_cast<int>(blocks));
  const int too_many = device.shared_bytes / (places + 1) / 16 * 16 - (1 << 10) + 16;  // bytes, for a block more
  const int taken = max_int(bytes, min_int(too_many, device.shared_bytes_block));
  if (const int error = allow_shared_bytes(blocked_grad_weight_kernel<Traits>, taken)) return error;
  blocked_grad_weight_kernel<Traits>
      <<<dim3(static_cast<unsigned>(args.out_c), args.splits, tiling.parts), tiling.threads(), taken, stream>>>(
          args, tiling, bytes);
  return cudaGetLastError();
}

}  // namespace depthwise
