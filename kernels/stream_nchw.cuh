// Streaming depthwise convolution, NCHW: forward, and grad of input at stride 1 (filter flipped).
//
// Serves  any compile-time kernel, stride, dilation and horizontal padding; fp32, fp16, bf16; any width and alignment.
// Owns    a block walks down a strip of one plane, or over groups of whole small planes, a chunk of output rows at a
//         time; each thread computes kColumns x kRows neighbouring outputs (nchw_tile.cuh).
// Reads   rows of a plane, and planes, lie in memory one after the other: a chunk is one run of 16-byte granules,
//         whatever the width. They are copied asynchronously into a ring of rows, a chunk ahead of their use, and no row
//         is read twice within a strip.
// Writes  straight from registers where rows are aligned; else through shared memory, since a chunk's outputs are one
//         run as well: only its two ends are not whole granules.
// Memory  ring: two chunks of input rows and the kernel's halo; beside it one chunk of outputs. plan_stream bounds it.
// Chosen  select.h.
#pragma once

#include "async_copy.cuh"
#include "nchw_tile.cuh"

namespace depthwise {

constexpr int kStreamThreads = 256;  // a block, at most

// Exact for dividends below 2^16.
struct SmallDivider {
  unsigned divisor, multiplier;

  explicit SmallDivider(unsigned d = 1) : divisor(d), multiplier(d > 1 ? 0xffffffffu / d + 1 : 0) {}
  __device__ __forceinline__ unsigned divide(unsigned value, unsigned* remainder) const {
    const unsigned quotient = divisor > 1 ? __umulhi(value, multiplier) : value;
    *remainder = value - quotient * divisor;
    return quotient;
  }
};

struct StreamPlan {
  bool whole_planes;   // a chunk is `planes` planes; else `rows` output rows of one plane
  bool staged;         // outputs go through shared memory
  int planes, rows;    // of a chunk
  int chunks, strips;  // chunks of a block; blocks of a plane (whole planes: 1)
  int advance, need;   // input rows from a chunk to the next, and of a chunk
  int ring_rows;
  int threads, shared_bytes;
  SmallDivider tiles_w, tiles_h;
};

// As many blocks a multiprocessor as the filter's registers allow without spills.
template <class Traits, int kColumns, int kRows, int kVector>
__global__ void __launch_bounds__(kStreamThreads, Traits::kTaps <= 9 ? 3 : Traits::kTaps <= 25 ? 2 : 1)
    stream_nchw_kernel(const DirectArgs args, const StreamPlan plan) {
  using T = typename Traits::T;
  using Row = NchwRow<Traits, kColumns, kVector>;
  constexpr int kGranule = 16 / sizeof(T);
  constexpr int kRowsIn = window_size(kRows, Traits::kStrideH, Traits::kKernelH, Traits::kDilationH);

  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const ring = reinterpret_cast<T*>(shared_memory);
  const int ring_elements = plan.ring_rows * args.w;  // a multiple of kGranule
  T* const staged = ring + ring_elements + kGranule;

  // The strip. Input rows are counted from its first one on, which padding may put above the image.
  const bool whole = plan.whole_planes;
  const int strip_planes = whole ? plan.chunks * plan.planes : 1;
  const unsigned first_plane = blockIdx.x / plan.strips * strip_planes;
  const int num_planes = static_cast<int>(min(static_cast<int64_t>(strip_planes), args.n * args.out_c - first_plane));
  const int first_row = whole ? 0 : blockIdx.x % plan.strips * plan.chunks * plan.rows;
  const int first_in_row = whole ? 0 : first_row * Traits::kStrideH - args.padding_h;
  const int begin_in_row = max(0, -first_in_row);
  const int end_in_row = whole ? num_planes * args.h : args.h - first_in_row;

  const int64_t in_plane = static_cast<int64_t>(args.h) * args.w,
                out_plane = static_cast<int64_t>(args.out_h) * args.out_w;
  const T* const input = static_cast<const T*>(args.input);
  const T* const origin = input + first_plane * in_plane + static_cast<int64_t>(first_in_row) * args.w;
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(origin) % 16 / sizeof(T));
  const T* const granules = origin - skew;
  const T* const input_end = input + args.n * args.out_c * in_plane;

  // Requests the rows below `row` that are not requested yet.
  int next_granule = (skew + begin_in_row * args.w) / kGranule;
  int lap = 0;  // the granule that lies at the start of the ring
  const auto request = [&](int row) {
    while ((next_granule - lap) * kGranule >= ring_elements) lap += ring_elements / kGranule;
    const int end = (skew + min(row, end_in_row) * args.w + kGranule - 1) / kGranule;
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

  request(plan.need);
  int chunk_slot = 0;  // the ring's row where the chunk's input begins
  for (int chunk = 0; chunk < plan.chunks; ++chunk) {
    const int chunk_row = first_row + (whole ? 0 : chunk * plan.rows);
    const int chunk_planes = whole ? min(plan.planes, num_planes - chunk * plan.planes) : 1;
    if (chunk_planes <= 0 || chunk_row >= args.out_h) break;
    request(chunk + 1 < plan.chunks ? (chunk + 1) * plan.advance + plan.need : 0);
    wait_for_copies<1>();
    __syncthreads();

    T* const out = static_cast<T*>(args.out) + (first_plane + (whole ? chunk * plan.planes : 0)) * out_plane +
                   static_cast<int64_t>(chunk_row) * args.out_w;
    const int out_skew = static_cast<int>(reinterpret_cast<uintptr_t>(out) % 16 / sizeof(T));
    const int chunk_rows = min(plan.rows, args.out_h - chunk_row);

    // Compute.
    const unsigned tiles = plan.tiles_w.divisor * plan.tiles_h.divisor * chunk_planes;
#pragma unroll 1
    for (unsigned tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
      unsigned tile_w, tile_h;
      const int plane = plan.tiles_h.divide(plan.tiles_w.divide(tile, &tile_w), &tile_h);  // of the chunk
      const int column = tile_w * kColumns, row = tile_h * kRows;
      if (row >= chunk_rows) continue;
      const int in_row = (chunk_row + row) * Traits::kStrideH - args.padding_h;
      const int slot = chunk_slot + (whole ? plane * args.h + in_row : row * Traits::kStrideH);
      const auto load_row = [&](T(&window)[Row::kWindow], int r) {
        const int row_slot = slot + r - (slot + r >= plan.ring_rows ? plan.ring_rows : 0);
        Row::template load<SharedMemory>(window, ring + skew + row_slot * args.w, column * Traits::kStrideW, args.w,
                                         static_cast<unsigned>(in_row + r) < static_cast<unsigned>(args.h));
      };

      const unsigned channel =
          (first_plane + (whole ? chunk * plan.planes + plane : 0)) % static_cast<unsigned>(args.out_c);
      float weight[Traits::kTaps];
      load_filter<Traits>(weight, args, channel);
      const float bias = args.bias ? load(static_cast<const T*>(args.bias) + channel) : 0.f;

      const int out_row = plane * args.out_h + row;
      T* const shared_out = staged + out_skew + out_row * args.out_w;
      T* const global_out = out + static_cast<int64_t>(out_row) * args.out_w;
      convolve_tile<Traits, kColumns, kRows, kVector, min_int(kRowsIn, Traits::kTaps <= 25 ? 2 : 1)>(
          weight, bias, load_row, [&](int o, float (&sum)[kColumns]) {
            constexpr int kWidest = min_int(kColumns, kGranule);
            if (row + o >= chunk_rows) return;
            if (!plan.staged)
              store_row<kWidest, true>(global_out + o * static_cast<int64_t>(args.out_w), column, args.out_w, sum);
            else if (((args.out_w | out_skew) & 1) == 0)
              store_row<2, false>(shared_out + o * args.out_w, column, args.out_w, sum);
            else
              store_row<1, false>(shared_out + o * args.out_w, column, args.out_w, sum);
          });
    }
    __syncthreads();

    // Store.
    if (plan.staged) {
      const int end = out_skew + (whole ? chunk_planes * args.out_h : chunk_rows) * args.out_w;
      for (int k = threadIdx.x * kGranule; k < end; k += blockDim.x * kGranule) {
        if (k >= out_skew && k + kGranule <= end) {
          store_streaming(out - out_skew + k, *reinterpret_cast<const Vector<T, kGranule>*>(staged + k));
        } else {
          for (int e = max(k, out_skew); e < min(k + kGranule, end); ++e) out[e - out_skew] = staged[e];
        }
      }
    }
    chunk_slot += plan.advance;
    if (chunk_slot >= plan.ring_rows) chunk_slot -= plan.ring_rows;
  }
}

// How the planes are cut into blocks and chunks; threads == 0: a chunk of the smallest size does not fit.
template <class Traits, int kColumns, int kRows>
StreamPlan plan_stream(const DirectArgs& args, const DeviceLimits& limits) {
  using T = typename Traits::T;
  constexpr int kGranule = 16 / sizeof(T);
  constexpr int kSpan = (Traits::kKernelH - 1) * Traits::kDilationH + 1;
  constexpr int kBlocksPerMultiprocessor = 8;  // enough to even out the end of the launch
  const int tiles_w = divide_up(args.out_w, kColumns), plane_tiles = tiles_w * divide_up(args.out_h, kRows);
  const int64_t planes = args.n * args.out_c;
  const int wanted_blocks = kBlocksPerMultiprocessor * limits.multiprocessors;
  const int slack = divide_up(kGranule - 1, args.w);  // rows that the last granule of a request reaches into

  const int most_bytes = limits.shared_bytes_for(3);
  StreamPlan plan{};
  plan.staged = args.out_w % min_int(kColumns, kGranule) != 0 || reinterpret_cast<uintptr_t>(args.out) % 16 != 0;
  const auto fits = [&](int advance, int need, int out_rows) {
    plan.advance = advance;
    plan.need = need;
    plan.ring_rows = advance + need + slack;
    while (plan.ring_rows * args.w % kGranule != 0) ++plan.ring_rows;
    const int64_t elements = static_cast<int64_t>(plan.ring_rows) * args.w + kGranule +
                             (plan.staged ? static_cast<int64_t>(out_rows) * args.out_w + kGranule : 0);
    plan.shared_bytes = static_cast<int>(elements * sizeof(T));
    return elements * sizeof(T) <= static_cast<unsigned>(most_bytes);
  };
  const auto fits_planes = [&](int64_t p) { return fits(p * args.h, p * args.h, p * args.out_h); };
  const auto fits_rows = [&](int rows) {
    return fits(rows * Traits::kStrideH, (rows - 1) * Traits::kStrideH + kSpan, rows);
  };

  plan.whole_planes = plane_tiles <= kStreamThreads && fits_planes(1);
  if (plan.whole_planes) {
    plan.planes = kStreamThreads / plane_tiles;
    if (plan.planes > planes / wanted_blocks) plan.planes = max_int(1, static_cast<int>(planes / wanted_blocks));
    while (!fits_planes(plan.planes)) --plan.planes;
    plan.rows = args.out_h;
    plan.strips = 1;
    plan.chunks = max_int(1, min_int(8, static_cast<int>(divide_up<int64_t>(planes, plan.planes) / wanted_blocks)));
  } else {
    plan.planes = 1;
    int tall = max_int(1, min_int(kStreamThreads / tiles_w, divide_up(args.out_h, kRows)));  // tiles of a chunk
    while (tall > 1 && !fits_rows(tall * kRows)) --tall;
    if (!fits_rows(tall * kRows)) return StreamPlan{};
    plan.rows = tall * kRows;
    // Every strip reads its halo again: 128 rows make that 2% for a 3x3 kernel.
    const int chunks = divide_up(args.out_h, plan.rows);
    plan.chunks = min_int(chunks, divide_up(128, plan.rows));
    while (plan.chunks > 1 && planes * divide_up(chunks, plan.chunks) < wanted_blocks) --plan.chunks;
    plan.strips = divide_up(chunks, plan.chunks);
  }
  plan.tiles_w = SmallDivider(tiles_w);
  plan.tiles_h = SmallDivider(divide_up(plan.rows, kRows));
  const int tiles = tiles_w * divide_up(plan.rows, kRows) * plan.planes;
  plan.threads = min_int(kStreamThreads, divide_up(tiles, 32) * 32);
  return plan;
}

template <class Traits, int kColumns, int kRows, int kVector>
int launch_stream_nchw(const DirectArgs& args, cudaStream_t stream) {
  const StreamPlan plan = plan_stream<Traits, kColumns, kRows>(args, device_limits());
  if (plan.threads == 0) return cudaErrorInvalidConfiguration;
  const auto kernel = stream_nchw_kernel<Traits, kColumns, kRows, kVector>;
  if (const int error = allow_shared_bytes(kernel, plan.shared_bytes)) return error;
  const int64_t planes = args.n * args.out_c;
  const int64_t blocks =
      plan.whole_planes ? divide_up<int64_t>(planes, plan.planes * plan.chunks) : planes * plan.strips;
  kernel<<<static_cast<unsigned>(blocks), plan.threads, plan.shared_bytes, stream>>>(args, plan);
  return cudaGetLastError();
}

// The tiles of select.h's table, in its order.
template <class Traits>
int launch_stream_nchw(const DirectArgs& args, int tile, cudaStream_t stream) {
  if constexpr (sizeof(typename Traits::T) == 4) {
    switch (tile) {
      case 0: return launch_stream_nchw<Traits, 4, 8, 4>(args, stream);
      case 1: return launch_stream_nchw<Traits, 4, 4, 2>(args, stream);
      case 2: return launch_stream_nchw<Traits, 4, 4, 1>(args, stream);
    }
  } else {
    switch (tile) {
      case 0: return launch_stream_nchw<Traits, 8, 4, 8>(args, stream);
      case 1: return launch_stream_nchw<Traits, 4, 4, 2>(args, stream);
      case 2: return launch_stream_nchw<Traits, 4, 4, 1>(args, stream);
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace depthwise
