// Depthwise convolution of wide planes in 16 bits, NCHW: forward, and grad of input (filter flipped), at stride 1.
//
// Serves  any compile-time kernel without dilation, any padding; fp16, bf16; input rows of whole words, output rows of
//         whole words that a warp holds (256 columns, or 250 of skewed ones).
// Owns    a warp, which is a block, walks down a strip of one plane; a lane computes kColumns neighbouring outputs of
//         every row, its filter in registers. An input row is read and converted once, and added to all output rows that
//         it meets: kKernelH rows of sums, whose names are fixed by unrolling a stage.
// Reads   rows into a ring in shared memory, asynchronously, some stages ahead, each to a pitch of its own: windows begin
//         at the same place within a vector, whatever the width, and zeros stand beside the rows. Or straight on, where
//         input rows begin within vectors at places known when compiling, and output rows do not: the rows of a stage as
//         they lie in memory, by vectors; each row's windows begin at a place of their own, and what they see of
//         neighbouring rows is masked. No other warp is waited for.
// Writes  whole vectors. Where rows begin within one, at a place known when compiling (strips begin at rows whose number,
//         counted through all planes, is a multiple of that period), lanes take the first words of their vector from
//         their neighbour; the first and the last lane have a part.
// Memory  kDepth stages of kStageRows rows: 8 to 10 KB for kernels up to four rows.
// Chosen  select.h.
#pragma once

#include "async_copy.cuh"
#include "nchw_tile.cuh"
#include "tensor_core.cuh"

namespace depthwise {

// kShift: elements by which windows begin right of a vector in shared memory; kOutWidth: of rows, modulo kColumns;
// kVector: elements a copy. kWidth: of input rows, modulo kColumns, where they are copied straight on; else 0.
template <class T_, int kKernelH_, int kKernelW_, int kShift_, int kOutWidth_, int kVector_, int kWidth_ = 0>
struct WarpsNchwTraits {
  using T = T_;
  static_assert(sizeof(T) == 2 && kOutWidth_ % 2 == 0);
  static constexpr int kKernelH = kKernelH_, kKernelW = kKernelW_, kTaps = kKernelH * kKernelW;
  static constexpr int kShift = kShift_, kOutWidth = kOutWidth_, kVector = kVector_;
  static constexpr int kLanes = 32, kColumns = kWarpsColumns;
  static constexpr int kWords = kColumns / 2;  // of a vector of 16 bytes
  static constexpr int kWidth = kWidth_;
  static constexpr bool kStraight = kWidth > 0;
  static_assert(!kStraight || (kVector == kColumns && kOutWidth == 0 && kWidth % 2 == 0 && kShift % 2 == 0));
  static constexpr int kPeriod = row_period(kStraight ? kWidth : kOutWidth, kColumns);

  static constexpr int kStageRows = warps_stage_rows(kKernelH);
  static constexpr int kLag = kKernelH - 1;  // output rows that a stage begins and does not complete
  static constexpr int kDepth = warps_depth(kKernelH);
  static_assert(kStageRows % kPeriod == 0 && kStageRows >= kKernelH);
  static constexpr int kWindow = kColumns + kKernelW - 1;
  // Elements by which the windows of row r of a stage begin right of a vector, and vectors that they touch.
  static constexpr int shift(int r) { return modulo(r * kWidth + kShift, kColumns); }
  static constexpr int reads(int r) { return divide_up(shift(r) + kWindow, kColumns); }
  static constexpr int kPairs = divide_up(kWindow, 2);
  static constexpr int kPitch = warps_pitch(kVector, kShift, kKernelW);  // of rows in shared memory
  static constexpr int kCopies = kVector < kColumns ? divide_up(kPitch / kVector, kLanes) : 1;  // a lane, of a row
  static constexpr int kFewestWarps = kTaps <= 25 ? 24 : 16;  // a multiprocessor, that registers leave room for
  // Elements of a stage. Straight ones begin up to a line later, and windows reach beyond them on either side.
  static constexpr int kStage =
      kStageRows * (kStraight ? kLanes * kColumns : kPitch) + (kStraight ? 3 * kWarpsLine : 0);
  // And what the last row's windows reach; of straight stages, zeros for rows that do not exist.
  static constexpr int kRing = kDepth * kStage + kWarpsLine;

  // Few warps at once, and strips that differ: all begin together, and would end together. 3x7, 32x128x128x256, fp16, H100:
  // forward, copies of 16 bytes, ten warps a multiprocessor, four strips a plane, 11 of the last tenth of planes: 0.191 ms;
  // twelve warps 0.193, sixteen 0.198, twenty 0.200; two strips 0.195. Grad of input, straight on, likewise: 0.190; eight
  // or twelve warps 0.191, two strips 0.192; copies of words, twelve warps, two strips, four of the last three tenths:
  // 0.197; sixteen 0.198, twenty 0.200; all in two strips 0.198.
  static constexpr bool kCopiesWords = kVector < kColumns;
  static constexpr int kWarps = kCopiesWords ? 12 : 10, kStripRows = kCopiesWords ? 64 : 36;
  static constexpr int kLastTenths = kCopiesWords ? 3 : 1, kLastCuts = kCopiesWords ? 2 : 4;

  // Elements by which output row o of a stage begins right of a vector.
  static constexpr int skew(int o) { return modulo(o * kOutWidth, kColumns); }
};

// Blocks below first_blocks take strips of `rows` rows, `strips` a plane; the others, of the planes that remain, shorter
// ones: what is left at the end is dealt more evenly.
struct WarpsNchwPlan {
  SkewRows skew_rows;
  unsigned first_blocks, first_planes;
  int strips, rows, last_strips, last_rows;
};

// Stores words [kBegin, kEnd) of a vector whose first would lie at `out`, in as few stores as there can be.
template <int kBegin, int kEnd, class T>
__device__ __forceinline__ void store_words(T* out, const unsigned (&word)[4]) {
  if constexpr (kBegin < kEnd) {
    constexpr int kWidth = widest_store(kBegin, kEnd, 4);
    T* const target = out + 2 * kBegin;
    if constexpr (kWidth == 4)
      __stcs(reinterpret_cast<uint4*>(target), uint4{word[0], word[1], word[2], word[3]});
    else if constexpr (kWidth == 2)
      __stcs(reinterpret_cast<uint2*>(target), uint2{word[kBegin], word[kBegin + 1]});
    else
      __stcs(reinterpret_cast<unsigned*>(target), word[kBegin]);
    store_words<kBegin + kWidth, kEnd>(out, word);
  }
}

// Stores a row's outputs, of which there are `columns`. `out`: where the row begins, at kSkew elements within a vector.
template <class Traits, int kSkew>
__device__ __forceinline__ void store_skewed(typename Traits::T* out, int lane, int columns,
                                             const float (&sum)[Traits::kColumns]) {
  constexpr int kWords = Traits::kWords, kMoved = kSkew / 2, kTail = (Traits::kOutWidth + kSkew) % Traits::kColumns / 2;
  unsigned packed[kWords], word[kWords];
#pragma unroll
  for (int k = 0; k < kWords; ++k) packed[k] = pack<typename Traits::T>(sum[2 * k], sum[2 * k + 1]);
#pragma unroll
  for (int k = 0; k < kWords; ++k)
    word[k] = k < kMoved ? __shfl_sync(~0u, packed[(k + kWords - kMoved) % kWords], (lane + 31) % 32)
                         : packed[(k + kWords - kMoved) % kWords];
  const int first = lane * Traits::kColumns - kSkew;
  out += first;
  const bool head = kMoved > 0 && lane == 0;
  if (!head && first + Traits::kColumns <= columns) store_words<0, kWords>(out, word);
  if (head) store_words<kMoved, kWords>(out, word);
  if (kTail > 0 && first < columns && first + Traits::kColumns > columns) store_words<0, kTail>(out, word);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kLanes, Traits::kFewestWarps)
    warps_nchw_kernel(const DirectArgs args, const WarpsNchwPlan plan) {
  using T = typename Traits::T;
  constexpr int kKernelH = Traits::kKernelH, kKernelW = Traits::kKernelW, kColumns = Traits::kColumns;
  constexpr int kStageRows = Traits::kStageRows, kPitch = Traits::kPitch, kVector = Traits::kVector;
  constexpr int kStageElements = Traits::kStage, kStages = Traits::kDepth * kStageElements;

  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const ring = reinterpret_cast<T*>(shared_memory);
  const int lane = threadIdx.x;

  // Which outputs: rows [begin, end) of the strip that starts at first_row.
  const bool is_first = blockIdx.x < plan.first_blocks;
  const unsigned block = is_first ? blockIdx.x : blockIdx.x - plan.first_blocks;
  const unsigned strips = is_first ? plan.strips : plan.last_strips, of_plane = block / strips;
  const unsigned plane = is_first ? of_plane : plan.first_planes + of_plane;
  const int rows = is_first ? plan.rows : plan.last_rows;
  const int before = Traits::kStraight ? static_cast<int>((plane * args.h - args.padding_h) & (Traits::kPeriod - 1))
                                       : plan.skew_rows.before(plane);
  const int first_row = static_cast<int>(block - of_plane * strips) * rows - before;
  const int begin = max(0, first_row), end = min(first_row + rows, args.out_h);
  if (begin >= end) return;

  // Of a row in shared memory, columns [from, to) exist, and zeros where a padded one is read beside them.
  const int left = args.padding_w + Traits::kShift;
  const int from = kVector < kColumns ? left : args.padding_w > 0 ? kWarpsLine : 0, to = min(kPitch, args.w + from);
  if (Traits::kStraight) {
    if (lane < kWarpsLine / kColumns) *reinterpret_cast<uint4*>(ring + kStages + lane * kColumns) = uint4{};
    __syncwarp();
  } else if (args.padding_w > 0) {
    for (int k = lane * kColumns; k < Traits::kRing; k += Traits::kLanes * kColumns)
      *reinterpret_cast<uint4*>(ring + k) = uint4{};
    __syncwarp();
  }

  // Requests the rows of the next stage.
  const int last_row = end - args.padding_h + Traits::kLag, end_in_row = min(args.h, last_row);
  int next_row = first_row - args.padding_h, next_slot = Traits::kStraight ? 0 : from + lane * kVector;
  const int64_t first_element = (static_cast<int64_t>(plane) * args.h + next_row) * args.w;
  const T* next_source = ptx::opaque(static_cast<const T*>(args.input) + first_element + lane * kVector);
  const int copied = to - next_slot;  // less than nothing: none
  // Straight: where stages begin within a line, and elements of one.
  const int stage_width = kStageRows * args.w;
  int next_line = static_cast<int>(first_element % kWarpsLine + kWarpsLine) % kWarpsLine, line = next_line;
  const CopyTarget<T> target(ring);
  const auto request = [&] {
    if (Traits::kStraight && next_row < last_row) {
      // Copies that touch a row which exists; what they bring of others is not read, or as zeros.
      const int element = next_row * args.w + lane * kVector, end_element = end_in_row * args.w;
#pragma unroll
      for (int k = 0; k < kStageRows; ++k) {
        constexpr int kStep = Traits::kLanes * kVector;
        if (lane * kVector + k * kStep < stage_width &&
            static_cast<unsigned>(element + k * kStep + kVector - 1) < static_cast<unsigned>(end_element + kVector - 1))
          target.template copy_async<16>(next_slot + kWarpsLine + next_line + lane * kVector + k * kStep,
                                         next_source + k * kStep);
      }
      next_source += stage_width;
      next_line = (next_line + stage_width) % kWarpsLine;
      next_row += kStageRows;
      next_slot += next_slot + kStageElements < kStages ? kStageElements : kStageElements - kStages;
    } else if (!Traits::kStraight && next_row < last_row) {
      const T* source = next_source;
#pragma unroll
      for (int r = 0; r < kStageRows; ++r) {
        const bool exists = static_cast<unsigned>(next_row + r) < static_cast<unsigned>(end_in_row);
#pragma unroll
        for (int k = 0; k < Traits::kCopies; ++k) {
          constexpr int kStep = Traits::kLanes * kVector;
          if (k * kStep < copied)
            target.template copy_async<kVector* static_cast<int>(sizeof(T))>(next_slot + r * kPitch + k * kStep,
                                                                             source + k * kStep, exists);
        }
        source += args.w;
      }
      next_source = source;
      next_row += kStageRows;
      next_slot += next_slot + kStageElements < kStages ? kStageElements : kStageElements - kStages;
    }
    commit_copies();
  };
#pragma unroll 1
  for (int stage = 0; stage < Traits::kDepth - 1; ++stage) request();

  const unsigned channel = plane % static_cast<unsigned>(args.out_c);
  float weight[Traits::kTaps];
  load_filter<Traits>(weight, args, channel);
  const float bias = bias_of<Traits>(args, channel);

  T* out = ptx::opaque(static_cast<T*>(args.out) + (static_cast<int64_t>(plane) * args.out_h + first_row) * args.out_w);
  int slot = Traits::kStraight ? kWarpsLine - args.padding_w + lane * kColumns : from - left + lane * kColumns;
  const int end_slot = slot + kStages;
  // Straight: which pairs of a window's columns exist.
  unsigned mask[Traits::kPairs];
#pragma unroll
  for (int k = 0; k < Traits::kPairs; ++k)
    mask[k] = static_cast<unsigned>(lane * kColumns + 2 * k - args.padding_w) < static_cast<unsigned>(args.w) ? ~0u : 0;
  float sum[kStageRows][kColumns] = {};
  for (int row = first_row; row - Traits::kLag < end; row += kStageRows) {
    wait_for_copies<Traits::kDepth - 2>();
    __syncwarp();  // and every lane is done with the stage that the next request overwrites
    request();
    for_each_index<kStageRows>([&](auto index) {
      constexpr int r = decltype(index)::value;
      constexpr int kShift = Traits::shift(r), kReads = Traits::reads(r);
      unsigned word[kReads * Traits::kWords];
      int at = slot + r * kPitch;
      if constexpr (Traits::kStraight) {
        const bool exists = static_cast<unsigned>(row - args.padding_h + r) < static_cast<unsigned>(end_in_row);
        at = exists ? slot + line + r * args.w - kShift : kStages;
      }
#pragma unroll
      for (int k = 0; k < kReads; ++k) {
        const uint4 read = *reinterpret_cast<const uint4*>(ring + at + k * kColumns);
        word[4 * k] = read.x, word[4 * k + 1] = read.y, word[4 * k + 2] = read.z, word[4 * k + 3] = read.w;
      }
      if constexpr (Traits::kStraight)
#pragma unroll
        for (int k = 0; k < Traits::kPairs; ++k) word[k + kShift / 2] &= mask[k];
      float window[Traits::kWindow];
#pragma unroll
      for (int k = 0; k < Traits::kWindow; ++k)
        window[k] =
            (k + kShift) % 2 == 0 ? low_to_float<T>(word[(k + kShift) / 2]) : high_to_float<T>(word[(k + kShift) / 2]);
      for_each_index<kKernelH>([&](auto tap_row) {
        constexpr int i = decltype(tap_row)::value, o = r - i;  // negative: begun in an earlier stage
        float (&row_sum)[kColumns] = sum[(o + kStageRows) % kStageRows];
#pragma unroll
        for (int j = 0; j < kKernelW; ++j)
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
            row_sum[v] = fmaf(window[v + j], weight[i * kKernelW + j], i == 0 && j == 0 ? bias : row_sum[v]);
        if constexpr (i == kKernelH - 1) {
          if (row + o >= begin && row + o < end)
            store_skewed<Traits, Traits::skew(o)>(out + o * args.out_w, lane, args.out_w, row_sum);
        }
      });
    });
    out += kStageRows * args.out_w;
    slot += slot + kStageElements < end_slot ? kStageElements : kStageElements - kStages;
    if (Traits::kStraight) line = (line + stage_width) % kWarpsLine;
  }
}

template <class Traits>
int launch_warps_nchw(const DirectArgs& args, int, cudaStream_t stream) {
  constexpr int kBytes = Traits::kRing * static_cast<int>(sizeof(typename Traits::T));
  constexpr int kBlockBytes = 1 << 10, kUnit = 128;  // what a block costs beside its own; shared memory comes in these
  const DeviceLimits& limits = device_limits();
  // So much that no more than kWarps fit a multiprocessor.
  const int bytes = max_int(kBytes, limits.shared_bytes / Traits::kWarps / kUnit * kUnit - kBlockBytes);
  const auto kernel = warps_nchw_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;

  WarpsNchwPlan plan{};
  plan.skew_rows = {static_cast<unsigned>(args.out_h), Traits::kPeriod};
  const int64_t planes = args.n * args.out_c;
  const int rows = args.out_h + Traits::kPeriod - 1;
  // Rows of a strip: whole stages, of input rows where strips may begin anywhere in them.
  const auto rows_of = [&](int strips) {
    constexpr int kLag = Traits::kLag % Traits::kPeriod == 0 ? Traits::kLag : 0;
    return divide_up(divide_up(rows, strips) + kLag, Traits::kStageRows) * Traits::kStageRows - kLag;
  };
  const int concurrent = limits.multiprocessors * min_int(Traits::kWarps, limits.shared_bytes / (bytes + kBlockBytes));
  const int strips = best_strips(planes, concurrent, rows, 4 * Traits::kStageRows, Traits::kStageRows + Traits::kLag);
  plan.rows = rows_of(max_int(strips, divide_up(rows, Traits::kStripRows)));
  plan.strips = divide_up(rows, plan.rows);
  plan.last_rows = rows_of(Traits::kLastCuts * plan.strips);
  plan.last_strips = divide_up(rows, plan.last_rows);
  const int64_t last_planes = planes * Traits::kLastTenths / 10;
  plan.first_planes = static_cast<unsigned>(planes - last_planes);
  plan.first_blocks = plan.first_planes * plan.strips;
  const int64_t blocks = plan.first_blocks + last_planes * plan.last_strips;
  kernel<<<static_cast<unsigned>(blocks), Traits::kLanes, bytes, stream>>>(args, plan);
  return cudaGetLastError();
}

}  // namespace depthwise
