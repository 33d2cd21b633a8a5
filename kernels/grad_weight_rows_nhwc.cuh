// Grad of weight and bias, channels_last, by whole rows of images.
//
// Serves  kernels whose sums fit registers, strides 1 and 2 not above the kernel's size, any padding; fp32, fp16, bf16;
//         aligned tensors, channels a multiple of 16 bytes, multiplier 1; rows of which two bands fit shared memory.
// Owns    a block: all channels and a part of the columns, or all columns and a group of channels, and a run of units,
//         image after image, each tiles_h bands of kRows rows of grad_output. A thread: all taps of kVector channels in
//         fp32 registers, of a tile of kRows rows and four columns of every unit; neighbouring threads take neighbouring
//         channels. So a block reads whole rows or large parts of them, which memory likes. How it is cut:
//         grad_weight_rows_tiling.h.
// Memory  rings in shared memory, filled asynchronously up to three units ahead: rows of input, of which the next unit meets
//         the last ones too, and units of grad_output. The columns of the padding are zeros from the beginning; its rows
//         are left out. On sm_90, a block that has all channels copies a row with an instruction of one thread ("in bulk":
//         3x3 at stride 2, 32x96x112x112, fp16, H200: 38.3 us, by all threads 40.6); the rest 16 bytes a thread. Of 227 KB
//         on an H100, 32x144x56x56 in fp32 takes 168 KB, and 100 KB are under way. There it takes 55.0 us; to read as many
//         bytes, and no more, takes 46.9, in 16 bits 34.2 and 26.4.
// Reduces the block's threads in order through shared memory, then the splits in order (grad_weight.cu). No atomics.
// Zeros   times infinity would poison a sum: a block whose sums are not all finite takes them again, pair by pair.
// Chosen  select_grad_weight.h.
#pragma once

#include "bulk_copy.cuh"
#include "grad_weight_march.cuh"
#include "grad_weight_rows_tiling.h"

namespace depthwise {

template <class T_, int kKernelH_, int kKernelW_, int kStrideH_, int kStrideW_, int kDilationH_, int kDilationW_,
          int kRows_>
struct GradWeightRowsTraits : NhwcTraits<T_, kKernelH_, kKernelW_, kStrideH_, kStrideW_, kDilationH_, kDilationW_> {
  static_assert(kDilationH_ == 1 && kDilationW_ == 1 && kKernelH_ >= kStrideH_ && kKernelW_ >= kStrideW_);
  static constexpr GradWeightRowsShape kShape =
      grad_weight_rows_shape(kKernelH_, kKernelW_, kStrideH_, kStrideW_, kRows_, static_cast<int>(sizeof(T_)));
  static constexpr int kTaps = kKernelH_ * kKernelW_, kColumns = kGradWeightRowsColumns, kRows = kRows_;
  static constexpr int kVector = kShape.vector, kWindowRows = kShape.window_rows, kWindow = kShape.window_columns;
  static constexpr uint64_t kUsed = window_mask(kColumns, kStrideW_, kKernelW_, 1);
  // Whether a row's four terms are added up before they join a tap's sum: equal ones would round the same way every time.
  // 16-bit results hide it.
  static constexpr bool kSumsRows = sizeof(T_) == 4;

  // Rows of an image of input that windows meet.
  __host__ __device__ static int used_rows(const GradWeightArgs& args) {
    return max_int(0, min_int(args.h, (args.out_h - 1) * kStrideH_ - args.padding_h + kKernelH_));
  }
};

template <class T, int kVector>
__device__ __forceinline__ void load_pixel(float (&to)[kVector], const T* from) {
  const auto pixel = *reinterpret_cast<const Vector<T, kVector>*>(from);
#pragma unroll
  for (int e = 0; e < kVector; ++e) to[e] = to_float(pixel.value[e]);
}

// A thread's share of the copies of one tensor's rows: 16 bytes of pixels a constant step apart.
template <class T>
struct RowCopier {
  const T* next;  // its first pixel of the next row
  int place;      // where that goes in the first row of shared memory; elements
  int count;      // pixels of a row

  // Rows to places from row `slot` of `slots` on. `step`: pixels. Returns the place of the row that follows.
  __device__ __forceinline__ int copy(CachePolicy policy, const CopyTarget<T>& target, int rows, int pitch, int step,
                                      int slot, int slots, int slot_pitch, int place_step) {
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const T* from = next;
      int to = place + slot * slot_pitch;
#pragma unroll 1
      for (int k = count; k > 0; --k) {
        policy.template copy_async<16>(target, ptx::opaque(to), from, true);
        from += step;
        to += place_step;
      }
      next += pitch;
      slot = slot + 1 == slots ? 0 : slot + 1;
    }
    return slot;
  }
};

template <class Traits, bool kInBulk>
__global__ void __launch_bounds__(kGradWeightRowsThreads, 1)
    grad_weight_rows_nhwc_kernel(const GradWeightArgs args, const __grid_constant__ GradWeightRowsTiling tiling) {
  using T = typename Traits::T;
  constexpr int kTaps = Traits::kTaps, kVector = Traits::kVector, kRows = Traits::kRows, kColumns = Traits::kColumns;
  constexpr int kStrideH = Traits::kStrideH, kStrideW = Traits::kStrideW, kWindow = Traits::kWindow;
  constexpr int kWindowRows = Traits::kWindowRows, kKernelH = Traits::kKernelH;
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // channels a copy
  // Where registers hold the rows that are loaded early.
  constexpr bool kLoadsEarly = sizeof(T) == 2 || (kInBulk && Traits::kShape.registers <= kGradWeightRowsEarlyRegisters);

  extern __shared__ __align__(16) unsigned char shared_memory[];
  const int thread = threadIdx.x, out_c = static_cast<int>(args.out_c);
  const int part = blockIdx.z, first_channel = blockIdx.x * tiling.lanes * kVector;
  const int first_column = part * tiling.tiles_w * kColumns;  // of grad_output
  const int unit_split = blockIdx.y, split = unit_split * tiling.parts + part;
  const int begin = unit_split * tiling.share + min(unit_split, tiling.more);
  const int end = begin + tiling.share + (unit_split < tiling.more ? 1 : 0);
  const int unit_rows = tiling.tiles_h * kRows, tiles = tiling.tiles_w * tiling.tiles_h;
  const int in_row = tiling.in_columns * tiling.pixel, grad_row = tiling.grad_columns * tiling.pixel;
  T* const input_ring = reinterpret_cast<T*>(shared_memory);
  T* const grad_ring = input_ring + tiling.ring_rows * in_row;
  const int stages = tiling.stages;  // of grad_output
  const int begin_image = begin / tiling.units_h;
  const int begin_row = (begin - begin_image * tiling.units_h) * unit_rows;  // of grad_output
  // Rows of input that an image's windows meet.
  const int used_h = Traits::used_rows(args);
  const auto window_end = [&](int row) {
    return max(0, min(used_h, row * kStrideH - args.padding_h - kStrideH + kKernelH));
  };

  // Columns of the padding at the left, and those that are copied.
  const int lead = min(tiling.in_columns, max(0, args.padding_w - first_column * kStrideW));
  const int first_in_column = max(0, first_column * kStrideW - args.padding_w);
  const int in_columns = max(0, min(args.w - first_in_column, tiling.in_columns - lead));
  const int grad_columns = max(0, min(args.out_w - first_column, tiling.grad_columns));

  // Copying: one thread whole rows; or all, of which those that own no tile copy nothing: as many pixels at once as there
  // are lanes of tiles for 16 bytes.
  const int chunks = tiling.lanes * kVector / kChunk;
  int at_once = 0, copy_column = 0, copy_channel = 0;
  const auto place_thread = [&] {
    at_once = tiling.lanes * tiles / chunks;
    copy_column = thread / chunks, copy_channel = (thread - copy_column * chunks) * kChunk;
  };
  const CachePolicy policy(args);
  const auto target = policy.target(input_ring);
  RowCopier<T> input{}, grad_output{};
  int step = 0, place_step = 0;
  using Bulk = BulkCopies<kMostGradWeightRowsAhead + 1>;
  __shared__ uint64_t barriers[kInBulk ? Bulk::kBarriers : 1];
  const Bulk bulk(barriers, args);
  if constexpr (kInBulk) {
    if (thread == 0) bulk.begin();
  } else {
    place_thread();
    const auto copies_of = [&](int columns) {
      const bool copies = copy_column < min(at_once, columns) && first_channel + copy_channel < out_c;
      return ptx::opaque(copies ? (columns - copy_column - 1) / at_once + 1 : 0);
    };
    input.place = ptx::opaque((copy_column + lead) * tiling.pixel + copy_channel);
    input.count = copies_of(in_columns);
    grad_output.place = ptx::opaque(tiling.ring_rows * in_row + copy_column * tiling.pixel + copy_channel);
    grad_output.count = copies_of(grad_columns);
    step = at_once * out_c, place_step = at_once * tiling.pixel;
  }
  // Rows of grad_output and of input that the next unit begins with.
  int next_unit = begin, next_image = begin_image, next_row = begin_row, next_in_row = 0, next_slot = 0, next_stage = 0;
  const auto request = [&] {
    if (next_unit < end) {
      const bool is_first = next_row == 0 || next_unit == begin;
      if (is_first) next_in_row = max(0, min(used_h, next_row * kStrideH - args.padding_h));
      const int end_row = min(next_row + unit_rows, args.out_h), end_in_row = window_end(end_row);
      const int in_rows = end_in_row - next_in_row, grad_rows = end_row - next_row;
      const int grad_slot = next_stage * unit_rows;
      const auto input_at = [&](int column, int channel) {
        const int64_t row = static_cast<int64_t>(next_image) * args.h + next_in_row;
        return static_cast<const T*>(args.input) + (row * args.w + first_in_column + column) * out_c + channel;
      };
      const auto grad_at = [&](int column, int channel) {
        const int64_t row = static_cast<int64_t>(next_image) * args.out_h + next_row;
        return static_cast<const T*>(args.grad_output) + (row * args.out_w + first_column + column) * out_c + channel;
      };
      if constexpr (kInBulk) {
        if (thread == 0) {
          const int in_bytes = in_columns * out_c * static_cast<int>(sizeof(T));
          const int grad_bytes = grad_columns * out_c * static_cast<int>(sizeof(T));
          bulk.expect(next_stage, in_rows * in_bytes + grad_rows * grad_bytes);
          bulk.copy_rows(next_stage, input_ring + lead * tiling.pixel, input_at(0, 0), in_rows, in_bytes,
                         args.w * out_c, next_slot, tiling.ring_rows, in_row);
          bulk.copy_rows(next_stage, grad_ring, grad_at(0, 0), grad_rows, grad_bytes, args.out_w * out_c, grad_slot,
                         stages * unit_rows, grad_row);
        }
        next_slot += in_rows;
        if (next_slot >= tiling.ring_rows) next_slot -= tiling.ring_rows;
      } else {
        if (is_first) {
          input.next = input_at(copy_column, first_channel + copy_channel);
          grad_output.next = grad_at(copy_column, first_channel + copy_channel);
        }
        next_slot =
            input.copy(policy, target, in_rows, args.w * out_c, step, next_slot, tiling.ring_rows, in_row, place_step);
        grad_output.copy(policy, target, grad_rows, args.out_w * out_c, step, grad_slot, stages * unit_rows, grad_row,
                         place_step);
      }
      next_stage = next_stage + 1 == stages ? 0 : next_stage + 1;
      next_image += end_row == args.out_h;
      next_row = end_row == args.out_h ? 0 : end_row;
      next_in_row = end_in_row;
      ++next_unit;
    }
    if constexpr (!kInBulk) commit_copies();
  };
#pragma unroll 1
  for (int k = 0; k < tiling.ahead; ++k) request();

  // The columns of the padding, and those beyond the last of the tiles.
  if constexpr (kInBulk) place_thread();
  const auto clear_columns = [&](T* rows, int count, int columns, int first, int last) {
    if (first >= last || copy_column >= at_once) return;
    for (int row = copy_column; row < count; row += at_once)
      for (int column = first; column < last; ++column)
        *reinterpret_cast<uint4*>(rows + (row * columns + column) * tiling.pixel + copy_channel) = uint4{};
  };
  clear_columns(input_ring, tiling.ring_rows, tiling.in_columns, 0, lead);
  clear_columns(input_ring, tiling.ring_rows, tiling.in_columns, lead + in_columns, tiling.in_columns);
  clear_columns(grad_ring, stages * unit_rows, tiling.grad_columns, grad_columns, tiling.grad_columns);

  // The last warp may have threads to spare.
  const int tile = thread / tiling.lanes, lane = thread - tile * tiling.lanes;
  const int tile_h = tile / tiling.tiles_w, tile_w = tile - tile_h * tiling.tiles_w;
  const bool has_tile = tile < tiles;
  const int input_corner = ptx::opaque(tile_w * kColumns * kStrideW * tiling.pixel + lane * kVector);
  const int grad_corner = ptx::opaque(tile_h * kRows * grad_row + tile_w * kColumns * tiling.pixel + lane * kVector);
  const bool wants_bias = args.partial_bias != nullptr || args.grad_bias != nullptr;
  float sum[kTaps][kVector] = {}, bias[kVector] = {};
  // The tile's rows of grad_output from `first_row` on, where its window begins in row `slot` of the ring.
  const auto compute = [&](int first_row, int slot, int stage) {
    const int rows = min(kRows, args.out_h - first_row);
    if (rows <= 0) return;
    const int first = first_row * kStrideH - args.padding_h;
    const int last = min(args.h, first + (rows - 1) * kStrideH + kKernelH);
    // Where all rows exist, no branch keeps loads from beginning early.
    const auto take_rows = [&](auto all_exist) {
      constexpr bool kAllExist = decltype(all_exist)::value;
      float grad[kRows][kColumns][kVector];
#pragma unroll
      for (int r = 0; r < kWindowRows; ++r) {
        if (r % kStrideH == 0 && r / kStrideH < kRows) {
          const int g = min_int(r / kStrideH, kRows - 1);
          if (kAllExist || g < rows) {
            const T* from = grad_ring + grad_corner + (stage * unit_rows + g) * grad_row;
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
        if (kAllExist || (first + r >= 0 && first + r < last)) {
          float window[kWindow][kVector];
          const T* from = input_ring + input_corner + slot * in_row;
#pragma unroll
          for (int w = 0; w < kWindow; ++w, from += tiling.pixel)
            if (Traits::kUsed >> w & 1) load_pixel(window[w], from);
#pragma unroll
          for (int g = 0; g < kRows; ++g) {
            const int i = r - g * kStrideH;
            if (i < 0 || i >= kKernelH) continue;
#pragma unroll
            for (int j = 0; j < Traits::kKernelW; ++j)
#pragma unroll
              for (int e = 0; e < kVector; ++e) {
                float& tap = sum[i * Traits::kKernelW + j][e];
                float terms = Traits::kSumsRows ? 0.f : tap;
#pragma unroll
                for (int v = 0; v < kColumns; ++v) terms = fmaf(grad[g][v][e], window[v * kStrideW + j][e], terms);
                tap = Traits::kSumsRows ? tap + terms : terms;
              }
          }
        }
        slot = slot + 1 == tiling.ring_rows ? 0 : slot + 1;
      }
    };
    if (kLoadsEarly && first >= 0 && first + kWindowRows <= last)
      take_rows(std::true_type());
    else
      take_rows(std::false_type());
  };

  // The ring's rows that units and images are apart.
  const int new_rows = unit_rows * kStrideH, ring_rows = tiling.ring_rows;
  int row = begin_row, stage = 0, phase = 0;
  int before = max(0, args.padding_h - begin_row * kStrideH);  // rows of the padding
  if (before >= ring_rows) before %= ring_rows;
  int slot = before == 0 ? 0 : ring_rows - before;
  if constexpr (kInBulk) __syncthreads();  // the barriers of the copies are there
#pragma unroll 1
  for (int unit = begin; unit < end; ++unit) {
    if constexpr (kInBulk)
      bulk.wait(stage, phase);
    else
      wait_for_stage(tiling.ahead);
    __syncthreads();  // and all are done with the unit before, whose place the next request takes
    request();
    if (has_tile) {
      const int tile_slot = slot + tile_h * (kRows * kStrideH);
      compute(row + tile_h * kRows, tile_slot < ring_rows ? tile_slot : tile_slot - ring_rows, stage);
    }
    phase ^= stage + 1 == stages;
    stage = stage + 1 == stages ? 0 : stage + 1;
    row += unit_rows;
    slot += row >= args.out_h ? tiling.to_next_image : new_rows;
    if (row >= args.out_h) row = 0;
    if (slot >= ring_rows) slot -= ring_rows;
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
    const float total = sum_in_parts(of_lane, tiles, tiling.lanes);
    store_sum<Traits>(args, split, first_channel + channel, tap, total);
    finite = finite && isfinite(total);
  }
  if (__syncthreads_and(finite)) return;

  for (int k = thread; k < count; k += tiling.threads) {
    const int channel = first_channel + k / (kTaps + 1), tap = k % (kTaps + 1);
    if (tap == kTaps) continue;
    float total = 0;
    for (int unit = begin; unit < end; ++unit) {
      const int image = unit / tiling.units_h, first_row = unit % tiling.units_h * unit_rows;
      const T* const grad = static_cast<const T*>(args.grad_output) +
                            static_cast<int64_t>(image) * args.out_h * args.out_w * out_c + channel;
      const T* const from =
          static_cast<const T*>(args.input) + static_cast<int64_t>(image) * args.h * args.w * out_c + channel;
      for (int column = first_column; column < first_column + grad_columns; column += kColumns)
        total += sum_of_pairs<Traits>(args, {image, 0, first_row, min(first_row + unit_rows, args.out_h), column}, tap,
                                      grad, from, out_c);
    }
    store_sum<Traits>(args, split, channel, tap, total);
  }
}

template <class Traits>
int launch_grad_weight_rows_nhwc(const GradWeightArgs& args, int, cudaStream_t stream) {
  const DeviceLimits& device = device_limits();
  const auto in_bulk = grad_weight_rows_nhwc_kernel<Traits, true>,
             by_threads = grad_weight_rows_nhwc_kernel<Traits, false>;
  GradWeightRowsTiling tiling =
      grad_weight_rows_tiling(Traits::kShape, args, args.splits,
                              {device.shared_bytes, device.shared_bytes_block, is_compiled_for_sm90(in_bulk)});
  if (tiling.threads == 0) return cudaErrorInvalidValue;
  const int unit_splits = args.splits / tiling.parts, new_rows = tiling.tiles_h * Traits::kRows * Traits::kStrideH;
  tiling.share = tiling.units / unit_splits, tiling.more = tiling.units % unit_splits;
  const int to_next = (Traits::used_rows(args) - (tiling.units_h - 1) * new_rows) % tiling.ring_rows;
  tiling.to_next_image = to_next < 0 ? to_next + tiling.ring_rows : to_next;
  const auto kernel = tiling.in_bulk ? in_bulk : by_threads;
  if (const int error = allow_shared_bytes(kernel, tiling.bytes, kGradWeightRowsStaticBytes)) return error;
  const dim3 blocks(tiling.groups, unit_splits, tiling.parts);
  kernel<<<blocks, tiling.threads, tiling.bytes, stream>>>(args, tiling);
  return cudaGetLastError();
}

}  // namespace depthwise
