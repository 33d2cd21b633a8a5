// What strips_nchw and strips_nhwc share: depthwise convolution of 3 to 9 kernel columns by products with banded matrices
// on the tensor cores, sixteen strips of output rows at a time. Forward, and grad of input at stride 1 (filter flipped);
// fp16 and bf16, fp32 accumulators.
//
// Idea    The sixteen rows of a product are sixteen strips: eight output columns (a tile) by kRows output rows each, of one
//         channel; whichever image, rows and columns they lie in. A warp walks down all of them at once. Step r fetches
//         row r of their inputs, sixteen columns, by one ldmatrix and adds it to all output rows that it meets, kernel
//         row i to output row r - i: A[m][k] = input[strip m, row r][k], B[k][n] = w[i][k - n - offset]. So kernel_h
//         products follow one fetch, the matrices B stay in registers, and so do the sums, kernel_h live rows of them.
// Tiles   Eight outputs of at most nine taps read sixteen columns or fewer: one product of K = 16, if the sixteen begin on
//         a chunk of eight. So it is the tiles of outputs that lie askew, at columns 8 * t + offset + padding, where
//         `offset` may be anything from 0 to 9 - kernel_w and is what aligns them best: to 4 columns with padding
//         (kernel_w - 1) / 2, so that 56 columns make eight tiles. Useful are kernel_w / 16 of the multiplies.
// Memory  The input with its padding in chunks of 16 bytes: `pitch` = tiles + 1 a row, kernel_h - 1 rows more than
//         outputs an image. Chunks left free behind every kRows rows and every image put the chunks of sixteen
//         successive strips of a step into different banks. The outputs are packed in registers until a walk has ended,
//         then staged: chunk j * kStageStrips + f is row j of strip f.
// NaN     A zero of the band times an infinity or NaN gives NaN in outputs that do not see it. So where an output is not
//         finite, the block computes those that are NaN again with plain multiply-adds over their own taps.
#pragma once

#include "toeplitz.cuh"

namespace depthwise {

constexpr int kStripsTaps = 9;                         // columns of a kernel, at most: sixteen columns of eight outputs
constexpr int kBlockSharedBytes = 1 << 10;             // that a block costs beside its own
constexpr int kFilterPitch = 3 * kChunk;               // elements: a kernel row with the zeros on both sides
constexpr int kFirstTap = kChunk - 1;                  // where its taps begin, at offset 0
static_assert(2 * kChunk - kStripsTaps == kFirstTap);  // the last of eight outputs reads the last of sixteen columns

// How an image of `strips` strips of `rows` rows lies in shared memory, in chunks.
struct StripsLayout {
  int pitch, skew;  // a row; what is left free behind the rows of a strip
  int strip_pitch, image_pitch;
};
constexpr StripsLayout strips_layout(int tiles, int strips, int rows, int kernel_h) {
  StripsLayout layout{tiles + 1, 0, 0, 0};
  const bool in_turn = strips == 1 || tiles % 8 == 0;  // eight of a fetch lie in one row of chunks
  if (!in_turn) layout.skew = modulo(tiles - rows * layout.pitch, 8);
  layout.strip_pitch = rows * layout.pitch + layout.skew;
  const int last = strips * rows + kernel_h - 2, used = (last + 1) * layout.pitch + last / rows * layout.skew;
  layout.image_pitch = used + modulo(strips * tiles - used, 8);
  return layout;
}

template <class T_, int kKernelH_, int kRows_, bool kChannelsLast_>
struct StripsTraits {
  using T = T_;
  static constexpr int kKernelH = kKernelH_, kRows = kRows_, kStrideW = 1;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kWarps = kChannelsLast ? 8 : 4, kThreads = 32 * kWarps;  // of a block, at most
  static constexpr int kSteps = kRows + kKernelH - 1;
  // row / kRows, as a multiplication that is exact for all rows of a block.
  static constexpr int strip_of(int row) { return static_cast<unsigned>(row) * ((1 << 16) / kRows + 1) >> 16; }
  // Of a thread: four sums and two words of the bands for each kernel row, some for each row that waits
  // to be stored, and what else there is: more where a kernel outlasts a strip. As many blocks as that allows.
  static constexpr int kRegisters =
      6 * kKernelH + (kChannelsLast ? 5 : 4) * max_int(0, kRows - kKernelH) + 30 + (kKernelH > kRows + 1 ? 8 : 0);
  static constexpr int kMinBlocks = min_int((64 << 10) / (kRegisters * kThreads), kChannelsLast ? 3 : 8);
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 800 || __CUDA_ARCH__ >= 1000)
  // There the same code takes more registers.
  static constexpr int kBoundBlocks = min_int(kMinBlocks, kChannelsLast ? 2 : 5);
#else
  static constexpr int kBoundBlocks = kMinBlocks;
#endif
  static constexpr int kStageStrips = kTileRows * (kChannelsLast ? 1 : kWarps);  // in a row of the stage
  // channels_last: what a warp turns around, in units of two chunks: sixteen strips as four by four or three by five.
  static constexpr int kUnits = divide_up(
      max_int(strips_layout(4, 4, kRows, kKernelH).image_pitch, strips_layout(5, 3, kRows, kKernelH).image_pitch),
      2 * kWarps);
  static constexpr int kChunks = 2 * kWarps * kUnits;
  // The filter twice, shifted by one element, as its pairs begin at odd elements as well.
  static constexpr int kFilterElements = 2 * kKernelH * kFilterPitch;
};

// How a block's threads copy rows to and from shared memory.
struct CopyPlan {
  int vector;             // elements at a time
  int lanes;              // threads along a row, as the power of two
  int rows;               // from a thread's row to its next: whole strips, so that it is always as far in shared memory
  int step, shared_step;  // elements from one to the next
  int pieces;             // of a whole image, if a thread has few of them; else 0
  SmallDivider row_divider;
};

// How a launch is cut into blocks, and how a block's shared memory is laid out.
struct StripsPlan : StripsLayout {
  int images, strips, tiles;              // that a block computes at a time: strips of an image, tiles of a strip
  int steps;                              // how many such times
  int blocks_h, blocks_w;                 // of an image
  int offset, first_column, first_chunk;  // of the band; of tile 0: its first output, its first input chunk
  int channel_pitch;                      // chunks, odd
  CopyPlan in, out;
  int64_t in_plane, in_image, out_plane, out_image;  // elements, NCHW
  SmallDivider tile_divider, strip_divider, column_divider, tap_divider;
  SmallDivider pitch_divider, strip_pitch_divider, image_divider;  // chunks to rows, strips, images
  IntDivider block_w_divider{1}, block_h_divider{1}, group_divider{1}, multiplier_divider{1};

  __host__ __device__ constexpr int all_strips() const { return images * strips * tiles; }
};

// What a block computes and reads.
template <class Traits>
struct StripsBlock {
  int image, image_end, channel, row, rows, column, columns;  // outputs that exist
  int first_column;                                           // of its strips: some columns may not exist
  int in_row, in_rows, in_column, in_columns;                 // input inside the image
  int top, left;                                              // where that begins in shared memory

  __device__ StripsBlock(const DirectArgs& args, const StripsPlan& plan, int channels, unsigned block) {
    const auto part = [&](const IntDivider& parts) {
      const unsigned whole = parts.quotient(block), rest = block - whole * parts.divisor;
      block = whole;
      return static_cast<int>(rest);
    };
    // channels_last: blocks that run together read whole pixels together.
    if (Traits::kChannelsLast) channel = part(plan.group_divider) * channels;
    const int first_tile = part(plan.block_w_divider) * plan.tiles;
    row = part(plan.block_h_divider) * plan.strips * Traits::kRows;
    if (!Traits::kChannelsLast) channel = part(plan.group_divider) * channels;
    image = block * plan.images * plan.steps;
    image_end = min(image + plan.images * plan.steps, static_cast<int>(args.n));
    rows = min(plan.strips * Traits::kRows, args.out_h - row);
    first_column = plan.first_column + first_tile * kChunk;
    column = max(0, first_column);
    columns = min(args.out_w, first_column + plan.tiles * kChunk) - column;

    const int first_in_row = row - args.padding_h, first_in_column = (plan.first_chunk + first_tile) * kChunk;
    in_row = max(0, first_in_row);
    in_rows = max(0, min(args.h, first_in_row + rows + Traits::kKernelH - 1) - in_row);
    in_column = max(0, first_in_column);
    in_columns = max(0, min(args.w, first_in_column + plan.pitch * kChunk) - in_column);
    top = in_row - first_in_row, left = in_column - first_in_column;
  }
};

// Strip f of a block, counted tile by tile, strip by strip, image by image.
struct StripPlace {
  int image, strip, tile;

  __device__ StripPlace(const StripsPlan& plan, int f) {
    const int flat = plan.tile_divider.quotient(f);
    tile = f - flat * plan.tiles;
    image = plan.strip_divider.quotient(flat);
    strip = flat - image * plan.strips;
  }
};

// The chunk in which row `row` of a channel begins, counted from the first row of padding.
template <class Traits>
__host__ __device__ constexpr int strips_chunk(const StripsPlan& plan, int image, int row) {
  return image * plan.image_pitch + row * plan.pitch + Traits::strip_of(row) * plan.skew;
}

// The filters of some channels, between the zeros that lie there: element p of a kernel row is the tap p - kFirstTap -
// offset; the second copy holds element p + 1 at p. Here element k of them.
template <class Traits>
__device__ __forceinline__ void store_strips_filter(typename Traits::T* filters, const DirectArgs& args,
                                                    const StripsPlan& plan, int k, typename Traits::T value) {
  const int taps = Traits::kKernelH * args.kernel_w, c = plan.tap_divider.quotient(k);
  const int straight = k - c * taps, tap = args.flip ? taps - 1 - straight : straight;
  const int i = plan.column_divider.quotient(tap), p = tap - i * args.kernel_w + plan.offset + kFirstTap;
  typename Traits::T* const to = filters + c * Traits::kFilterElements + i * kFilterPitch + p;
  to[0] = value;
  to[Traits::kKernelH * kFilterPitch - 1] = value;
}

template <class Traits>
__device__ __forceinline__ void load_strips_filters(typename Traits::T* filters, const DirectArgs& args,
                                                    const StripsPlan& plan, int channel, int channels) {
  const int taps = Traits::kKernelH * args.kernel_w;
  const auto* const global = filters_of<Traits>(args, channel, taps);
  for (int k = threadIdx.x; k < channels * taps; k += blockDim.x)
    store_strips_filter<Traits>(filters, args, plan, k, load_rounded<typename Traits::T>(global + k));
}

// A lane's words of the bands: B[2t, 2t+1][g] and B[2t+8, 2t+9][g] of each kernel row.
template <class Traits>
__device__ __forceinline__ void load_bands(unsigned (&band)[Traits::kKernelH][2], const typename Traits::T* filter) {
  const int lane = threadIdx.x % 32, p = 2 * (lane % 4) - lane / 4 + kFirstTap;
  const unsigned* const words =
      reinterpret_cast<const unsigned*>(filter) + (p % 2 * Traits::kKernelH * kFilterPitch + p) / 2;
#pragma unroll
  for (int i = 0; i < Traits::kKernelH; ++i) {
    band[i][0] = words[i * kFilterPitch / 2];
    band[i][1] = words[i * kFilterPitch / 2 + kChunk / 2];
  }
}

// Where a lane begins to fetch: lane l names strip l % 16 of the warp's, the first eight columns or the last.
template <class Traits>
__device__ __forceinline__ unsigned strips_address(const typename Traits::T* tile, const StripsPlan& plan, int first) {
  const int lane = threadIdx.x % 32;
  const StripPlace place(plan, min(first + lane % kTileRows, plan.all_strips() - 1));
  const int chunk = strips_chunk<Traits>(plan, place.image, place.strip * Traits::kRows) + place.tile;
  return ptx::shared_address(tile) + (chunk + lane / kTileRows) * 16;
}

// Walks down sixteen strips: `out` takes, row by row, two neighbouring outputs of strip g and of strip g + 8. The result
// says to is_poisoned if one of them is not finite.
template <class Traits>
__device__ __forceinline__ unsigned walk_strips(unsigned (&out)[Traits::kRows][2], unsigned address,
                                                const StripsPlan& plan, const unsigned (&band)[Traits::kKernelH][2],
                                                const float (&bias)[4]) {
  using T = typename Traits::T;
  constexpr int kKernelH = Traits::kKernelH, kRows = Traits::kRows;
  const int row_bytes = plan.pitch * 16, skew_bytes = plan.skew * 16;
  float sum[kKernelH][4];
  unsigned probe = 0;
#pragma unroll
  for (int r = 0; r < Traits::kSteps; ++r) {
    unsigned in[4];
    ptx::load_matrices(in, address);
    address += row_bytes;
    if ((r + 1) % kRows == 0) address += skew_bytes;
#pragma unroll
    for (int i = kKernelH - 1; i >= 0; --i) {
      if (i > r || r - i >= kRows) continue;
      float (&row_sum)[4] = sum[(r - i) % kKernelH];
      if (i == 0)
#pragma unroll
        for (int e = 0; e < 4; ++e) row_sum[e] = bias[e];
      multiply_k16<T>(row_sum, in[0], in[1], in[2], in[3], band[i][0], band[i][1]);
    }
    if (r < kKernelH - 1) continue;
    const float (&done)[4] = sum[(r - kKernelH + 1) % kKernelH];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned& pair = out[r - kKernelH + 1][half];
      pair = pack<T>(done[2 * half], done[2 * half + 1]);
      probe = probe_pair<T>(probe, pair);
    }
  }
  return probe;
}

// A product wants four registers of it.
__device__ __forceinline__ void load_bias(float (&bias)[4], float value) {
#pragma unroll
  for (int e = 0; e < 4; ++e) bias[e] = __uint_as_float(ptx::opaque(__float_as_uint(value)));
}

// A lane's place in the stage, for the first of the warp's strips.
template <class Traits>
__device__ __forceinline__ unsigned* stage_place(typename Traits::T* stage, int first) {
  const int lane = threadIdx.x % 32;
  return reinterpret_cast<unsigned*>(stage + (first + lane / 4) * kChunk) + lane % 4;
}

// The outputs of a warp's strips to where they are staged; `to` as stage_place says. Strips that do not exist as well.
template <class Traits>
__device__ __forceinline__ void stage_strips(unsigned* to, const unsigned (&out)[Traits::kRows][2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int j = 0; j < Traits::kRows; ++j) to[(j * Traits::kStageStrips + half * 8) * kChunk / 2] = out[j][half];
}

// Computes the NaN among a channel's staged outputs again, over their own taps alone.
template <class Traits>
__device__ __noinline__ void mend_strips(typename Traits::T* stage, const DirectArgs& args, const StripsPlan& plan,
                                         int image, int channels, int channel) {
  const StripsBlock<Traits> block(args, plan, channels, blockIdx.x);
  constexpr int kPitch = Traits::kStageStrips * kChunk;
  for (int k = threadIdx.x; k < Traits::kRows * kPitch; k += blockDim.x) {
    const int j = k / kPitch, f = k % kPitch / kChunk;
    const StripPlace place(plan, f);
    const int row = place.strip * Traits::kRows + j, column = block.first_column + place.tile * kChunk + k % kChunk;
    const bool exists = f < plan.all_strips() && image + place.image < block.image_end && row < block.rows &&
                        column >= 0 && column < args.out_w;
    if (exists && is_nan(stage[k]))
      stage[k] = from_float<typename Traits::T>(
          toeplitz_exact<Traits>(args, image + place.image, block.channel + channel, block.row + row, column));
  }
}

// All of a block's shared memory, filters and input, starts as zeros.
__device__ __forceinline__ void clear_shared(void* shared, int bytes) {
  for (int k = threadIdx.x; k < bytes / 16; k += blockDim.x) static_cast<uint4*>(shared)[k] = uint4{};
}

// The widest of 8, 4, 2 and 1 elements that divides `column`.
inline int boundary_of(int column) {
  int boundary = kChunk;
  while (modulo(column, boundary) != 0) boundary /= 2;
  return boundary;
}

// What follows from the padding and the kernel's columns: the offset that aligns tiles best.
inline StripsPlan strips_plan(const DirectArgs& args) {
  StripsPlan plan{};
  for (int offset = 1; offset <= kStripsTaps - args.kernel_w; ++offset)
    if (boundary_of(offset + args.padding_w) > boundary_of(plan.offset + args.padding_w)) plan.offset = offset;
  const int skewed = plan.offset + args.padding_w;
  plan.first_column = -modulo(-skewed, kChunk);
  plan.first_chunk = (plan.first_column - skewed) / kChunk;
  plan.column_divider = SmallDivider(args.kernel_w);
  plan.tap_divider = SmallDivider(args.kernel_w * args.kernel_h);
  plan.multiplier_divider = IntDivider(args.multiplier);
  return plan;
}

// Lays out shared memory for the block's strips; returns the bytes of `channels` channels.
template <class Traits>
int lay_out_strips(StripsPlan* plan, int channels) {
  const StripsLayout layout = strips_layout(plan->tiles, plan->strips, Traits::kRows, Traits::kKernelH);
  static_cast<StripsLayout&>(*plan) = layout;
  plan->channel_pitch = plan->images * layout.image_pitch | 1;
  // What is turned around lies there too, and the stage.
  if (Traits::kChannelsLast) plan->channel_pitch = max_int(Traits::kChunks, Traits::kRows * Traits::kStageStrips) | 1;
  plan->pitch_divider = SmallDivider(plan->pitch);
  plan->strip_pitch_divider = SmallDivider(plan->strip_pitch);
  plan->image_divider = SmallDivider(plan->image_pitch);
  plan->tile_divider = SmallDivider(plan->tiles);
  plan->strip_divider = SmallDivider(plan->strips);
  plan->block_w_divider = IntDivider(plan->blocks_w);
  plan->block_h_divider = IntDivider(plan->blocks_h);
  return channels * (plan->channel_pitch * 16 + Traits::kFilterElements * 2);
}

// Cuts `count` into as few parts of at most `most` as can be, of even sizes.
inline int even_part(int count, int most) { return divide_up(count, divide_up(count, most)); }

// How many of its `all_steps` steps a block takes, so that all are done soonest: `blocks` of them if each takes all, of
// which `resident` share a multiprocessor; a step costs `step`, and to begin a block `begin`.
inline int best_steps(int64_t blocks, int all_steps, int resident, int step, int begin) {
  constexpr int kMostSteps = 32;
  const int64_t at_once = max_int(1, resident) * device_limits().multiprocessors;
  int64_t least = 0;
  int best = 1;
  for (int steps = 1; steps <= min_int(all_steps, kMostSteps); ++steps) {
    const int64_t cost = divide_up(blocks * divide_up(all_steps, steps), at_once) * (step * steps + begin);
    if (least == 0 || cost < least) least = cost, best = even_part(all_steps, steps);
  }
  return best;
}

}  // namespace depthwise
