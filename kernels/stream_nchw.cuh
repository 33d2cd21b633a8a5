// Streaming depthwise convolution, NCHW, for planes that are large: forward, and grad of input at stride 1 (filter
// flipped).
//
// Serves  any compile-time kernel, stride, dilation and horizontal padding; fp32, fp16, bf16; any alignment; rows of at
//         most kStreamThreads thread tiles.
// Owns    a block walks down a strip of one plane, each thread kColumns neighbouring outputs of every row, its filter in
//         registers (RollingColumns in nchw_tile.cuh).
// Reads   the rows of a plane lie in memory one after the other: a stage of them is one run of 16-byte granules, whatever
//         the width, copied asynchronously some stages ahead of its use. No row is read twice within a strip.
// Writes  straight from registers where rows are aligned; else through shared memory, as runs.
// Memory  a ring of `depth` stages of input rows, and beside it the outputs of one stage.
// Chosen  select.h.
#pragma once

#include "async_copy.cuh"
#include "nchw_tile.cuh"

namespace depthwise {

struct StreamPlan {
  bool staged;       // outputs go through shared memory
  int strips, rows;  // of a plane; output rows of a strip
  int stages;        // of a strip
  int depth, ahead;  // stages in the ring; stages requested before their use
  int threads, shared_bytes;
};

template <class Traits, int kColumns, int kVector>
__global__ void __launch_bounds__(kStreamThreads, RollingColumns<Traits, kColumns, kVector>::kBlocks)
    stream_nchw_kernel(const DirectArgs args, const StreamPlan plan) {
  using T = typename Traits::T;
  using Rolling = RollingColumns<Traits, kColumns, kVector>;
  constexpr int kGranule = 16 / sizeof(T);
  constexpr int kStageRows = Rolling::kStageRows;

  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const ring = reinterpret_cast<T*>(shared_memory);
  const int ring_rows = plan.depth * kStageRows, ring_elements = ring_rows * args.w;  // a multiple of kGranule
  T* const staged = ring + ring_elements + kGranule;

  // The strip. Input rows are counted from its first one on, which padding may put above the image.
  const unsigned plane = blockIdx.x / plan.strips;
  const int first_row = blockIdx.x % plan.strips * plan.rows;
  const int num_rows = min(plan.rows, args.out_h - first_row);
  const int first_in_row = first_row * Traits::kStrideH - args.padding_h;
  const int end_in_row = args.h - first_in_row;

  const T* const input = static_cast<const T*>(args.input);
  const int64_t in_plane = static_cast<int64_t>(args.h) * args.w;
  const T* const origin = input + plane * in_plane + static_cast<int64_t>(first_in_row) * args.w;
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(origin) % 16 / sizeof(T));
  const T* const granules = origin - skew;
  const T* const input_end = input + args.n * args.out_c * in_plane;

  // Requests the rows of a stage that exist, from the first granule on that is not requested yet.
  int next_granule = (skew + max(0, -first_in_row) * args.w) / kGranule;
  int lap = 0;  // the granule that lies at the start of the ring
  const auto request = [&](int stage) {
    while ((next_granule - lap) * kGranule >= ring_elements) lap += ring_elements / kGranule;
    const int end = (skew + min((stage + 1) * kStageRows, end_in_row) * args.w + kGranule - 1) / kGranule;
    for (int g = next_granule + threadIdx.x; g < end; g += blockDim.x) {
      int position = (g - lap) * kGranule;
      if (position >= ring_elements) position -= ring_elements;
      const T* const source = granules + static_cast<int64_t>(g) * kGranule;
      const int64_t left = input_end - source;
      const int bytes = left < kGranule ? static_cast<int>(left * sizeof(T)) : 16;
      copy_16_async(ring + position, source, bytes);
      // The ring's last row may end in the granule that begins the next lap.
      if (position == 0) copy_16_async(ring + ring_elements, source, bytes);
    }
    next_granule = max(next_granule, end);
    commit_copies();
  };
  for (int stage = 0; stage < plan.ahead; ++stage) request(stage);

  const int column = threadIdx.x * kColumns;
  const bool computes = column < args.out_w;
  Rolling rolling;
  rolling.load_channel(args, plane % static_cast<unsigned>(args.out_c));
  const T* const window = ring + skew;
  const int in_column = window_column<Traits>(args, column);
  T* const out = static_cast<T*>(args.out) + (static_cast<int64_t>(plane) * args.out_h + first_row) * args.out_w;

  int slot = 0;  // the ring's row where the stage begins
  for (int stage = 0; stage < plan.stages; ++stage) {
    wait_for_stage(plan.ahead);
    __syncthreads();  // and every thread is done with the stage that the next request overwrites
    request(stage + plan.ahead);

    // Output rows that this stage completes: [begin, end) from `stage_row` - kLag on.
    const int stage_row = stage * Rolling::kStageOutputs;
    T* const stage_out = out + static_cast<int64_t>(stage_row - Rolling::kLag) * args.out_w;
    T* const stage_staged = staged + reinterpret_cast<uintptr_t>(stage_out) % 16 / sizeof(T);
    const int begin = max(0, Rolling::kLag - stage_row);
    const int end = min(Rolling::kStageOutputs, num_rows + Rolling::kLag - stage_row);
    const bool pairs = ((args.out_w | (stage_staged - staged)) & 1) == 0;
    if (computes) {
      rolling.stage(
          [&](T(&row)[Rolling::Row::kWindow], int r) {
            const int in_row = first_in_row + stage * kStageRows + r;
            Rolling::Row::template load<SharedMemory>(row, window + (slot + r) * args.w + in_column, in_column, args.w,
                                                      static_cast<unsigned>(in_row) < static_cast<unsigned>(args.h));
          },
          [&](int o, float (&sum)[kColumns]) {
            const int row = o + Rolling::kLag;
            if (row < begin || row >= end) return;
            if (!plan.staged)
              store_row<min_int(kColumns, kGranule), true>(stage_out + row * args.out_w, column, args.out_w, sum);
            else if (pairs)
              store_row<2, false>(stage_staged + row * args.out_w, column, args.out_w, sum);
            else
              store_row<1, false>(stage_staged + row * args.out_w, column, args.out_w, sum);
          });
    }
    if (plan.staged) {
      __syncthreads();
      store_run(stage_out, stage_staged, begin * args.out_w, end * args.out_w);
    }
    slot = slot + kStageRows == ring_rows ? 0 : slot + kStageRows;
  }
}

// How the planes are cut; threads == 0: not even a ring of three stages fits.
template <class Traits, int kColumns>
StreamPlan plan_stream(const DirectArgs& args, const DeviceLimits& limits) {
  using T = typename Traits::T;
  using Shape = RollingShape<Traits>;
  constexpr int kGranule = 16 / sizeof(T);
  StreamPlan plan{};
  plan.staged = args.out_w % min_int(kColumns, kGranule) != 0 || reinterpret_cast<uintptr_t>(args.out) % 16 != 0;
  plan.threads = divide_up(divide_up(args.out_w, kColumns), 32) * 32;

  // Rows off the granules' boundaries share granules with the stage before: its ring slot must not be in use.
  const bool shares_granules = args.w % kGranule != 0 || reinterpret_cast<uintptr_t>(args.input) % 16 != 0;
  const int64_t stage_elements = static_cast<int64_t>(Shape::kStageRows) * args.w;
  plan.depth = static_cast<int>(stream_depth(4, stage_elements, kGranule));
  const auto bytes = [&] {
    const int64_t outputs = plan.staged ? static_cast<int64_t>(Shape::kStageOutputs) * args.out_w + kGranule : 0;
    return (plan.depth * stage_elements + kGranule + outputs) * static_cast<int64_t>(sizeof(T));
  };
  if (bytes() > limits.shared_bytes_for(2))
    plan.depth = static_cast<int>(stream_depth(shares_granules ? 3 : 2, stage_elements, kGranule));
  if (bytes() > limits.shared_bytes_for(2)) return StreamPlan{};
  plan.shared_bytes = static_cast<int>(bytes());
  plan.ahead = min_int(3, plan.depth - (shares_granules ? 2 : 1));

  const int64_t planes = args.n * args.out_c;
  const int concurrent =
      limits.multiprocessors * min_int(limits.shared_bytes / (plan.shared_bytes + (1 << 10)), 1024 / plan.threads);
  plan.strips =
      best_strips(planes, concurrent, args.out_h, 2 * Shape::kStageOutputs, Shape::kStageOutputs + Shape::kLag);
  plan.rows = divide_up(args.out_h, plan.strips);
  plan.strips = divide_up(args.out_h, plan.rows);
  plan.stages = divide_up((plan.rows - 1) * Traits::kStrideH + Shape::kSpan, Shape::kStageRows);
  return plan;
}

template <class Traits, int kColumns, int kVector>
int launch_stream_nchw(const DirectArgs& args, int, cudaStream_t stream) {
  const StreamPlan plan = plan_stream<Traits, kColumns>(args, device_limits());
  if (plan.threads == 0) return cudaErrorInvalidConfiguration;
  const auto kernel = stream_nchw_kernel<Traits, kColumns, kVector>;
  if (const int error = allow_shared_bytes(kernel, plan.shared_bytes)) return error;
  const int64_t blocks = args.n * args.out_c * plan.strips;
  kernel<<<static_cast<unsigned>(blocks), plan.threads, plan.shared_bytes, stream>>>(args, plan);
  return cudaGetLastError();
}

}  // namespace depthwise
