// What the strips kernels (strips_grad_weight_nchw, strips_grad_weight_nhwc) share: the grad of weight on the tensor cores
// for kernels up to nine rows and columns.
//
// K runs over sixteen strips: pieces of grad_output of the same height and of eight columns (a window), of any images and
// any place in them, all of one channel. A step takes one row of each: B[k][n] is column n of row r of strip k, A[m][k]
// column m of the sixteen of the input row r + i - padding that it meets, and D_i += A * B for every row i of the kernel.
// grad_weight[i][j] is the sum of D_i[m][n] over the diagonal m - n = j + a constant: D_i depends on no row, window or
// image, so kernel_h accumulators serve the whole walk. An input row is loaded once and meets the last kernel_h rows of
// grad_output, which stay in registers. Of D's 128 sums 8 * kernel_w are used (7x7: 44%); 2 ldmatrix and kernel_h products
// serve 128 positions.
#pragma once

#include "cache_policy.cuh"
#include "can_serve_strips.h"
#include "direct.cuh"
#include "exact_grad_weight.cuh"
#include "tensor_core.cuh"

namespace depthwise {

constexpr int kSumsOfProduct = 2 * kWindow * kWindow;  // D: sixteen columns of input by eight of grad_output

// How a launch is cut. A patch: `rows` rows and kWindow * `windows` columns of grad_output of an image, and the input that
// they meet: kWindow * (windows + 1) columns from `shift` to the left of them on, shift - padding_w = 0 .. 9 - kernel_w.
struct StripsTiling {
  int windows, segments, pieces, rows;  // patches beside and below each other in an image
  int patches, lines, rounds;           // of a channel; that a round takes; of a channel
  int block_rounds;                     // of a block, at most
  int steps, stages, buffers;           // of a round; of a round; in shared memory
  int head;                             // steps of the first stage that are left out; if any, it has no input
  int shift, first_column;              // of input, that the first window meets
  int pitch;                            // shared memory: elements from line to line
  int lanes;                            // NCHW: threads that copy a line
  int input_vector, grad_vector;        // NCHW: elements a copy

  __host__ __device__ int blocks() const { return 2 * windows + 1; }  // of eight columns, of a line
  // NCHW: of a block, a window of sixteen lines each.
  int warps() const { return lines / kStripsAtOnce * windows; }
};

struct Patch {
  int64_t image;
  int first_row, first_column;  // of grad_output; the column counted from the first window's
};

__device__ __forceinline__ Patch patch_at(const StripsTiling& tiling, int idx) {
  const int segment = idx % tiling.segments, rest = idx / tiling.segments;
  return {rest / tiling.pieces, rest % tiling.pieces * tiling.rows, segment * tiling.windows * kWindow};
}

// The strip and the columns whose row this lane names to ldmatrix; the other order of matrices would cost moves. Of
// grad_output it is strip lane % 16.
__device__ __forceinline__ int input_strip_of(int lane) { return lane % 8 + lane / 16 * 8; }
__device__ __forceinline__ int input_column_of(int lane) { return lane / 8 % 2 * kWindow; }

// The products of an input row with the rows of grad_output that it meets, of which kNewest is the last; the others came
// before it, in the order of their indices.
template <class T, int kNewest, int kKernelH>
__device__ __forceinline__ void multiply_strips(float (&sum)[kKernelH][4], const unsigned (&input)[4],
                                                const unsigned (&grads)[kKernelH][2]) {
#pragma unroll
  for (int i = 0; i < kKernelH; ++i) {
    const unsigned (&grad)[2] = grads[(kNewest + kKernelH - i) % kKernelH];
    multiply_k16<T>(sum[i], input[0], input[1], input[2], input[3], grad[0], grad[1]);
  }
}

// The sums of grad_output: products with ones.
template <class T>
__device__ __forceinline__ void multiply_ones(float (&bias)[4], const unsigned (&grad)[2]) {
  constexpr unsigned kOnes = is_bfloat16<T> ? 0x3f803f80u : 0x3c003c00u;
  multiply_k16<T>(bias, kOnes, kOnes, kOnes, kOnes, grad[0], grad[1]);
}
// Of all columns: rows of the product are alike.
__device__ __forceinline__ float sum_of_ones(const float (&bias)[4]) {
  float sum = bias[0] + bias[1];
  sum += __shfl_xor_sync(~0u, sum, 1);
  return sum + __shfl_xor_sync(~0u, sum, 2);
}

// A stage's rows of grad_output, without products: those from `head` on; of the others there are none. `masks`:
// of the pairs of strips that exist.
template <class T, int kRows, int kKernelH>
__device__ __forceinline__ void take_grads(unsigned (&grads)[kKernelH][2], float (&bias)[4], bool has_bias,
                                           unsigned address, unsigned row_bytes, const unsigned (&masks)[2], int head) {
  for_each_index<kRows>([&](auto row) {
    constexpr int kRow = decltype(row)::value;
    if (kRow < head) return;
    ptx::load_matrices_transposed(grads[kRow % kKernelH], address + kRow * row_bytes);
    grads[kRow % kKernelH][0] &= masks[0], grads[kRow % kKernelH][1] &= masks[1];
    if (has_bias) multiply_ones<T>(bias, grads[kRow % kKernelH]);
  });
}

// A product as [m][n], for diagonals to be read from.
__device__ __forceinline__ void store_product(float* shared, const float (&sum)[4]) {
  const int lane = threadIdx.x % 32;
  float* const to = shared + lane / 4 * kWindow + lane % 4 * 2;
  *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
  *reinterpret_cast<float2*>(to + kWindow * kWindow) = make_float2(sum[2], sum[3]);
}

// Eight lanes' values, one for each column of a diagonal.
__device__ __forceinline__ float sum_of_columns(float value) {
#pragma unroll
  for (int offset = 1; offset < kWindow; offset *= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// One tap's share of rounds [begin, end), term by term within bounds: for sums that are not finite. Zeros stand for the
// padding in both matrices, and zero times infinity poisons a sum; but whatever is not finite reaches a sum then.
template <class T>
__device__ __forceinline__ float exact_strips(const GradWeightArgs& args, const StripsTiling& tiling,
                                              bool channels_last, int64_t channel, int tap, int begin, int end) {
  const int last = min(end * tiling.lines, tiling.patches);
  float sum = 0.f;
#pragma unroll 1
  for (int idx = begin * tiling.lines; idx < last; ++idx) {
    const Patch patch = patch_at(tiling, idx);
    const int first_column = tiling.first_column + tiling.shift + patch.first_column;
    sum += exact_grad_weight<T>(
        args, channels_last, channel, tap / args.kernel_w, tap % args.kernel_w,
        {patch.image, patch.image + 1, patch.first_row, min(patch.first_row + tiling.rows, args.out_h), first_column,
         first_column + tiling.windows * kWindow});
  }
  return sum;
}

// Bits [low, high) of the first kCount.
template <int kCount>
__device__ __forceinline__ unsigned bits_between(int low, int high) {
  const auto below = [](int end) { return (1u << min(max(end, 0), kCount)) - 1; };
  return below(high) & ~below(low);
}

// Cuts images into as many pieces as cost least, if that is less than `least`; a stage of a round of `lines` patches costs
// `stage_cost`.
inline void cut_into_pieces(const GradWeightArgs& args, int lines, int stage_rows, int stage_cost, int64_t& least,
                            StripsTiling& tiling) {
  constexpr int kMostPieces = 32;
  for (int most = 1; most <= min_int(kMostPieces, args.out_h); ++most) {
    const int rows = divide_up(args.out_h, most), pieces = divide_up(args.out_h, rows);
    const int64_t patches = args.n * pieces * tiling.segments, rounds = divide_up<int64_t>(patches, lines);
    const int64_t block_rounds = divide_up<int64_t>(rounds, args.splits);
    if (block_rounds * stage_cost >= least) break;  // however few stages
    int steps = rows + args.kernel_h - 1;
    if (pieces == 1) steps = max_int(rows, min_int(steps, args.h + args.padding_h));  // all below an image is padding
    const int stages = divide_up(steps, stage_rows);
    const int64_t cost = block_rounds * stages * stage_cost;
    if (patches > INT32_MAX - lines || cost >= least) continue;
    least = cost;
    tiling.steps = steps, tiling.stages = stages;
    // The first stage is one without products if that makes no more stages, as all above an image is padding too.
    const int above = pieces == 1 ? args.padding_h : 0;
    const bool no_input = above > 0 && above < stage_rows && above < steps;
    tiling.head = no_input && 1 + divide_up(steps - above, stage_rows) <= stages ? stage_rows - above : 0;
    tiling.pieces = pieces, tiling.rows = rows, tiling.lines = lines;
    tiling.patches = static_cast<int>(patches), tiling.rounds = static_cast<int>(rounds);
    tiling.block_rounds = static_cast<int>(block_rounds);
  }
}

}  // namespace depthwise
