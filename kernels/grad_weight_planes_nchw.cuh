// Grad of weight and bias, NCHW, of planes in a ring of shared memory.
//
// Serves  kernels whose sums fit registers (up to 5x5 in strips of four columns), strides 1 and 2, padding below the
//         kernel's height; fp32, fp16, bf16; depth multiplier; aligned tensors of images of whole 16 bytes. One tile a
//         specialisation: rows are read in words of kVector (input) and kGradVector elements (grad_output).
// Owns    a block: a run of units of work, all blocks as many (grad_weight_planes_tiling.h). A unit is a plane, some small
//         ones of neighbouring channels, or a band of a large one. A thread: a strip of kColumns columns and a cut of the
//         steps of one plane or band of every stage. No pair of rows is met twice; the rows of grad_output above a cut are
//         read again, from shared memory.
// Memory  a ring of two stages of some units. Each is one piece of either tensor: from sm_90 on, bulk copies which the
//         first warp asks for; before, copies of 16 bytes by all threads. What lies around a piece, up to its 16 bytes,
//         comes along. Warps wait for a stage's arrival alone; the first one, before it asks for more, for the others'.
// Share   of useful multiplies: all but those of ragged strips and of a last stage's empty places.
// Reduces each warp by shuffles, into its row of shared memory; the rows, then the splits (what each block has of a channel)
//         in order. No atomics.
// Zeros   for padding and ragged strips, times infinity: sums that are not finite are taken anew, pair by pair.
// Chosen  select_grad_weight.h.
#pragma once

#include "bulk_copy.cuh"
#include "grad_weight_nchw.cuh"
#include "grad_weight_planes_tiling.h"

namespace depthwise {

static_assert(kPlanesDepth == 2);
using PlanesBulkCopies = BulkCopies<kPlanesDepth, true>;

// So many steps are added up one by one: equal terms would round the same way every time.
constexpr int kPlanesStepsOfSums = 32;

template <class T, int kKernelH, int kKernelW, int kStrideH, int kStrideW, int kDilationH, int kDilationW, int kColumns,
          int kVector, int kGradVector, int kPhase>
struct GradWeightPlanesTraits : GradWeightNchwTraits<T, kKernelH, kKernelW, kStrideH, kStrideW, kDilationH, kDilationW,
                                                     kColumns, kVector, kGradVector, kPhase, true, false> {
  static_assert(kDilationH == 1 && kDilationW == 1);
  static constexpr GradWeightPlanesShape kShape = {kKernelH, kStrideH, kColumns, static_cast<int>(sizeof(T))};
};

// Steps of a band, of which rows are in shared memory: `in_row` and `grad_row` are the first. Elements and chunks of both
// tensors: where the first row begins in its chunk of 16 bytes, and chunks.
struct PlaneBand {
  int first, last;
  int in_row, in_skew, in_chunks, grad_row, grad_skew, grad_chunks;
};

// Adds the pairs of steps [first, last) to the sums. `grad` and `input` point to the strip's first column, of row
// first - kDepth + 1 of grad_output and of the first row of step `first`. The bias counts the rows of the steps, and of
// those before them if `counts_before`.
template <class Traits>
__device__ __forceinline__ void add_steps(const GradWeightArgs& args, const NchwStrip<Traits>& strip,
                                          const typename Traits::T* grad, const typename Traits::T* input, int first,
                                          int last, bool counts_before, float (&sum)[Traits::kTaps + 1]) {
  constexpr int kColumns = Traits::kColumns, kWindow = Traits::kWindow, kDepth = Traits::kDepth;
  constexpr int kStrideH = Traits::kStrideH;
  using Strip = NchwStrip<Traits>;
  float& bias = sum[Traits::kTaps];
  float rows[Traits::kGradRows][kColumns];
  const auto take_grad = [](const typename Strip::GradRow& row, float (&converted)[kColumns]) {
    float tree[kColumns];
    for_each_index<kColumns>([&](auto index) {
      constexpr int v = decltype(index)::value;
      tree[v] = converted[v] = row.template element<v>(0);
    });
#pragma unroll
    for (int width = kColumns / 2; width > 0; width /= 2)
#pragma unroll
      for (int v = 0; v < width; ++v) tree[v] += tree[v + width];
    return tree[0];
  };
#pragma unroll
  for (int age = kDepth - 1; age > 0; --age) {
    typename Strip::GradRow row;
    strip.grad(grad, static_cast<unsigned>(first - age) < static_cast<unsigned>(args.out_h), row);
    grad += args.out_w;
    const float total = take_grad(row, rows[Traits::grad_row(0, age)]);
    bias += counts_before ? total : 0.f;
  }

  typename Strip::GradRow next_grad;
  typename Strip::InputRow next_input[kStrideH];
  const auto load_step = [&](int t) {
    strip.grad(grad, t < min(last, args.out_h), next_grad);
    grad += args.out_w;
#pragma unroll
    for (int e = 0; e < kStrideH; ++e) {
      const int row = t * kStrideH - args.padding_h + e;
      strip.input(input, t < last && static_cast<unsigned>(row) < static_cast<unsigned>(args.h), next_input[e]);
      input += args.w;
    }
  };
  load_step(first);
  for (int start = first; start < last; start += Traits::kSteps) {
#pragma unroll
    for (int step = 0; step < Traits::kSteps; ++step) {
      const int t = start + step;
      if (step > 0 && t >= last) return;
      bias += take_grad(next_grad, rows[Traits::grad_row(step, 0)]);
      float window[kStrideH][kWindow];
#pragma unroll
      for (int e = 0; e < kStrideH; ++e)
        for_each_index<kWindow>([&](auto index) {
          constexpr int k = decltype(index)::value;
          if constexpr (Traits::kUsed >> k & 1) window[e][k] = next_input[e].template element<k>(0);
        });
      load_step(t + 1);

#pragma unroll
      for (int i = 0; i < Traits::kKernelH; ++i)
#pragma unroll
        for (int j = 0; j < Traits::kKernelW; ++j) {
          float& tap = sum[i * Traits::kKernelW + j];
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
            tap = fmaf(rows[Traits::grad_row(step, i / kStrideH)][v], window[i % kStrideH][v * Traits::kStrideW + j],
                       tap);
        }
    }
    if constexpr (!Traits::kRing) {
#pragma unroll
      for (int row = 0; row + 1 < kDepth; ++row)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) rows[row][v] = rows[row + Traits::kSteps][v];
    }
  }
}

// Copies `chunks` chunks of 16 bytes of each of `planes` planes, `stride` elements apart, to every `pitch` chunks of
// shared memory.
template <class T>
struct PlaneCopier {
  static constexpr int kChunk = 16 / sizeof(T);
  int chunk, plane, step_chunks, step_planes, pitch;

  __device__ __forceinline__ explicit PlaneCopier(int pitch)
      : chunk(threadIdx.x % pitch),
        plane(threadIdx.x / pitch),
        step_chunks(blockDim.x % pitch),
        step_planes(blockDim.x / pitch),
        pitch(pitch) {}
  __device__ __forceinline__ void copy(CachePolicy policy, const CopyTarget<T>& target, int to, const T* from,
                                       int64_t stride, int planes, int chunks) const {
    int at = chunk;
    from += plane * stride + chunk * kChunk;
    const int64_t step = step_planes * stride + step_chunks * kChunk, wrap = stride - pitch * kChunk;
#pragma unroll 1
    for (int k = threadIdx.x; k < planes * pitch; k += blockDim.x) {
      if (at < chunks) policy.template copy_async<16>(target, ptx::opaque(to + k * kChunk), from, true);
      at += step_chunks, from += step;
      if (at >= pitch) at -= pitch, from += wrap;
    }
  }
};

// What is computed once for all blocks, which are to ask for their first planes soon.
struct GradWeightPlanesPlan {
  GradWeightPlanesTiling tiling;
  int64_t in_image, grad_image;  // elements
  IntDivider per_channel, bands, multiplier;
  SmallDivider threads, strips, cuts;

  GradWeightPlanesPlan(const GradWeightArgs& args, const GradWeightPlanesTiling& tiling)
      : tiling(tiling),
        in_image(args.out_c / args.multiplier * args.h * args.w),
        grad_image(args.out_c * args.out_h * args.out_w),
        per_channel(static_cast<unsigned>(args.n * tiling.bands)),
        bands(tiling.bands),
        multiplier(args.multiplier),
        threads(tiling.threads),
        strips(tiling.strips),
        cuts(tiling.cuts) {}
};

template <class Traits>
__global__ void __launch_bounds__(kGradWeightPlanesThreads, 1)
    grad_weight_planes_nchw_kernel(const GradWeightArgs args, const __grid_constant__ GradWeightPlanesPlan plan) {
  const GradWeightPlanesTiling& tiling = plan.tiling;
  using T = typename Traits::T;
  constexpr int kTaps = Traits::kTaps, kDepth = Traits::kDepth, kStrideH = Traits::kStrideH;
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const ring = reinterpret_cast<T*>(shared_memory);
  const int per_channel = static_cast<int>(args.n) * tiling.bands;
  // `channel`: the first of a unit's.
  const int begin = blockIdx.x * args.rows;
  const int end = min(begin + args.rows, per_channel * (static_cast<int>(args.out_c) / tiling.channels));
  const int64_t in_image = plan.in_image, grad_image = plan.grad_image;
  const auto in_plane_of = [&](int channel) {
    return static_cast<int64_t>(plan.multiplier.quotient(channel)) * args.h * args.w;
  };
  const auto grad_plane_of = [&](int channel) { return static_cast<int64_t>(channel) * args.out_h * args.out_w; };
  const int in_pitch = tiling.in_chunks * kChunk, grad_pitch = tiling.grad_chunks * kChunk;
  const int stage_elements = tiling.images * (in_pitch + grad_pitch);
  const auto band_at = [&](int64_t in_plane, int64_t grad_plane, int index) {
    PlaneBand band;
    band.first = tiling.first_step + index * tiling.band_steps;
    band.last = min(band.first + tiling.band_steps, tiling.first_step + tiling.steps);
    band.in_row = max(0, band.first * kStrideH - args.padding_h);
    band.in_skew = (static_cast<int>(in_plane) + band.in_row * args.w) & (kChunk - 1);
    const int in_rows =
        tiling.bands == 1 ? tiling.channels * args.h : min(args.h, band.last * kStrideH - args.padding_h) - band.in_row;
    band.in_chunks = (band.in_skew + in_rows * args.w + kChunk - 1) / kChunk;
    band.grad_row = max(0, band.first - kDepth + 1);
    band.grad_skew = (static_cast<int>(grad_plane) + band.grad_row * args.out_w) & (kChunk - 1);
    const int grad_rows = tiling.bands == 1 ? tiling.channels * args.out_h : min(args.out_h, band.last) - band.grad_row;
    band.grad_chunks = (band.grad_skew + grad_rows * args.out_w + kChunk - 1) / kChunk;
    return band;
  };

  // Requests the planes of the next stage.
  const CachePolicy policy(args);
  constexpr bool kInBulk = PlanesBulkCopies::kExist;
  __shared__ uint64_t barriers[PlanesBulkCopies::kBarriers];
  const PlanesBulkCopies bulk(barriers, args);
  const unsigned ring_address = ptx::shared_address(ring);
  if (threadIdx.x == 0) bulk.begin();
  const CopyTarget<T> target = policy.target(ring);
  const PlaneCopier<T> copies_input(tiling.in_chunks), copies_grad(tiling.grad_chunks);
  const int first_group = plan.per_channel.quotient(begin);
  int next_channel = first_group * tiling.channels, next_unit = begin - first_group * per_channel, left = end - begin;
  int64_t next_in_plane = in_plane_of(next_channel), next_grad_plane = grad_plane_of(next_channel);
  int next_slot = 0;
  const auto request = [&] {
    if (left > 0) {
      const int planes = min(tiling.images, min(left, per_channel - next_unit));
      const int image = plan.bands.quotient(next_unit);
      const PlaneBand band = band_at(next_in_plane, next_grad_plane, next_unit - image * tiling.bands);
      const T* const input =
          static_cast<const T*>(args.input) + (image * in_image + next_in_plane + band.in_row * args.w - band.in_skew);
      const T* const grad = static_cast<const T*>(args.grad_output) +
                            (image * grad_image + next_grad_plane + band.grad_row * args.out_w - band.grad_skew);
      const int to = next_slot * stage_elements, grad_to = to + tiling.images * in_pitch;
      if constexpr (kInBulk) {
        if (threadIdx.x == 0) bulk.expect(next_slot, planes * (band.in_chunks + band.grad_chunks) * 16);
        __syncwarp();
#pragma unroll 1
        for (int plane = threadIdx.x; plane < planes; plane += 32) {
          constexpr int kBytes = static_cast<int>(sizeof(T));
          bulk.copy(next_slot, ring_address + (to + plane * in_pitch) * kBytes, input + plane * in_image,
                    band.in_chunks * 16);
          bulk.copy(next_slot, ring_address + (grad_to + plane * grad_pitch) * kBytes, grad + plane * grad_image,
                    band.grad_chunks * 16);
        }
      } else {
        copies_input.copy(policy, target, to, input, in_image, planes, band.in_chunks);
        copies_grad.copy(policy, target, grad_to, grad, grad_image, planes, band.grad_chunks);
      }
      left -= planes;
      next_unit += planes;
      if (next_unit == per_channel) {
        next_unit = 0, next_channel += tiling.channels;
        next_in_plane = in_plane_of(next_channel), next_grad_plane = grad_plane_of(next_channel);
      }
      next_slot ^= 1;
    }
    if constexpr (!kInBulk) commit_copies();
  };
  const bool asks = threadIdx.x < 32;
  if constexpr (kInBulk) {
    if (asks) {
#pragma unroll 1
      for (int stage = 0; stage < kPlanesDepth; ++stage) request();
    }
    __syncthreads();
  } else {
    request();
  }

  // What this thread takes of every stage: steps [first, last), and where it lies in it.
  const int of_unit = plan.threads.quotient(threadIdx.x), thread = threadIdx.x - of_unit * tiling.threads;
  const int of_plane = plan.strips.quotient(thread), column = (thread - of_plane * tiling.strips) * Traits::kColumns;
  const int plane = plan.cuts.quotient(of_plane), cut = of_plane - plane * tiling.cuts;
  const NchwStrip<Traits> strip(args.out_w - column, column * Traits::kStrideW, args.w, nullptr, policy);
  int first, last, in_place, grad_place;
  const auto enter = [&](int64_t in_plane, int64_t grad_plane, int index) {
    const PlaneBand band = band_at(in_plane, grad_plane, index);
    first = band.first + cut * tiling.cut_steps, last = min(band.last, first + tiling.cut_steps);
    in_place = plane * in_pitch + band.in_skew + (first * kStrideH - args.padding_h - band.in_row) * args.w +
               column * Traits::kStrideW + of_unit * args.h * args.w;
    grad_place = tiling.images * in_pitch + plane * grad_pitch + band.grad_skew +
                 (first - kDepth + 1 - band.grad_row) * args.out_w + column + of_unit * args.out_h * args.out_w;
  };

  // Sums of a channel's warps, a row each.
  float* const of_channel = reinterpret_cast<float*>(shared_memory + kPlanesDepth * tiling.stage_bytes) +
                            of_unit * (tiling.threads / 32) * (kTaps + 1);
  float* const of_warp = of_channel + thread / 32 * (kTaps + 1);
  int slot = 0;
  unsigned parity = 0;
#pragma unroll 1
  for (int item = begin; item < end;) {
    const int group = plan.per_channel.quotient(item), begin_unit = item - group * per_channel;
    const int end_unit = min(per_channel, begin_unit + end - item);
    const int64_t in_plane = in_plane_of(group * tiling.channels), grad_plane = grad_plane_of(group * tiling.channels);
    int band = begin_unit - plan.bands.quotient(begin_unit) * tiling.bands;
    enter(in_plane, grad_plane, band);
    float sum[kTaps + 1] = {};  // the last one is the bias
    int waiting = 0;            // steps since the sums were last left in shared memory
    for (int tap = threadIdx.x % 32; tap <= kTaps; tap += 32) of_warp[tap] = 0;
    __syncwarp();
#pragma unroll 1
    for (int unit = begin_unit; unit < end_unit;) {
      if constexpr (kInBulk) {
        bulk.wait(slot, parity);
      } else {
        wait_for_copies<0>();
        __syncthreads();  // and all are done with the stage before, whose place the next request takes
        request();
      }
      const int planes = min(tiling.images, end_unit - unit);
      if (plane < planes && first < last) {
        const T* const elements = ring + slot * stage_elements;
        add_steps<Traits>(args, strip, elements + grad_place, elements + in_place, first, last,
                          first == tiling.first_step, sum);
      }
      if constexpr (kInBulk) {
        bulk.end(slot);
        if (asks && left > 0) {
          bulk.wait_for_end(slot, parity);
          request();
        }
      }
      unit += planes;
      waiting += tiling.cut_steps;
      if (waiting >= kPlanesStepsOfSums || unit == end_unit) {
        sum_over_warp<true>(sum, of_warp, 0, kTaps + 1);
#pragma unroll
        for (int tap = 0; tap <= kTaps; ++tap) sum[tap] = 0;
        waiting = 0;
      }
      if (tiling.bands > 1) enter(in_plane, grad_plane, band = band + 1 == tiling.bands ? 0 : band + 1);
      parity ^= slot, slot ^= 1;
    }
    item += end_unit - begin_unit;
    if (item == end) let_second_pass_begin();

    // A split of the channel is what one block has of it; there may be fewer than there is room for.
    const unsigned split = blockIdx.x - static_cast<unsigned>(group * per_channel) / static_cast<unsigned>(args.rows);
    const int channel = group * tiling.channels + of_unit;
    __syncthreads();
    const bool finite = store_sums<Traits>(args, split, channel, of_channel, thread, tiling.threads);
    if (end_unit == per_channel)
      for (int missing = split + 1; missing < args.splits; ++missing)
        for (int tap = thread; tap <= kTaps; tap += tiling.threads) store_sum<Traits>(args, missing, channel, tap, 0.f);
    if (__syncthreads_and(finite)) continue;

    for (int tap = 0; tap < kTaps; ++tap) {
      const int age = tap / Traits::kKernelW / kStrideH;
      float total = 0;
      for (int index = begin_unit * tiling.strips + thread; index < end_unit * tiling.strips; index += tiling.threads) {
        const int unit = index / tiling.strips, image = unit / tiling.bands;
        const PlaneBand steps = band_at(in_plane, grad_plane, unit - image * tiling.bands);
        const Piece piece = {image, 0, max(0, steps.first - age), min(args.out_h, steps.last - age),
                             (index - unit * tiling.strips) * Traits::kColumns};
        total += sum_of_pairs<Traits>(
            args, piece, tap, static_cast<const T*>(args.grad_output) + image * grad_image + grad_plane_of(channel),
            static_cast<const T*>(args.input) + image * in_image + in_plane_of(channel), 1);
      }
      store_tap<Traits>(args, split, channel, tap, total, of_channel, thread, tiling.threads);
    }
  }
}

template <class Traits>
int launch_grad_weight_planes_nchw(const GradWeightArgs& args, int, cudaStream_t stream) {
  const DeviceLimits& device = device_limits();
  const GradWeightPlanesTiling tiling = grad_weight_planes_tiling(
      Traits::kShape, args, args.rows, device.multiprocessors, device.shared_bytes, device.shared_bytes_block);
  const auto kernel = grad_weight_planes_nchw_kernel<Traits>;
  constexpr int kStaticBytes = 8 * PlanesBulkCopies::kBarriers;
  if (const int error = allow_shared_bytes(kernel, tiling.bytes, kStaticBytes)) return error;
  const int64_t units = args.out_c / tiling.channels * args.n * tiling.bands;
  kernel<<<static_cast<unsigned>(divide_up(units, args.rows)), tiling.channels * tiling.threads, tiling.bytes,
           stream>>>(args, GradWeightPlanesPlan(args, tiling));
  return cudaGetLastError();
}

}  // namespace depthwise
