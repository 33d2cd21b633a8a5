// Both gradients at once, channels_last.
//
// Serves  3x3 and 5x5 with same padding, stride 1, multiplier 1; fp32, fp16, bf16; aligned tensors, channels a multiple of 16
//         bytes.
// Owns    a block: kLanes x kVector channels, tiles_w strips of kColumns columns, `images` columns of images side by side,
//         down which it walks `rows` virtual rows (gradients_tiling.h): zeros between images stand for both their paddings, so
//         that nothing begins anew at an image's end. A thread: a strip; the sums of all taps, the weights, and kKernel rows of
//         grad_output, in fp32 registers.
// Memory  a ring of two to four stages, of kKernel rows of grad_output and of the input each, filled asynchronously: 16x64x
//         512x512, fp16: four stages of 25 KB, of which three are under way.
// Reduces a block's threads in order through shared memory, then the splits in order (gradients.cu). No atomics.
// Zeros   times infinity would poison a sum of the weights': those that are not finite are taken again, pair by pair.
// Chosen  select_gradients.h.
#pragma once

#include "gradients.cuh"

namespace depthwise {

template <class T_, int kKernel_, int kLanes_>
struct GradientsNhwcTraits {
  using T = T_;
  static constexpr int kKernel = kKernel_, kPadding = kKernel / 2, kTaps = kKernel * kKernel, kLanes = kLanes_;
  static constexpr int kColumns = kGradientsColumns, kWindow = kColumns + kKernel - 1;
  static constexpr int kVector = gradients_vector(kKernel, sizeof(T)), kChannels = kLanes * kVector;
  static constexpr int kThreads = gradients_threads(kKernel), kMinBlocks = kKernel == 3 && sizeof(T) == 4 ? 3 : 2;
  static constexpr int kLaneBytes = kVector * sizeof(T), kPixel = kLanes * kLaneBytes;
  static constexpr int kCopies = kPixel / 16,
                       kTilePixels = 16 / kLaneBytes;  // of a pixel; pixels that a strip copies at once
  static_assert(kPixel % 16 == 0 && kLanes % kCopies == 0);
  static constexpr int kInCopies = divide_up(kColumns, kTilePixels);  // of a thread, of a row
  static constexpr int kGradCopies = kTilePixels > kColumns ? 1 : kInCopies + 1;
  // Behind a strip's pixels, so that the addresses of a warp's threads follow each other modulo 128 bytes.
  static constexpr int kTilePadding = modulo(kPixel - kColumns * kPixel, 128), kTile = kColumns * kPixel + kTilePadding;
  static constexpr int kHaloBytes = divide_up((kKernel - 1) * kPixel, 128) * 128 + 128;
  static constexpr __host__ __device__ int pixel_at(int pixel) {
    return pixel * kPixel + pixel / kColumns * kTilePadding;
  }
};

// How a launch is cut, beside its tiling; bytes, of one column of images.
struct GradientsNhwcRing {
  GradientsNhwcTiling tiling;
  int stages, depth, stage_bytes, grad_row, in_row;
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinBlocks)
    gradients_nhwc_kernel(const __grid_constant__ GradientsArgs args, const GradientsNhwcRing ring) {
  using T = typename Traits::T;
  constexpr int kKernel = Traits::kKernel, kPadding = Traits::kPadding, kTaps = Traits::kTaps, kLanes = Traits::kLanes;
  constexpr int kVector = Traits::kVector, kColumns = Traits::kColumns, kWindow = Traits::kWindow,
                kPixel = Traits::kPixel;
  extern __shared__ __align__(16) unsigned char shared_memory[];
  const GradientsNhwcTiling& tiling = ring.tiling;
  const int thread = threadIdx.x, channels = static_cast<int>(args.out_c);
  const int of_image = tiling.tiles_w * kLanes;
  const bool active = thread < of_image * tiling.images;
  const int walker = active ? thread / of_image : 0, place = active ? thread - walker * of_image : 0;
  const int tile = place / kLanes, lane = place % kLanes;
  const int first_channel = blockIdx.x * Traits::kChannels;
  const int part_w = blockIdx.y % tiling.blocks_w, first_column = part_w * tiling.tiles_w * kColumns;
  const int period = args.h + kPadding, pitch = args.w * channels;
  const int begin = blockIdx.y / tiling.blocks_w * tiling.rows;
  const int walk_images = max(0, min(tiling.walk_images, static_cast<int>(args.n) - walker * tiling.walk_images));
  const int walk_rows = walk_images * period, end = min(begin + tiling.rows, walk_rows);
  const int64_t walk_offset = static_cast<int64_t>(walker) * tiling.walk_images * args.h * pitch;

  // What a thread copies: the same 16 bytes of some pixels of every row.
  constexpr int kWord = 16 / static_cast<int>(sizeof(T));
  const int copy_pixel = place / Traits::kCopies, copy_channel = first_channel + place % Traits::kCopies * kWord;
  const int copy_step = tiling.tiles_w * Traits::kTilePixels;
  const bool channel_exists = active && copy_channel < channels;
  const int grad_pixels = tiling.tiles_w * kColumns + kKernel - 1, in_pixels = tiling.tiles_w * kColumns;
  unsigned grad_exists = 0, in_exists = 0;
  int to[Traits::kGradCopies];
#pragma unroll
  for (int k = 0; k < Traits::kGradCopies; ++k) {
    const int pixel = copy_pixel + k * copy_step, column = first_column - kPadding + pixel;
    if (channel_exists && static_cast<unsigned>(column) < static_cast<unsigned>(args.w)) grad_exists |= 1u << k;
    if (channel_exists && first_column + pixel < args.w) in_exists |= 1u << k;
    to[k] = Traits::pixel_at(pixel);
  }
  const CachePolicy policy(args);
  const auto target = policy.target(shared_memory + place % Traits::kCopies * 16);
  // In elements. Pointers go on through rows that do not exist, and fall back by them at an image's end.
  const auto offset_of = [&](const VirtualRow& row) {
    return (static_cast<int64_t>(row.image) * args.h + row.y) * pitch;
  };
  // Of the rows of grad_output; those of the input are kPadding behind.
  const VirtualRow first(begin - kPadding, period);
  const T* grad = static_cast<const T*>(args.grad_output) + (walk_offset + offset_of(first)) +
                  (static_cast<int64_t>(first_column - kPadding + copy_pixel) * channels + copy_channel);
  const T* in = static_cast<const T*>(args.input) + (walk_offset + offset_of(first) - kPadding * pitch) +
                (static_cast<int64_t>(first_column + copy_pixel) * channels + copy_channel);
  const int grad_to = walker * ring.grad_row;
  const int in_to = kKernel * tiling.images * ring.grad_row + walker * ring.in_row;
  const int grad_step = tiling.images * ring.grad_row, in_step = tiling.images * ring.in_row;
  const int grad_steps = min(end + kPadding, walk_rows) - (begin - kPadding), in_steps = max(0, end - begin);
  int next_slot = 0, next_y = first.y, next_step = 0;
  const auto request = [&](bool exists) {
    if (exists && active) {
      // Opaque, lest they are uniform: see CachePolicy::target.
      int grad_row_to = ptx::opaque(next_slot + grad_to), in_row_to = ptx::opaque(next_slot + in_to);
#pragma unroll
      for (int r = 0; r < kKernel; ++r) {
        const bool grad_row = next_y < args.h && next_step + r < grad_steps;
        const bool in_row = static_cast<unsigned>(next_y - kPadding) < static_cast<unsigned>(args.h) &&
                            static_cast<unsigned>(next_step + r - 2 * kPadding) < static_cast<unsigned>(in_steps);
#pragma unroll
        for (int k = 0; k < Traits::kGradCopies; ++k)
          if (copy_pixel + k * copy_step < grad_pixels)
            policy.template copy_async<16>(target, grad_row_to + to[k],
                                           grad + static_cast<int64_t>(k) * copy_step * channels,
                                           grad_row && (grad_exists >> k & 1));
#pragma unroll
        for (int k = 0; k < Traits::kInCopies; ++k)
          if (Traits::kTilePixels <= kColumns || copy_pixel + k * copy_step < in_pixels)
            policy.template copy_async<16>(target, in_row_to + to[k],
                                           in + static_cast<int64_t>(k) * copy_step * channels,
                                           in_row && (in_exists >> k & 1));
        grad_row_to = ptx::opaque(grad_row_to + grad_step), in_row_to = ptx::opaque(in_row_to + in_step);
        const bool ends = ++next_y == period;
        const int step = ends ? (1 - kPadding) * pitch : pitch;
        grad += step, in += step;
        if (ends) next_y = 0;
      }
      next_step += kKernel;
    }
    commit_copies();
    next_slot = next_slot + ring.stage_bytes == ring.depth * ring.stage_bytes ? 0 : next_slot + ring.stage_bytes;
  };
  for (int k = 0; k < ring.depth - 1; ++k) request(k < ring.stages);

  const int channel = first_channel + lane * kVector, column = first_column + tile * kColumns;
  const bool exists = active && channel < channels;
  float weight[kVector][kTaps], sum[kVector][kTaps] = {}, window[kVector][kKernel][kWindow] = {};
#pragma unroll
  for (int e = 0; e < kVector; ++e)
#pragma unroll
    for (int t = 0; t < kTaps; ++t)
      weight[e][t] = exists ? load_for_sums<T>(weights_of<Traits>(args) + (channel + e) * kTaps + t) : 0.f;
  const VirtualRow first_out(begin - 2 * kPadding, period);
  int out_y = first_out.y;
  T* out = static_cast<T*>(args.grad_input) + (walk_offset + offset_of(first_out)) +
           (static_cast<int64_t>(column) * channels + channel);
  const int columns = exists ? args.w - column : 0;
  const unsigned char* const grad_corner = shared_memory + grad_to + tile * Traits::kTile + lane * Traits::kLaneBytes;
  const unsigned char* const in_corner = shared_memory + in_to + tile * Traits::kTile + lane * Traits::kLaneBytes;
#pragma unroll 1
  for (int stage = 0; stage < ring.stages; ++stage) {
    wait_for_stage(ring.depth - 1);
    __syncthreads();  // and every thread is done with the stage that the next request overwrites
    request(stage + ring.depth - 1 < ring.stages);
    // The slot after the one that is filled is the oldest.
    const unsigned char *grad_row = grad_corner + next_slot, *in_row = in_corner + next_slot;
#pragma unroll
    for (int step = 0; step < kKernel; ++step) {
      float x[kVector][kColumns], y[kVector][kColumns];
#pragma unroll
      for (int k = 0; k < kWindow; ++k) {
        const auto pixel = *reinterpret_cast<const Vector<T, kVector>*>(grad_row + Traits::pixel_at(k));
#pragma unroll
        for (int e = 0; e < kVector; ++e) window[e][step][k] = to_float(pixel.value[e]);
      }
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const auto pixel = *reinterpret_cast<const Vector<T, kVector>*>(in_row + Traits::pixel_at(v));
#pragma unroll
        for (int e = 0; e < kVector; ++e) x[e][v] = to_float(pixel.value[e]);
      }
      grad_row += grad_step, in_row += in_step;
#pragma unroll
      for (int e = 0; e < kVector; ++e) add_step<Traits>(sum[e], y[e], weight[e], x[e], window[e], step);
      const bool stores = out_y < args.h && static_cast<unsigned>(stage * kKernel + step - 2 * kPadding) <
                                                static_cast<unsigned>(in_steps);
      const int to_store = stores ? columns : 0;
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        float pixel[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) pixel[e] = y[e][v];
        if (v < to_store) store_streaming(out + v * channels, pixel);
      }
      const bool ends = ++out_y == period;
      out += ends ? (1 - kPadding) * pitch : pitch;
      if (ends) out_y = 0;
    }
  }

  let_second_pass_begin();
  wait_for_all_copies();
  float* const room = reinterpret_cast<float*>(shared_memory);
  const int threads = blockDim.x, strips = tiling.tiles_w * tiling.images;
#pragma unroll
  for (int e = 0; e < kVector; ++e)
#pragma unroll
    for (int t = 0; t < kTaps; ++t) room[(e * kTaps + t) * threads + thread] = sum[e][t];
  __syncthreads();
#pragma unroll 1
  for (int k = thread; k < kTaps * Traits::kChannels; k += threads) {
    const int of = k / kLanes, tap = of % kTaps, to_channel = first_channel + k % kLanes * kVector + of / kTaps;
    if (to_channel >= channels) continue;
    float total = 0;
#pragma unroll 4
    for (int strip = 0; strip < strips; ++strip) total += room[of * threads + strip * kLanes + k % kLanes];
    if (!is_finite(total)) {
      total = 0;
#pragma unroll 1
      for (int image = 0; image < args.n; image += tiling.walk_images)
        total += exact_of_rows<T>(args, true, to_channel, tap, image,
                                  min(tiling.walk_images, static_cast<int>(args.n) - image), begin, begin + tiling.rows,
                                  first_column, first_column + in_pixels);
    }
    store_grad_weight<T>(args, blockIdx.y, to_channel * kTaps + tap, args.out_c * kTaps, total);
  }
}

template <class Traits>
int launch_gradients_nhwc(const GradientsArgs& args, int, cudaStream_t stream) {
  using T = typename Traits::T;
  constexpr int kMostStages = 4;
  const DeviceLimits& device = device_limits();
  GradientsNhwcRing ring{gradients_nhwc_tiling(args, Traits::kLanes, sizeof(T), args.most_splits)};
  const GradientsNhwcTiling& tiling = ring.tiling;
  const int all_rows = virtual_rows(tiling.walk_images, args.h, Traits::kKernel);
  ring.stages = divide_up(min_int(tiling.rows, all_rows) + 2 * Traits::kPadding, Traits::kKernel);
  ring.in_row = tiling.tiles_w * Traits::kTile;
  ring.grad_row = ring.in_row + Traits::kHaloBytes;
  ring.stage_bytes = Traits::kKernel * tiling.images * (ring.in_row + ring.grad_row);
  ring.depth = min_int(kMostStages, min_int(device.shared_bytes_block / ring.stage_bytes, max_int(2, ring.stages + 1)));
  const int threads = divide_up(Traits::kLanes * tiling.tiles_w * tiling.images, 32) * 32;
  const int sums = Traits::kTaps * Traits::kVector * threads * static_cast<int>(sizeof(float));
  const int bytes = max_int(ring.depth * ring.stage_bytes, sums);
  if (ring.depth < 2 || bytes > device.shared_bytes_block) return kTooLittleSharedMemory;
  const auto kernel = gradients_nhwc_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;
  kernel<<<dim3(divide_up(static_cast<int>(args.out_c), Traits::kChannels), tiling.splits), threads, bytes, stream>>>(
      args, ring);
  return cudaGetLastError();
}

}  // namespace depthwise
