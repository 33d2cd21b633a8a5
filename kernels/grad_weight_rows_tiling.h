// How grad_weight_rows_nhwc cuts a problem (see there): a pure function of the problem's sizes and of a multiprocessor's
// shared memory.
#pragma once

#include "variants.h"

namespace depthwise {

constexpr int kGradWeightRowsColumns = 4;    // of grad_output, a thread
constexpr int kGradWeightRowsThreads = 512;  // of a block, and of a multiprocessor, at most
constexpr int kMostGradWeightRowsAhead = 3;
// Of the sums, live rows of grad_output and a row of the window of all channels of a thread.
constexpr int kMaxGradWeightRowsRegisters = 112;

// What a thread takes; `vector` 0: registers do not hold the sums of one channel.
struct GradWeightRowsShape {
  int vector, rows;                 // channels; rows of grad_output
  int window_rows, window_columns;  // of input
  int kernel_h, stride_h, stride_w, taps;
};

constexpr GradWeightRowsShape grad_weight_rows_shape(int kernel_h, int kernel_w, int stride_h, int stride_w, int rows) {
  GradWeightRowsShape shape{0,
                            rows,
                            window_size(rows, stride_h, kernel_h, 1),
                            window_size(kGradWeightRowsColumns, stride_w, kernel_w, 1),
                            kernel_h,
                            stride_h,
                            stride_w,
                            kernel_h * kernel_w};
  const int live = min_int(rows, rolling_live_rows(kernel_h, stride_h, 1));
  const int registers = shape.taps + live * kGradWeightRowsColumns + shape.window_columns;
  for (int vector = 4; vector > 0 && shape.vector == 0; vector /= 2)
    if (vector * registers <= kMaxGradWeightRowsRegisters) shape.vector = vector;
  return shape;
}
inline GradWeightRowsShape grad_weight_rows_shape(const Problem& p, const Tile& tile) {
  return grad_weight_rows_shape(static_cast<int>(p.kernel_h), static_cast<int>(p.kernel_w),
                                static_cast<int>(p.stride_h), static_cast<int>(p.stride_w), tile.rows);
}

// A unit of work is a band: the rows of grad_output that a thread takes, of one image. A block: thread tiles of all its
// columns, and as many channels as fit.
struct GradWeightRowsTiling {
  int lanes, tiles_w, threads;  // of a block: `vector` channels each; thread tiles of a row; 0 threads: nothing fits
  int groups;                   // of channels
  int bands, units;             // of an image; of all
  int ahead, blocks;            // units under way; blocks of a multiprocessor
  // Shared memory: rows of input, columns of either tensor, elements of a pixel; bytes.
  int ring_rows, in_columns, grad_columns, pixel, bytes;
};

// The sizes that follow from the channels of a block, in eights, and the units under way.
inline GradWeightRowsTiling grad_weight_rows_cut(const GradWeightRowsShape& shape, int64_t n, int channels, int out_h,
                                                 int out_w, int eights, int ahead) {
  GradWeightRowsTiling t{};
  t.lanes = eights * 8 / shape.vector;
  t.groups = divide_up(divide_up(channels, 8), eights);
  t.tiles_w = divide_up(out_w, kGradWeightRowsColumns);
  t.threads = divide_up(t.lanes * t.tiles_w, 32) * 32;
  t.bands = divide_up(out_h, shape.rows);
  t.units = static_cast<int>(n) * t.bands;
  t.ahead = ahead;
  // A band's window, and the rows that the units under way add; those that begin an image have none of the band before.
  t.ring_rows = shape.window_rows + ahead * shape.rows * shape.stride_h +
                divide_up(ahead, t.bands) * (shape.kernel_h - shape.stride_h);
  t.in_columns = (t.tiles_w - 1) * kGradWeightRowsColumns * shape.stride_w + shape.window_columns;
  t.grad_columns = t.tiles_w * kGradWeightRowsColumns;
  // Neighbouring tiles of few lanes lie in different banks.
  t.pixel = eights % 2 == 0 && eights < 16 ? (eights + 1) * 8 : eights * 8;
  const int64_t pixels = int64_t{t.ring_rows} * t.in_columns + int64_t{t.grad_columns} * (ahead + 1) * shape.rows;
  const int64_t ring = 2 * pixels * t.pixel, sums = int64_t{4} * (shape.taps + 1) * shape.vector * (t.threads + 1);
  t.bytes = static_cast<int>(min_int64(ring > sums ? ring : sums, kInt32Max));
  return t;
}

// The fewest groups of channels that fit, the most blocks of a multiprocessor, and the most units under way.
inline GradWeightRowsTiling grad_weight_rows_tiling(const GradWeightRowsShape& shape, int64_t n, int channels,
                                                    int out_h, int out_w, int shared_bytes, int shared_bytes_block) {
  for (int eights = divide_up(channels, 8); eights > 0; --eights) {
    const int threads = grad_weight_rows_cut(shape, n, channels, out_h, out_w, eights, 1).threads;
    for (int blocks = kGradWeightRowsThreads / threads; blocks > 0; --blocks)
      for (int ahead = kMostGradWeightRowsAhead; ahead > 0; --ahead) {
        GradWeightRowsTiling t = grad_weight_rows_cut(shape, n, channels, out_h, out_w, eights, ahead);
        t.blocks = blocks;
        if (t.bytes <= min_int(shared_bytes_block, shared_bytes / blocks - (1 << 10))) return t;
      }
  }
  return {};
}

// An H100's.
inline GradWeightRowsTiling grad_weight_rows_tiling(const Problem& p, const Tile& tile) {
  constexpr int kSharedBytes = kMultiprocessorSharedBytes, kSharedBytesBlock = kSharedBytes - (1 << 10);
  return grad_weight_rows_tiling(grad_weight_rows_shape(p, tile), p.n, static_cast<int>(p.c), static_cast<int>(p.out_h),
                                 static_cast<int>(p.out_w), kSharedBytes, kSharedBytesBlock);
}

}  // namespace depthwise
