// How grad_weight_rows_nhwc cuts a problem (see there): a pure function of the problem's sizes, of a multiprocessor's shared
// memory and of whether there are bulk copies. Launches are cut anew, for their splits and device: it is on their path.
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
  int kernel_h, stride_h, stride_w, taps, element_bytes;
  int registers;  // see kMaxGradWeightRowsRegisters
};

constexpr GradWeightRowsShape grad_weight_rows_shape(int kernel_h, int kernel_w, int stride_h, int stride_w, int rows,
                                                     int element_bytes) {
  GradWeightRowsShape shape{0,
                            rows,
                            window_size(rows, stride_h, kernel_h, 1),
                            window_size(kGradWeightRowsColumns, stride_w, kernel_w, 1),
                            kernel_h,
                            stride_h,
                            stride_w,
                            kernel_h * kernel_w,
                            element_bytes,
                            0};
  const int live = min_int(rows, rolling_live_rows(kernel_h, stride_h, 1));
  const int registers = shape.taps + live * kGradWeightRowsColumns + shape.window_columns;
  for (int vector = 4; vector > 0 && shape.vector == 0; vector /= 2)
    if (vector * registers <= kMaxGradWeightRowsRegisters) shape.vector = vector, shape.registers = vector * registers;
  return shape;
}
inline GradWeightRowsShape grad_weight_rows_shape(const Problem& p, const Tile& tile) {
  return grad_weight_rows_shape(static_cast<int>(p.kernel_h), static_cast<int>(p.kernel_w),
                                static_cast<int>(p.stride_h), static_cast<int>(p.stride_w), tile.rows,
                                element_size(p.dtype));
}

// What a block may be cut for.
struct GradWeightRowsDevice {
  int shared_bytes, shared_bytes_block;  // of a multiprocessor; of a block
  bool copies_bulk;                      // rows by an instruction each: sm_90
};
constexpr GradWeightRowsDevice kGradWeightRowsH100 = {kMultiprocessorSharedBytes,
                                                      kMultiprocessorSharedBytes - (1 << 10), true};

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

// The sizes that follow from the channels of a block, in pieces of 16 bytes, and its bands.
inline GradWeightRowsTiling grad_weight_rows_cut(const GradWeightRowsShape& shape, const GradWeightArgs& args,
                                                 bool copies_bulk, int chunks, int parts, int tiles_h) {
  GradWeightRowsTiling t{};
  const int chunk = 16 / shape.element_bytes, channels = static_cast<int>(args.out_c);
  t.lanes = chunks * chunk / shape.vector;
  t.groups = divide_up(divide_up(channels, chunk), chunks);
  t.in_bulk = copies_bulk && t.groups == 1;
  t.parts = parts;
  t.tiles_w = divide_up(divide_up(args.out_w, kGradWeightRowsColumns), parts);
  t.tiles_h = tiles_h;
  t.threads = divide_up(t.lanes * t.tiles_w * tiles_h, 32) * 32;
  t.units_h = divide_up(args.out_h, tiles_h * shape.rows);
  t.units = static_cast<int>(args.n) * t.units_h;
  t.in_columns = (t.tiles_w - 1) * kGradWeightRowsColumns * shape.stride_w + shape.window_columns;
  t.grad_columns = t.tiles_w * kGradWeightRowsColumns;
  // Neighbouring tiles of few lanes lie in different banks.
  t.pixel = (chunks % 2 == 0 && chunks < 16 && !t.in_bulk ? chunks + 1 : chunks) * chunk;
  return t;
}

// Those that follow from the units under way, and those of a split, at most.
inline void grad_weight_rows_ring(GradWeightRowsTiling& t, const GradWeightRowsShape& shape, const GradWeightArgs& args,
                                  int ahead, int split_units) {
  t.ahead = ahead;
  t.stages = min_int(ahead + 1, split_units);
  // A unit's window, and the rows that the units under way add. The first of an image has none of the unit before, but none
  // of the padding either, nor has the last.
  const int unit_rows = t.tiles_h * shape.rows, new_rows = unit_rows * shape.stride_h;
  const int window_rows = new_rows - shape.stride_h + shape.kernel_h;
  const int beyond = max_int(0, t.units_h * new_rows - shape.stride_h + shape.kernel_h - args.padding_h - args.h);
  const int of_image = max_int(0, shape.kernel_h - shape.stride_h - args.padding_h - beyond);
  t.ring_rows = window_rows + (t.stages - 1) * new_rows + divide_up(t.stages - 1, t.units_h) * of_image;
  const int64_t pixels = int64_t{t.ring_rows} * t.in_columns + int64_t{t.grad_columns} * t.stages * unit_rows;
  const int64_t ring = shape.element_bytes * pixels * t.pixel;
  const int64_t sums = int64_t{4} * (shape.taps + 1) * shape.vector * (t.threads + 1);
  t.bytes = static_cast<int>(min_int64(ring > sums ? ring : sums, kInt32Max));
}

// Bytes of a unit that no other block reads as well.
inline int64_t grad_weight_rows_unit_bytes(const GradWeightRowsShape& shape, const GradWeightRowsTiling& t) {
  const int64_t pixels = int64_t{t.grad_columns} * (shape.stride_h * shape.stride_w + 1);
  return pixels * t.tiles_h * shape.rows * t.lanes * shape.vector * shape.element_bytes;
}

// Cycles in which a multiprocessor reads pixels of `pixel_bytes` from memory.
inline double grad_weight_rows_memory_cycles(double bytes, double pixel_bytes) {
  constexpr double kBytesPerCycle = 13, kHalfBytes = 24;  // pixels of so many bytes are read half as fast
  return bytes * (1 + kHalfBytes / pixel_bytes) / kBytesPerCycle;
}

// Cycles that a cut is estimated to take: what the multiprocessor that has most of it reads, or computes if that is longer,
// and a unit that nothing overlaps; and the second pass.
inline double grad_weight_rows_cycles(const GradWeightRowsShape& shape, const GradWeightRowsTiling& t, int blocks,
                                      int64_t channels) {
  constexpr double kEnoughBytes = 48 << 10;  // under way
  constexpr double kEnoughWarps = 8;         // without any, reading takes an eighth longer
  constexpr double kPartCycles = 150, kPartialBytesPerCycle = 1500;
  // Cycles of an instruction: of a warp, and of a scheduler where it has many warps; of a unit, beside what threads execute.
  constexpr double kLatency = 4, kIssue = 1.2, kSchedulers = 4, kUnitCycles = 400;
  constexpr double kOverhead = 60, kOfLoad = 2, kOfCopy = 14;  // instructions
  const int resident = divide_up(t.groups * t.splits, kMultiprocessors), together = min_int(resident, blocks);
  const int units = divide_up(t.units * t.parts, t.splits);
  const double unit_bytes = static_cast<double>(grad_weight_rows_unit_bytes(shape, t));
  const double pixel_bytes = t.lanes * shape.vector * shape.element_bytes;
  const double warps = together * t.threads / 32, under_way = together * unit_bytes * (t.stages - 1);
  double memory = grad_weight_rows_memory_cycles(resident * units * unit_bytes, pixel_bytes);
  if (units > 1 && under_way < kEnoughBytes) memory *= kEnoughBytes / under_way;
  if (warps < kEnoughWarps) memory *= 1 + (1 - warps / kEnoughWarps) / 8;
  const double loads = shape.window_rows * shape.window_columns + kGradWeightRowsColumns * shape.rows;
  const double instructions = kOverhead + kGradWeightRowsColumns * shape.rows * shape.taps * shape.vector +
                              (shape.element_bytes == 2 ? kOfLoad + shape.vector : kOfLoad) * loads +
                              (t.in_bulk ? 0 : kOfCopy * unit_bytes / (16 * t.threads));
  const double issue = warps / kSchedulers * kIssue;
  const double unit = instructions * (issue > kLatency ? issue : kLatency) + kUnitCycles;
  const double compute = divide_up(resident, blocks) * units * unit;
  const double parts = kPartCycles * t.parts;
  const double second = double{4} * t.splits * static_cast<double>(channels) * (shape.taps + 1) / kPartialBytesPerCycle;
  return (memory > compute ? memory : compute) + unit + parts + second;
}

// The cut that is estimated to end first, of one round of blocks; `splits` 0: as many as make them. Parts of the columns
// where whole rows are copied at once, else groups of channels: a block reads as many whole lines as it can. fp32, H100, us:
// 3x3 at stride 2, 32x96x112x112: two parts 81.0, three 83.2, four 84.3, two groups 89.3; 3x3, 32x144x56x56: two parts 54.7,
// none 55.5; 5x5 at stride 2, 32x144x56x56: two groups 41.8, two parts 42.7. fp16: 3x3 at stride 2: no parts 47.0, two 48.5;
// 3x3: 34.9, 34.0.
inline GradWeightRowsTiling grad_weight_rows_tiling(const GradWeightRowsShape& shape, const GradWeightArgs& args,
                                                    int splits, const GradWeightRowsDevice& device) {
  constexpr int kManyGroups = 8, kMostParts = 4, kMostBlocks = 4;
  // Under way, of a multiprocessor: more are slower (5x5 at stride 2, 32x144x56x56, fp16, H100: 81 KB 29.6 us, 121 KB 30.4).
  constexpr int64_t kEnoughBytes = 72 << 10;
  const int all_chunks = divide_up(static_cast<int>(args.out_c), 16 / shape.element_bytes);
  const int bands = divide_up(args.out_h, shape.rows);
  // What reading takes at least, shared evenly by all multiprocessors; of the rest of a cut nothing is counted.
  constexpr double kRounding = 1 - 1e-6;
  const double positions = static_cast<double>(args.n) * args.out_h * args.out_w;
  const double bytes = positions * (shape.stride_h * shape.stride_w + 1) * static_cast<double>(args.out_c) *
                       shape.element_bytes * (kRounding / kMultiprocessors);
  GradWeightRowsTiling best{};
  double least = 0;
  const auto look_at = [&](GradWeightRowsTiling t) {
    const int64_t unit_bytes = grad_weight_rows_unit_bytes(shape, t);
    for (int blocks = min_int(kMostBlocks, kGradWeightRowsThreads / t.threads); blocks > 0; --blocks) {
      const int held = max_int(1, blocks * kMultiprocessors / (t.groups * t.parts));
      const int units = divide_up(t.units, splits > 0 ? splits / t.parts : held);
      const int room =
          min_int(device.shared_bytes_block - kGradWeightRowsStaticBytes, device.shared_bytes / blocks - (1 << 10));
      // As many units under way as are enough, or fit.
      int ahead = 1;
      while (ahead < kMostGradWeightRowsAhead && blocks * ahead * unit_bytes < kEnoughBytes) ++ahead;
      for (; ahead > 0; --ahead) {
        grad_weight_rows_ring(t, shape, args, ahead, units);
        if (t.bytes <= room) break;
      }
      if (ahead == 0) continue;
      t.splits = splits > 0 ? splits : divide_up(t.units, units) * t.parts;
      const double cycles = grad_weight_rows_cycles(shape, t, blocks, args.out_c);
      if (least == 0 || cycles < least) least = cycles, best = t;
    }
  };
  for (int groups = 1, last = 0; groups <= all_chunks && (groups <= kManyGroups || least == 0); ++groups) {
    int chunks = divide_up(all_chunks, groups);
    if (groups > 1 && chunks > 1 && chunks % 2 != 0) ++chunks;  // whole sectors
    if (chunks == last) continue;
    last = chunks;
    // Smaller pixels take longer still.
    if (least > 0 && grad_weight_rows_memory_cycles(bytes, 16 * chunks) >= least) break;
    for (int parts = 1; parts <= (groups == 1 && device.copies_bulk ? kMostParts : 1); ++parts) {
      if (splits > 0 && splits % parts != 0) continue;
      for (int tiles_h = 1; tiles_h < 2 * bands; tiles_h *= 2) {
        const GradWeightRowsTiling t =
            grad_weight_rows_cut(shape, args, device.copies_bulk, chunks, parts, min_int(tiles_h, bands));
        if (t.threads > kGradWeightRowsThreads) break;
        look_at(t);
      }
    }
  }
  return best;
}

inline GradWeightRowsTiling grad_weight_rows_tiling(const Problem& p, const Tile& tile) {
  return grad_weight_rows_tiling(grad_weight_rows_shape(p, tile), grad_weight_args(p), 0, kGradWeightRowsH100);
}

}  // namespace depthwise
