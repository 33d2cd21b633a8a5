// How grad_weight_rows_nhwc cuts a problem (see there): a pure function of the problem's sizes and of a multiprocessor's
// shared memory.
#pragma once

#include "variants.h"

namespace depthwise {

constexpr int kGradWeightRowsColumns = 4;    // of grad_output, a thread
constexpr int kGradWeightRowsThreads = 512;  // of a block, and of a multiprocessor, at most
constexpr int kMostGradWeightRowsAhead = 3, kGradWeightRowsStaticBytes = 8 * (kMostGradWeightRowsAhead + 1);
// Of the sums, live rows of grad_output and a row of the window of all channels of a thread: at most; and where more rows of
// the window may be loaded early, fp32.
constexpr int kMaxGradWeightRowsRegisters = 112, kGradWeightRowsEarlyRegisters = 80;

// What a thread takes; `vector` 0: registers do not hold the sums of one channel.
struct GradWeightRowsShape {
  int vector, rows;                 // channels; rows of grad_output
  int window_rows, window_columns;  // of input
  int kernel_h, stride_h, stride_w, taps;
  int registers;  // see kMaxGradWeightRowsRegisters
};

constexpr GradWeightRowsShape grad_weight_rows_shape(int kernel_h, int kernel_w, int stride_h, int stride_w, int rows) {
  GradWeightRowsShape shape{0,
                            rows,
                            window_size(rows, stride_h, kernel_h, 1),
                            window_size(kGradWeightRowsColumns, stride_w, kernel_w, 1),
                            kernel_h,
                            stride_h,
                            stride_w,
                            kernel_h * kernel_w,
                            0};
  const int live = min_int(rows, rolling_live_rows(kernel_h, stride_h, 1));
  const int registers = shape.taps + live * kGradWeightRowsColumns + shape.window_columns;
  for (int vector = 4; vector > 0 && shape.vector == 0; vector /= 2)
    if (vector * registers <= kMaxGradWeightRowsRegisters) shape.vector = vector, shape.registers = vector * registers;
  return shape;
}
inline GradWeightRowsShape grad_weight_rows_shape(const Problem& p, const Tile& tile) {
  return grad_weight_rows_shape(static_cast<int>(p.kernel_h), static_cast<int>(p.kernel_w),
                                static_cast<int>(p.stride_h), static_cast<int>(p.stride_w), tile.rows);
}

struct GradWeightRowsSizes {
  int element_bytes, channels, h, out_h, out_w, padding_h;
  int64_t n;
  bool copies_bulk;  // rows by an instruction each: sm_90
};

// A unit of work: `tiles_h` bands of one image, each the rows of grad_output that a thread takes. A block: thread tiles of
// all columns of a unit, or of a part of them, of a group of channels.
struct GradWeightRowsTiling {
  int lanes, tiles_w, tiles_h, threads;  // `vector` channels each; 0 threads: nothing fits
  int groups, parts, splits;             // of channels; of columns; of units and columns
  int units_h, units;                    // of an image; of all
  int ahead, stages;                     // units under way; places for rows of grad_output
  int share, more;                       // units of a split; splits that take one more
  int to_next_image;                     // rows of the ring from an image's last unit to the next image's first
  // Shared memory: rows of input, columns of either tensor, elements of a pixel; bytes.
  int ring_rows, in_columns, grad_columns, pixel, bytes;
  bool in_bulk;  // whole rows of a part are copied by an instruction each
};

// The sizes that follow from the channels of a block, in pieces of 16 bytes, its bands, the units under way and those of a
// split, at most.
inline GradWeightRowsTiling grad_weight_rows_cut(const GradWeightRowsShape& shape, const GradWeightRowsSizes& sizes,
                                                 int chunks, int parts, int tiles_h, int ahead, int split_units) {
  GradWeightRowsTiling t{};
  const int chunk = 16 / sizes.element_bytes;
  t.lanes = chunks * chunk / shape.vector;
  t.groups = divide_up(divide_up(sizes.channels, chunk), chunks);
  t.in_bulk = sizes.copies_bulk && t.groups == 1;
  t.parts = parts;
  t.tiles_w = divide_up(divide_up(sizes.out_w, kGradWeightRowsColumns), parts);
  t.tiles_h = tiles_h;
  t.threads = divide_up(t.lanes * t.tiles_w * tiles_h, 32) * 32;
  const int unit_rows = tiles_h * shape.rows;
  t.units_h = divide_up(sizes.out_h, unit_rows);
  t.units = static_cast<int>(sizes.n) * t.units_h;
  t.ahead = ahead;
  t.stages = min_int(ahead + 1, split_units);
  // A unit's window, and the rows that the units under way add. The first of an image has none of the unit before, but none
  // of the padding either, nor has the last.
  const int new_rows = unit_rows * shape.stride_h, window_rows = new_rows - shape.stride_h + shape.kernel_h;
  const int beyond = max_int(0, t.units_h * new_rows - shape.stride_h + shape.kernel_h - sizes.padding_h - sizes.h);
  const int of_image = max_int(0, shape.kernel_h - shape.stride_h - sizes.padding_h - beyond);
  t.ring_rows = window_rows + (t.stages - 1) * new_rows + divide_up(t.stages - 1, t.units_h) * of_image;
  t.in_columns = (t.tiles_w - 1) * kGradWeightRowsColumns * shape.stride_w + shape.window_columns;
  t.grad_columns = t.tiles_w * kGradWeightRowsColumns;
  // Neighbouring tiles of few lanes lie in different banks.
  t.pixel = (chunks % 2 == 0 && chunks < 16 && !t.in_bulk ? chunks + 1 : chunks) * chunk;
  const int64_t pixels = int64_t{t.ring_rows} * t.in_columns + int64_t{t.grad_columns} * t.stages * unit_rows;
  const int64_t ring = sizes.element_bytes * pixels * t.pixel;
  const int64_t sums = int64_t{4} * (shape.taps + 1) * shape.vector * (t.threads + 1);
  t.bytes = static_cast<int>(min_int64(ring > sums ? ring : sums, kInt32Max));
  return t;
}

// Bytes of a unit that no other block reads as well.
inline int64_t grad_weight_rows_unit_bytes(const GradWeightRowsShape& shape, const GradWeightRowsSizes& sizes,
                                           const GradWeightRowsTiling& t) {
  const int64_t pixels = int64_t{t.grad_columns} * (shape.stride_h * shape.stride_w + 1);
  return pixels * t.tiles_h * shape.rows * t.lanes * shape.vector * sizes.element_bytes;
}

// Cycles that a cut is estimated to take: what the multiprocessor that has most of it reads, or computes if that is longer,
// and a unit that nothing overlaps; and the second pass.
inline double grad_weight_rows_cycles(const GradWeightRowsShape& shape, const GradWeightRowsSizes& sizes,
                                      const GradWeightRowsTiling& t, int blocks) {
  constexpr double kBytesPerCycle = 13;      // of memory, a multiprocessor
  constexpr double kHalfBytes = 24;          // pixels of so many bytes are read half as fast
  constexpr double kEnoughBytes = 48 << 10;  // under way
  constexpr double kEnoughWarps = 8;         // without any, reading takes an eighth longer
  constexpr double kPartCycles = 150, kPartialBytesPerCycle = 1500;
  // Cycles of an instruction: of a warp, and of a scheduler where it has many warps; of a unit, beside what threads execute.
  constexpr double kLatency = 4, kIssue = 1.2, kSchedulers = 4, kUnitCycles = 400;
  constexpr double kOverhead = 60, kOfLoad = 2, kOfCopy = 14;  // instructions
  const int resident = divide_up(t.groups * t.splits, kMultiprocessors), together = min_int(resident, blocks);
  const int units = divide_up(t.units * t.parts, t.splits);
  const double unit_bytes = static_cast<double>(grad_weight_rows_unit_bytes(shape, sizes, t));
  const double pixel_bytes = t.lanes * shape.vector * sizes.element_bytes;
  const double warps = together * t.threads / 32, under_way = together * unit_bytes * (t.stages - 1);
  double memory = resident * units * unit_bytes * (1 + kHalfBytes / pixel_bytes) / kBytesPerCycle;
  if (units > 1 && under_way < kEnoughBytes) memory *= kEnoughBytes / under_way;
  if (warps < kEnoughWarps) memory *= 1 + (1 - warps / kEnoughWarps) / 8;
  const double loads = shape.window_rows * shape.window_columns + kGradWeightRowsColumns * shape.rows;
  const double instructions = kOverhead + kGradWeightRowsColumns * shape.rows * shape.taps * shape.vector +
                              (sizes.element_bytes == 2 ? kOfLoad + shape.vector : kOfLoad) * loads +
                              (t.in_bulk ? 0 : kOfCopy * unit_bytes / (16 * t.threads));
  const double issue = warps / kSchedulers * kIssue;
  const double unit = instructions * (issue > kLatency ? issue : kLatency) + kUnitCycles;
  const double compute = divide_up(resident, blocks) * units * unit;
  const double parts = kPartCycles * t.parts;
  const double second = double{4} * t.splits * sizes.channels * (shape.taps + 1) / kPartialBytesPerCycle;
  return (memory > compute ? memory : compute) + unit + parts + second;
}

// The cut that is estimated to end first, of one round of blocks; `splits` 0: as many as make them. Parts of the columns
// where whole rows are copied at once, else groups of channels: a block reads as many whole lines as it can. fp32, H100, us:
// 3x3 at stride 2, 32x96x112x112: two parts 81.0, three 83.2, four 84.3, two groups 89.3; 3x3, 32x144x56x56: two parts 54.7,
// none 55.5; 5x5 at stride 2, 32x144x56x56: two groups 41.8, two parts 42.7. fp16: 3x3 at stride 2: no parts 47.0, two 48.5;
// 3x3: 34.9, 34.0.
inline GradWeightRowsTiling grad_weight_rows_tiling(const GradWeightRowsShape& shape, const GradWeightRowsSizes& sizes,
                                                    int splits, int shared_bytes, int shared_bytes_block) {
  constexpr int kManyGroups = 8, kMostParts = 4, kMostBlocks = 4;
  // Under way, of a multiprocessor: more are slower (5x5 at stride 2, 32x144x56x56, fp16, H100: 81 KB 29.6 us, 121 KB 30.4).
  constexpr int64_t kEnoughBytes = 72 << 10;
  const int all_chunks = divide_up(sizes.channels, 16 / sizes.element_bytes);
  const int bands = divide_up(sizes.out_h, shape.rows);
  GradWeightRowsTiling best{};
  double least = 0;
  const auto look_at = [&](int chunks, int parts, int tiles_h) {
    const GradWeightRowsTiling one = grad_weight_rows_cut(shape, sizes, chunks, parts, tiles_h, 1, 1);
    if (one.threads > kGradWeightRowsThreads || (splits > 0 && splits % parts != 0)) return;
    for (int blocks = min_int(kMostBlocks, kGradWeightRowsThreads / one.threads); blocks > 0; --blocks) {
      const int held = max_int(1, blocks * kMultiprocessors / (one.groups * parts));
      const int units = divide_up(one.units, splits > 0 ? splits / parts : held);
      const int room = min_int(shared_bytes_block - kGradWeightRowsStaticBytes, shared_bytes / blocks - (1 << 10));
      GradWeightRowsTiling fitting{};
      for (int ahead = 1; ahead <= kMostGradWeightRowsAhead; ++ahead) {
        const GradWeightRowsTiling t = grad_weight_rows_cut(shape, sizes, chunks, parts, tiles_h, ahead, units);
        if (t.bytes > room) break;
        fitting = t;
        if (blocks * ahead * grad_weight_rows_unit_bytes(shape, sizes, t) >= kEnoughBytes) break;
      }
      if (fitting.threads == 0) continue;
      fitting.splits = splits > 0 ? splits : divide_up(fitting.units, units) * parts;
      const double cycles = grad_weight_rows_cycles(shape, sizes, fitting, blocks);
      if (least == 0 || cycles < least) least = cycles, best = fitting;
    }
  };
  for (int groups = 1, last = 0; groups <= all_chunks && (groups <= kManyGroups || least == 0); ++groups) {
    int chunks = divide_up(all_chunks, groups);
    if (groups > 1 && chunks > 1 && chunks % 2 != 0) ++chunks;  // whole sectors
    if (chunks == last) continue;
    last = chunks;
    for (int parts = 1; parts <= (groups == 1 && sizes.copies_bulk ? kMostParts : 1); ++parts)
      for (int tiles_h = 1; tiles_h < 2 * bands; tiles_h *= 2) look_at(chunks, parts, min_int(tiles_h, bands));
  }
  return best;
}

// An H100's.
inline GradWeightRowsSizes grad_weight_rows_sizes(const Problem& p) {
  return {element_size(p.dtype),
          static_cast<int>(p.c),
          static_cast<int>(p.h),
          static_cast<int>(p.out_h),
          static_cast<int>(p.out_w),
          static_cast<int>(p.padding_h),
          p.n,
          true};
}
inline GradWeightRowsTiling grad_weight_rows_tiling(const Problem& p, const Tile& tile) {
  constexpr int kSharedBytes = kMultiprocessorSharedBytes, kSharedBytesBlock = kSharedBytes - (1 << 10);
  return grad_weight_rows_tiling(grad_weight_rows_shape(p, tile), grad_weight_rows_sizes(p), 0, kSharedBytes,
                                 kSharedBytesBlock);
}

}  // namespace depthwise
