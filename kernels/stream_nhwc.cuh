// Streaming depthwise convolution, channels_last: forward, and grad of input at stride 1 (filter flipped).
//
// Serves  any compile-time kernel, stride and dilation, any padding; fp32, fp16, bf16; channels a multiple of 16 bytes.
// Owns    a block walks down a strip of kLanes * kVector channels and tiles_w * kColumns columns of one image; each thread
//         computes kColumns (4 or 8) neighbouring pixels of kVector channels, row after row, its filters in registers.
// Rolls   an input row is read and converted once, and added to every output row that it meets: kLiveRows rows of sums,
//         whose names are fixed by unrolling a stage of kStageOutputs output rows.
// Halos   odd strips are walked upwards: neighbours meet at their common rows when both begin or when both end, so that
//         L2 still holds them. Seen from below, an image is another whose rows have a negative pitch and whose filter has
//         its rows reversed.
// Memory  a ring of stages in shared memory, filled asynchronously, with zeros for the padding. The last stage's place
//         first holds the filters.
// Writes  what a thread holds of a pixel; where a pixel is 16 bytes, pairs of threads exchange halves, so that a store
//         fills whole sectors of 32 bytes.
// Chosen  where the filters fit registers and the image is large enough to walk over (select.h).
#pragma once

#include <type_traits>

#include "async_copy.cuh"
#include "direct.cuh"

namespace depthwise {

constexpr int kStreamNhwcThreads = 256;  // a block, at most

struct StreamNhwcPlan {
  int tiles_w;                     // thread tiles of a block
  int blocks_w, blocks_c, strips;  // blocks of an image
  int rows, in_columns, depth;     // output rows and input columns of a block; stages in the ring
  unsigned blocks;
};

template <class Traits, int kLanes, int kVector>
struct StreamNhwcShared {
  using T = typename Traits::T;
  static constexpr int kColumns =
      stream_nhwc_columns(Traits::kKernelH, Traits::kKernelW, Traits::kStrideH, Traits::kStrideW, Traits::kDilationH,
                          Traits::kDilationW, sizeof(T));  // of a thread
  // Columns of input of a block beside those of its thread tiles.
  static constexpr int kHalo = max_int(
      0, window_size(kColumns, Traits::kStrideW, Traits::kKernelW, Traits::kDilationW) - kColumns * Traits::kStrideW);
  // Whether the rows that a strip's first and last stage need not multiply are left out: stages apart, whose code is long.
  static constexpr bool kSkips = kColumns > 4 && RollingShape<Traits>::kLag > 0;
  static constexpr int kChannels = kLanes * kVector;
  static constexpr int kCopies = kChannels * sizeof(T) / 16;  // 16-byte copies a pixel
  static_assert(kChannels * sizeof(T) % 16 == 0);
  static constexpr bool kExchanges = stream_nhwc_exchanges(kChannels, kVector, sizeof(T));
  static constexpr int kLeastTiles = stream_nhwc_least_tiles(kChannels, kVector, sizeof(T));
  // Pixels of a row that a thread tile copies at a time.
  static constexpr int kTilePixels = min_int(kLanes / kCopies, kColumns);
  static_assert(kLanes % kCopies == 0 && kColumns % kTilePixels == 0);
};

// A thread's filters, from those of the block in shared memory: there they lie as in global memory, flipped or not, and are
// not spread over as many lines as a warp has threads.
template <class Traits, int kVector>
__device__ __forceinline__ void load_filters_shared(float (&weight)[Traits::kKernelH * Traits::kKernelW][kVector],
                                                    const typename Traits::T* shared, bool flip_rows,
                                                    bool flip_columns) {
  constexpr int kKernelH = Traits::kKernelH, kKernelW = Traits::kKernelW;
  const int row_step = flip_rows ? -kKernelW : kKernelW, column_step = flip_columns ? -1 : 1;
  const typename Traits::T* const first =
      shared + (flip_rows ? (kKernelH - 1) * kKernelW : 0) + (flip_columns ? kKernelW - 1 : 0);
#pragma unroll
  for (int i = 0; i < kKernelH; ++i)
#pragma unroll
    for (int j = 0; j < kKernelW; ++j)
#pragma unroll
      for (int e = 0; e < kVector; ++e)
        weight[i * kKernelW + j][e] = to_float(first[i * row_step + j * column_step + e * kKernelH * kKernelW]);
}

// Stores eight channels of neighbouring pixels, of which lane 0 of a pair holds the first four and lane 1 the others: each
// of them stores all eight of every second pixel. `out`: the lane's own first pixel; `num_columns`: from there on.
template <int kColumns, class T>
__device__ __forceinline__ void store_pixels_of_pair(T* out, int pixel, const float (&values)[kColumns][4],
                                                     int num_columns) {
  union Half {
    Vector<T, 4> vector;
    uint2 word;
  };
  const bool second = threadIdx.x % 2 != 0;
#pragma unroll
  for (int q = 0; q < kColumns; q += 2) {
    Half half[2];
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int e = 0; e < 4; ++e) half[side].vector.value[e] = from_float<T>(values[q + side][e]);
    const uint2 kept = second ? half[1].word : half[0].word;
    const uint2 given = second ? half[0].word : half[1].word;
    const uint2 got = {__shfl_xor_sync(~0u, given.x, 1), __shfl_xor_sync(~0u, given.y, 1)};
    const uint2 low = second ? got : kept, high = second ? kept : got;
    if (q < num_columns) __stcs(reinterpret_cast<uint4*>(out + q * pixel), uint4{low.x, low.y, high.x, high.y});
  }
}

// Blocks of a multiprocessor that registers are kept for. Before sm_80, where copies are loads and stores, strided windows
// of many taps would spill in those of two.
template <class Traits>
constexpr int stream_nhwc_blocks() {
#if __CUDA_ARCH__ < 800
  if (Traits::kKernelH * Traits::kKernelW >= 49 && Traits::kStrideW > 1) return 1;
#endif
  return 2;
}

template <class Traits, int kLanes, int kVector>
__global__ void __launch_bounds__(kStreamNhwcThreads, stream_nhwc_blocks<Traits>())
    stream_nhwc_kernel(const DirectArgs args, const StreamNhwcPlan plan) {
  using T = typename Traits::T;
  using Pixel = Vector<T, kVector>;
  using Shape = RollingShape<Traits>;
  using Shared = StreamNhwcShared<Traits, kLanes, kVector>;
  constexpr int kKernelW = Traits::kKernelW, kTaps = Traits::kKernelH * kKernelW, kColumns = Shared::kColumns;
  constexpr int kWindow = window_size(kColumns, Traits::kStrideW, kKernelW, Traits::kDilationW);
  constexpr uint64_t kUsedColumns = window_mask(kColumns, Traits::kStrideW, kKernelW, Traits::kDilationW);

  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const ring = reinterpret_cast<T*>(shared_memory);
  const int row_elements = plan.in_columns * Shared::kChannels;

  // Channels vary fastest over the grid: blocks that share pixels' cache lines run together.
  unsigned block = blockIdx.x;
  const int first_channel = block % plan.blocks_c * Shared::kChannels;
  block /= plan.blocks_c;
  const int first_column = block % plan.blocks_w * plan.tiles_w * kColumns;
  block /= plan.blocks_w;
  const int strip = block % plan.strips;
  const bool upwards = kVector > 1 && strip % 2 != 0;  // threads of one channel have no registers for it
  const int top_row = strip * plan.rows, num_rows = min(plan.rows, args.out_h - top_row);
  const int64_t image = block / plan.strips;
  const int in_top_row = top_row * Traits::kStrideH - args.padding_h;
  const int in_bottom_row = in_top_row + (num_rows - 1) * Traits::kStrideH + Shape::kSpan - 1;
  const int stages = divide_up((num_rows - 1) * Traits::kStrideH + Shape::kSpan, Shape::kStageRows);
  const int first_row = upwards ? top_row + num_rows - 1 : top_row;
  const int in_first_column = first_column * Traits::kStrideW - args.padding_w;
  const int pixel = args.out_c;  // elements from one pixel to the next in memory

  // Requests the input rows of a stage, stage after stage. A thread copies the same 16 bytes of channels of every
  // copy_step-th pixel: all warps as much, as they wait for each other, and the first ones the kHalo columns that remain.
  // Little is computed here: it is what each stage begins with.
  constexpr int kCopies = kColumns * Traits::kStrideW / Shared::kTilePixels;  // of a row
  constexpr int kHalo = Shared::kHalo;
  const int thread = threadIdx.y * kLanes + threadIdx.x;
  const int copy_channel = threadIdx.x % Shared::kCopies * (16 / static_cast<int>(sizeof(T)));
  const int copy_column = threadIdx.y * Shared::kTilePixels + threadIdx.x / Shared::kCopies;
  const int copy_step = blockDim.y * Shared::kTilePixels;
  const bool copies = threadIdx.x / Shared::kCopies < Shared::kTilePixels;
  const int row_pitch = upwards ? -args.w * pixel : args.w * pixel;
  const int stage_elements = Shape::kStageRows * row_elements;
  const int end_column = first_channel + copy_channel < args.out_c ? args.w : 0;
  const int first_copied = in_first_column + copy_column;
  const int64_t next_pixel = (image * args.h + (upwards ? in_bottom_row : in_top_row)) * args.w + first_copied;
  const T* next_source = static_cast<const T*>(args.input) + next_pixel * pixel + first_channel + copy_channel;
  const CopyTarget<T> target(ring + copy_column * Shared::kChannels + copy_channel);
  int next_row = upwards ? args.h - 1 - in_bottom_row : in_top_row;  // from the end of the image where walks begin
  int next_slot = 0;
  const auto request = [&](bool exists) {
    if (exists && copies) {
      const auto copy = [&](int r, int columns) {  // of row r of the stage, so many columns further on
        const bool in_bounds = static_cast<unsigned>(first_copied + columns) < static_cast<unsigned>(end_column) &&
                               static_cast<unsigned>(next_row + r) < static_cast<unsigned>(args.h);
        target.template copy_async<16>(next_slot + r * row_elements + columns * Shared::kChannels,
                                       next_source + (r * row_pitch + columns * pixel), in_bounds);
      };
#pragma unroll(kCopies* Shape::kStageRows > 16 ? 1 : kCopies)
      for (int k = 0; k < kCopies; ++k)
#pragma unroll
        for (int r = 0; r < Shape::kStageRows; ++r) copy(r, k * copy_step);
#pragma unroll 1
      for (int k = copy_column; k < kHalo; k += copy_step)
#pragma unroll
        for (int r = 0; r < Shape::kStageRows; ++r) copy(r, kCopies * copy_step + k - copy_column);
      next_source += Shape::kStageRows * row_pitch;
      next_row += Shape::kStageRows;
      next_slot = next_slot + stage_elements == plan.depth * stage_elements ? 0 : next_slot + stage_elements;
    }
    commit_copies();
  };
  // The filters come first, to the place of the last stage, which has room for as many pixels as taps.
  T* const filters = ring + (plan.depth - 1) * stage_elements;
  {
    constexpr int kWord = 16 / static_cast<int>(sizeof(T));
    const auto* const source = filters_of<Traits>(args, first_channel, kTaps);
    const int elements = min(Shared::kChannels, static_cast<int>(args.out_c) - first_channel) * kTaps;
    for (int k = thread * kWord; k < elements; k += static_cast<int>(blockDim.y) * kLanes * kWord)
      copy_weights<T, kWord>(filters + k, source + k);
    commit_copies();
  }
  for (int stage = 0; stage < plan.depth - 1; ++stage) request(stage < stages);

  const int channel = first_channel + threadIdx.x * kVector;
  const int column = first_column + threadIdx.y * kColumns;
  const bool computes = channel < args.out_c && column < args.out_w;
  float weight[kTaps][kVector] = {};
  Pixel bias{};
  if (plan.depth == 4)
    wait_for_copies<3>();
  else
    wait_for_stage(plan.depth);
  __syncthreads();
  if (computes)
    load_filters_shared<Traits>(weight, filters + threadIdx.x * kVector * kTaps, args.flip != upwards, args.flip);
  if (computes) bias = load_biases<Traits, kVector>(args, channel);

  // The first pixel that the thread stores, of the row that is complete next.
  const int store_column = column + (Shared::kExchanges ? threadIdx.x : 0);
  const int row_step = upwards ? -args.out_w * pixel : args.out_w * pixel;
  T* next_out = static_cast<T*>(args.out) + ((image * args.out_h + first_row) * args.out_w + store_column) * pixel +
                (Shared::kExchanges ? first_channel : channel) - static_cast<int64_t>(Shape::kLag) * row_step;
  const T* const window_corner =
      ring + threadIdx.y * kColumns * Traits::kStrideW * Shared::kChannels + threadIdx.x * kVector;
  const int num_columns = args.out_w - store_column, out_pixel = computes ? pixel : 0;
  int slot = 0;  // where the stage begins in the ring
  float sum[Shape::kLiveRows][kColumns][kVector] = {};
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_stage(plan.depth - 1);
    __syncthreads();  // and every thread is done with the stage that the next request overwrites
    request(stage + plan.depth - 1 < stages);
    if (!Shared::kExchanges && !computes) continue;
    const T* const corner = window_corner + slot;
    slot = slot + stage_elements == plan.depth * stage_elements ? 0 : slot + stage_elements;
    const int stage_row = stage * Shape::kStageOutputs;  // output row, from first_row, whose first tap is in this stage
    // A strip's first stage meets no rows begun before it, its last one begins none that end in it.
    const auto take = [&](auto is_first, auto is_last) {
      constexpr bool kIsFirst = decltype(is_first)::value, kIsLast = decltype(is_last)::value;
#pragma unroll
      for (int r = 0; r < Shape::kStageRows; ++r) {
        float window[kWindow][kVector];
#pragma unroll
        for (int k = 0; k < kWindow; ++k) {
          if (!(kUsedColumns >> k & 1)) continue;
          const Pixel in = *reinterpret_cast<const Pixel*>(corner + r * row_elements + k * Shared::kChannels);
#pragma unroll
          for (int e = 0; e < kVector; ++e) window[k][e] = to_float(in.value[e]);
        }
#pragma unroll
        for (int i = 0; i < Traits::kKernelH; ++i) {
          if (!Shape::meets(r, i)) continue;
          const int o = Shape::output_row(r, i);  // negative: begun in an earlier stage
          const bool is_complete = i == Traits::kKernelH - 1;
          if (kIsFirst && o < 0) {
            if (is_complete) next_out += ptx::opaque(row_step);
            continue;
          }
          if (kIsLast && o >= Shape::kStageOutputs - Shape::kLag) continue;
          float (&row_sum)[kColumns][kVector] = sum[(o + Shape::kStageOutputs * Shape::kLiveRows) % Shape::kLiveRows];
#pragma unroll
          for (int j = 0; j < kKernelW; ++j)
#pragma unroll
            for (int q = 0; q < kColumns; ++q)
#pragma unroll
              for (int e = 0; e < kVector; ++e)
                row_sum[q][e] =
                    fmaf(window[q * Traits::kStrideW + j * Traits::kDilationW][e], weight[i * kKernelW + j][e],
                         i == 0 && j == 0 ? to_float(bias.value[e]) : row_sum[q][e]);
          if (!is_complete) continue;
          const bool is_between = Shared::kSkips && !kIsFirst && !kIsLast;  // its rows are the strip's
          if (is_between || static_cast<unsigned>(stage_row + o) < static_cast<unsigned>(num_rows)) {
            if constexpr (Shared::kExchanges) {
              store_pixels_of_pair(next_out, pixel, row_sum, num_columns);
            } else {
              T* out = next_out;
              if (num_columns >= kColumns) {
#pragma unroll
                for (int q = 0; q < kColumns; ++q) {
                  store_streaming(out, row_sum[q]);
                  out += ptx::opaque(out_pixel);
                }
              } else {
#pragma unroll
                for (int q = 0; q < kColumns - 1; ++q) {
                  if (q < num_columns) store_streaming(out, row_sum[q]);
                  out += ptx::opaque(out_pixel);
                }
              }
            }
          }
          next_out += ptx::opaque(row_step);
        }
      }
    };
    if constexpr (Shared::kSkips) {
      if (stage == 0) {
        take(std::true_type(), std::false_type());
        continue;
      }
      if (stage == stages - 1) {
        take(std::false_type(), std::true_type());
        continue;
      }
    }
    take(std::false_type(), std::false_type());
  }
}

// How an image is cut. depth == 0: no ring of two stages fits.
template <class Traits, int kLanes, int kVector>
StreamNhwcPlan plan_stream_nhwc(const DirectArgs& args, const DeviceLimits& limits) {
  using Shape = RollingShape<Traits>;
  using Shared = StreamNhwcShared<Traits, kLanes, kVector>;
  StreamNhwcPlan plan{};
  const int all_tiles = divide_up(args.out_w, Shared::kColumns);
  plan.blocks_c = divide_up(static_cast<int>(args.out_c), Shared::kChannels);
  // Two blocks a multiprocessor; of few taps at stride 1 four small ones, whose threads wait for fewer others (3x3,
  // 16x64x512x512, fp32 / fp16, H200: 0.544 / 0.274 ms, two 0.550 / 0.283; not 32x96x112x112 at stride 2, fp16: 0.038,
  // two 0.034), in 16 bits of more taps as well, but where a pixel is two warps (3x7, 32x128x128x256, H100: fp16 0.198, two
  // 0.202; fp32 0.396, 0.383). Fewer where shared memory is small.
  constexpr bool kIsShort = sizeof(typename Traits::T) == 2;
  constexpr bool kSmallBlocks = kVector >= (kIsShort ? 2 : 4) && Traits::kStrideW == 1 && kLanes <= 32;
  constexpr int kMostSmallBlocks = 4;  // also where there is room for more: longer strips instead
  const auto stage_bytes = [&] {
    return Shape::kStageRows * plan.in_columns * Shared::kChannels * static_cast<int>(sizeof(typename Traits::T));
  };
  for (int blocks = kSmallBlocks ? kMostSmallBlocks : 2; blocks > 0 && plan.depth < 2; blocks /= 2)
    for (int most = min_int(512 / blocks, kStreamNhwcThreads) / kLanes; most > 0 && plan.depth < 2; most /= 2) {
      plan.tiles_w =
          divide_up(divide_up(all_tiles, divide_up(all_tiles, most)), Shared::kLeastTiles) * Shared::kLeastTiles;
      plan.in_columns = plan.tiles_w * Shared::kColumns * Traits::kStrideW + Shared::kHalo;
      plan.depth = min_int(4, limits.shared_bytes_for(blocks) / stage_bytes());
    }
  if (plan.depth < 2) return StreamNhwcPlan{};
  plan.blocks_w = divide_up(all_tiles, plan.tiles_w);
  // A multiprocessor holds 512 threads of 128 registers. Of eight columns a thread, whose stages are large, rather more
  // blocks than stages.
  constexpr bool kIsWide = Shared::kColumns > 4;
  const auto held = [&](int depth) {
    const int blocks =
        min_int(limits.shared_bytes / (depth * stage_bytes() + (1 << 10)), 512 / (kLanes * plan.tiles_w));
    return kSmallBlocks ? min_int(blocks, kMostSmallBlocks) : blocks;
  };
  for (int depth = plan.depth - 1; kIsWide && depth >= 2; --depth)
    if (held(depth) > held(plan.depth)) plan.depth = depth;
  const int concurrent = limits.multiprocessors * held(plan.depth);
  const int64_t images = args.n * plan.blocks_c * plan.blocks_w;
  int strips =
      best_strips(images, concurrent, args.out_h, 2 * Shape::kStageOutputs, Shape::kStageOutputs + Shape::kLag);
  // Tall images: short strips, as far as the rows that two of them read are few. Blocks that run at once then read and
  // write rows that lie near each other. H100, ms, strips of 10 rows and longer ones: 3x3, 64x128x256x512: fp16 1.466,
  // 1.538, fp32 2.910, 3.007; 16x64x512x512: 0.364, 0.377, 0.735, 0.749; 3x7, 32x128x128x256: fp16 0.190, 0.193, fp32
  // 0.358, 0.382; 3x1, 64x8x512x512, fp16: 0.185, 0.192; not 5x5, 32x128x128x256, fp16: 16 rows 0.230, 36 rows 0.211. Else
  // (and of a single row of taps in fp32, which was not measured) longer ones, in 16 bits always, in fp32 where all blocks
  // would be a single wave.
  constexpr bool kIsFlat = Shape::kLag <= 2 && (kIsShort || Shape::kLag > 0);
  constexpr int kTallRows = kIsFlat ? 8 : 32;
  if (kIsFlat || kIsShort ? args.out_h >= 96 : args.out_h >= 192 && images * strips <= concurrent)
    strips = max_int(strips, args.out_h / kTallRows);
  // Whole stages.
  plan.rows =
      divide_up(divide_up(args.out_h, strips) + Shape::kLag, Shape::kStageOutputs) * Shape::kStageOutputs - Shape::kLag;
  plan.strips = divide_up(args.out_h, plan.rows);
  plan.blocks = args.n * plan.blocks_w * plan.blocks_c * plan.strips;
  return plan;
}

template <class Traits, int kChannels>
int launch_stream_nhwc(const DirectArgs& args, int, cudaStream_t stream) {
  constexpr int kVector = stream_nhwc_vector(Traits::kKernelH, Traits::kKernelW, Traits::kStrideH, Traits::kStrideW,
                                             Traits::kDilationH, Traits::kDilationW);
  constexpr int kLanes = kChannels / kVector;
  using Shape = RollingShape<Traits>;
  using Shared = StreamNhwcShared<Traits, kLanes, kVector>;
  const StreamNhwcPlan plan = plan_stream_nhwc<Traits, kLanes, kVector>(args, device_limits());
  if (plan.depth == 0) return cudaErrorInvalidConfiguration;
  const auto kernel = stream_nhwc_kernel<Traits, kLanes, kVector>;
  const int shared_bytes = plan.depth * Shape::kStageRows * plan.in_columns * Shared::kChannels *
                           static_cast<int>(sizeof(typename Traits::T));
  if (const int error = allow_shared_bytes(kernel, shared_bytes)) return error;
  kernel<<<plan.blocks, dim3(kLanes, plan.tiles_w), shared_bytes, stream>>>(args, plan);
  return cudaGetLastError();
}

}  // namespace depthwise
