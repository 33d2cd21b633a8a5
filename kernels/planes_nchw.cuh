// Depthwise convolution of small planes, NCHW: forward, and grad of input at stride 1 (filter flipped).
//
// Serves  any compile-time kernel, stride, dilation and horizontal padding; fp32, fp16, bf16; any alignment; planes that
//         fit shared memory.
// Owns    a block computes several whole planes; each thread kColumns neighbouring outputs of every row of a strip of one
//         of them, its filter in registers (RollingColumns in nchw_tile.cuh).
// Reads   planes lie in memory one after the other: those of a block are one run of 16-byte granules, whatever their
//         size, all requested before the first is used.
// Writes  straight from registers where rows are aligned; else through shared memory, as one run.
// Memory  the block's input planes, and its output planes where they are staged.
// Chosen  select.h.
#pragma once

#include "async_copy.cuh"
#include "nchw_tile.cuh"

namespace depthwise {

struct PlanesPlan {
  bool staged;       // outputs go through shared memory
  int planes;        // of a block
  int strips, rows;  // of a plane; output rows of a strip
  int stages;        // of a strip
  int threads, shared_bytes;
};

template <class Traits, int kColumns, int kVector>
__global__ void __launch_bounds__(kStreamThreads, RollingColumns<Traits, kColumns, kVector>::kBlocks)
    planes_nchw_kernel(const DirectArgs args, const PlanesPlan plan) {
  using T = typename Traits::T;
  using Rolling = RollingColumns<Traits, kColumns, kVector>;
  constexpr int kGranule = 16 / sizeof(T);

  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const shared_input = reinterpret_cast<T*>(shared_memory);
  const int in_plane = args.h * args.w, out_plane = args.out_h * args.out_w;
  const unsigned first_plane = blockIdx.x * plan.planes;
  const int num_planes = static_cast<int>(min(static_cast<int64_t>(plan.planes), args.n * args.out_c - first_plane));

  // Load the planes.
  const T* const input = static_cast<const T*>(args.input) + static_cast<int64_t>(first_plane) * in_plane;
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(input) % 16 / sizeof(T));
  const int in_elements = skew + num_planes * in_plane;
  for (int k = threadIdx.x * kGranule; k < in_elements; k += blockDim.x * kGranule)
    copy_16_async(shared_input + k, input - skew + k, min(16, (in_elements - k) * static_cast<int>(sizeof(T))));
  commit_copies();

  // Compute.
  const int tiles_w = divide_up(args.out_w, kColumns);
  const int tile = threadIdx.x / tiles_w;
  const int column = (threadIdx.x - tile * tiles_w) * kColumns;
  const int plane = tile / plan.strips;
  const int first_row = (tile - plane * plan.strips) * plan.rows;
  const bool computes = plane < num_planes && first_row < args.out_h;
  Rolling rolling;
  rolling.load_channel(args, (first_plane + (computes ? plane : 0)) % static_cast<unsigned>(args.out_c));

  T* const out = static_cast<T*>(args.out) + static_cast<int64_t>(first_plane) * out_plane;
  const int padded_planes = (kGranule + plan.planes * in_plane + kGranule - 1) / kGranule * kGranule;
  T* const staged = shared_input + padded_planes + reinterpret_cast<uintptr_t>(out) % 16 / sizeof(T);
  wait_for_copies<0>();
  __syncthreads();
  if (computes) {
    const T* const window = shared_input + skew + plane * in_plane;
    const int last_row = min(first_row + plan.rows, args.out_h);
    const bool pairs = ((args.out_w | out_plane | reinterpret_cast<uintptr_t>(out) % 16 / sizeof(T)) & 1) == 0;
    const int in_column = window_column<Traits>(args, column);
    for (int stage = 0; stage < plan.stages; ++stage) {
      const int stage_row = first_row + stage * Rolling::kStageOutputs;
      const int in_row = stage_row * Traits::kStrideH - args.padding_h;
      rolling.stage(
          [&](T(&row)[Rolling::Row::kWindow], int r) {
            Rolling::Row::template load<SharedMemory>(
                row, window + (in_row + r) * args.w + in_column, in_column, args.w,
                static_cast<unsigned>(in_row + r) < static_cast<unsigned>(args.h));
          },
          [&](int o, float (&sum)[kColumns]) {
            const int row = stage_row + o;
            if (row < first_row || row >= last_row) return;
            const int offset = plane * out_plane + row * args.out_w;
            if (!plan.staged)
              store_row<min_int(kColumns, kGranule), true>(out + offset, column, args.out_w, sum);
            else if (pairs)
              store_row<2, false>(staged + offset, column, args.out_w, sum);
            else
              store_row<1, false>(staged + offset, column, args.out_w, sum);
          });
    }
  }

  // Store.
  if (!plan.staged) return;
  __syncthreads();
  store_run(out, staged, 0, num_planes * out_plane);
}

// How many planes a block takes; threads == 0: not even one fits.
template <class Traits, int kColumns>
PlanesPlan plan_planes(const DirectArgs& args, const DeviceLimits& limits) {
  using T = typename Traits::T;
  using Shape = RollingShape<Traits>;
  constexpr int kGranule = 16 / sizeof(T);
  // Enough threads to hide the latencies of shared memory and to keep loads under way while others compute.
  constexpr int kThreadsPerMultiprocessor = 512;
  constexpr int kBlockBytes = 24 << 10,
                kBlockThreads = 128;  // wanted: several blocks at different points of their work
  PlanesPlan plan{};
  plan.staged = args.out_w % min_int(kColumns, kGranule) != 0 || reinterpret_cast<uintptr_t>(args.out) % 16 != 0;
  const int64_t planes = args.n * args.out_c;
  const int tiles_w = divide_up(args.out_w, kColumns);
  const int64_t in_plane = static_cast<int64_t>(args.h) * args.w,
                out_plane = static_cast<int64_t>(args.out_h) * args.out_w;
  const auto bytes = [&](int64_t count) {
    const int64_t elements = divide_up<int64_t>(count * in_plane + kGranule, kGranule) * kGranule +
                             (plan.staged ? count * out_plane + kGranule : 0);
    return elements * static_cast<int64_t>(sizeof(T));
  };

  // A strip begins with rows that its neighbour reads as well: no more of them than occupancy asks for.
  const int64_t threads = planes * tiles_w;
  const int64_t wanted = static_cast<int64_t>(limits.multiprocessors) * kThreadsPerMultiprocessor;
  plan.strips = static_cast<int>(divide_up(wanted, threads));
  plan.strips = max_int(1, min_int(plan.strips, args.out_h / (2 * max_int(Shape::kStageOutputs, Shape::kLag))));
  plan.strips = min_int(plan.strips, kStreamThreads / tiles_w);
  plan.rows = divide_up(args.out_h, plan.strips);
  plan.strips = divide_up(args.out_h, plan.rows);
  plan.stages = divide_up((plan.rows - 1) * Traits::kStrideH + Shape::kSpan, Shape::kStageRows);

  const int plane_threads = tiles_w * plan.strips;
  plan.planes = 1;
  while (bytes(2 * plan.planes) <= kBlockBytes && 2 * plan.planes * plane_threads <= kBlockThreads) plan.planes *= 2;
  if (bytes(plan.planes) > limits.shared_bytes_for(2)) return PlanesPlan{};
  plan.threads = divide_up(plan.planes * plane_threads, 32) * 32;
  plan.shared_bytes = static_cast<int>(bytes(plan.planes));
  return plan;
}

template <class Traits, int kColumns, int kVector>
int launch_planes_nchw(const DirectArgs& args, int, cudaStream_t stream) {
  const PlanesPlan plan = plan_planes<Traits, kColumns>(args, device_limits());
  if (plan.threads == 0) return cudaErrorInvalidConfiguration;
  const auto kernel = planes_nchw_kernel<Traits, kColumns, kVector>;
  if (const int error = allow_shared_bytes(kernel, plan.shared_bytes)) return error;
  const int64_t blocks = divide_up<int64_t>(args.n * args.out_c, plan.planes);
  kernel<<<static_cast<unsigned>(blocks), plan.threads, plan.shared_bytes, stream>>>(args, plan);
  return cudaGetLastError();
}

}  // namespace depthwise
