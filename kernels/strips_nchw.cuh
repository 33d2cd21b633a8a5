// Depthwise convolution on the tensor cores by strips of rows (strips.cuh), NCHW: forward, and grad of input at stride 1.
//
// Serves  fp16 and bf16, stride and dilation 1, kernels of 3 to 9 rows and columns; any image, padding, alignment and
//         depth multiplier. Compile-time are the type, the kernel's rows and the rows of a strip.
// Owns    a block computes one channel, some images after the other, or a part of them: a step is some small images or the
//         part of one, sixteen strips a warp, at most 64. The input of the next step is on its way meanwhile.
// Reads   rows as wide as their alignment allows, all of a step's before the first is used.
// Writes  rows through shared memory, likewise.
// Memory  zeros and filters: strips.cuh; the input of two steps, and a stage of outputs. 56x56 under 7x7 with strips of 7
//         rows: 26 KB.
// Chosen  select.h.
#pragma once

#include "strips.cuh"

namespace depthwise {

constexpr int kNoRow = 1 << 20;  // beyond all of a block
// Of a small image, which a thread copies not row by row: they are the same ones in all images of a step (fp16, H100: 5x5,
// 32x240x28x28: 15.9 us, by rows 17.0; 7x7, 192x28x28: 13.4, 14.7).
constexpr int kMostPieces = 2;

// Where a thread copies first.
struct CopyThread {
  int row, column;

  __device__ explicit CopyThread(const CopyPlan& plan)
      : row(threadIdx.x >> plan.lanes), column((threadIdx.x & (1 << plan.lanes) - 1) * plan.vector) {
    if (row >= plan.rows) row = kNoRow;  // more threads than rows: these copy none
    if (plan.pieces > 0) row = column = 0;
  }
};

// The chunk of the stage in which row `row` of an image begins.
template <class Traits>
__host__ __device__ constexpr int stage_chunk(int tiles, int row) {
  return row * Traits::kStageStrips + Traits::strip_of(row) * (tiles - Traits::kRows * Traits::kStageStrips);
}

// The input of `images` images. `from` and `to`: what the thread copies first.
template <int kVector, class Traits>
__device__ __forceinline__ void load_strips_nchw(typename Traits::T* to, const typename Traits::T* from,
                                                 const CopyThread& at, const StripsPlan& plan,
                                                 const StripsBlock<Traits>& block, int images) {
  using T = typename Traits::T;
  if constexpr (kVector == 1) {
    // No asynchronous copy is that narrow: several loads on their way at a time, of rows, or of images of few rows.
    constexpr int kBatch = 4;
    const bool of_rows = plan.images == 1;
    const int64_t source_step = of_rows ? plan.in.step : plan.in_image;
    const int target_step = of_rows ? plan.in.shared_step : plan.image_pitch * kChunk;
    const int step = of_rows ? plan.in.rows : 1, end = of_rows ? block.in_rows : images;
    for (int column = 0; at.column + column < block.in_columns; column += 1 << plan.in.lanes) {
      const T* row_source = from + column;
      T* row_target = to + column;
#pragma unroll 1
      for (int row = at.row; row < block.in_rows; row += of_rows ? kNoRow : plan.in.rows) {
        const T* source = row_source;
        T* target = row_target;
#pragma unroll 1
        for (int k = of_rows ? row : 0; k < end; k += kBatch * step) {
          T values[kBatch];
#pragma unroll
          for (int b = 0; b < kBatch; ++b, source += source_step)
            values[b] = load_or_zero<1>(source, k + b * step < end).value[0];
#pragma unroll
          for (int b = 0; b < kBatch; ++b, target += target_step)
            if (k + b * step < end) *target = values[b];
        }
        row_source += plan.in.step, row_target += plan.in.shared_step;
      }
    }
  } else if (plan.in.pieces > 0) {
    int piece_target[kMostPieces];
#pragma unroll
    for (int p = 0; p < kMostPieces; ++p) {
      const int piece = threadIdx.x + p * blockDim.x, row = plan.in.row_divider.quotient(piece);
      const int chunk = strips_chunk<Traits>(plan, 0, block.top + row) - strips_chunk<Traits>(plan, 0, block.top);
      piece_target[p] = chunk * kChunk + piece * kVector - row * block.in_columns;
    }
#pragma unroll 1
    for (int k = 0; k < images; ++k, from += plan.in_image, to += plan.image_pitch * kChunk)
#pragma unroll
      for (int p = 0; p < kMostPieces; ++p) {
        const int piece = threadIdx.x + p * blockDim.x;
        if (piece < plan.in.pieces) copy_async<kVector * sizeof(T)>(to + piece_target[p], from + piece * kVector);
      }
  } else {
    for (int k = 0; k < images; ++k, from += plan.in_image, to += plan.image_pitch * kChunk)
      for (int column = 0; at.column + column < block.in_columns; column += kVector << plan.in.lanes) {
        const T* source = from + column;
        T* target = to + column;
#pragma unroll 4
        for (int row = at.row; row < block.in_rows; row += plan.in.rows) {
          copy_async<kVector * sizeof(T)>(target, source);
          source += plan.in.step, target += plan.in.shared_step;
        }
      }
  }
}

// The staged outputs of `images` images. `from` and `to`: what the thread copies first.
template <int kVector, class Traits>
__device__ __forceinline__ void store_strips_nchw(typename Traits::T* to, const typename Traits::T* from,
                                                  const CopyThread& at, const StripsPlan& plan,
                                                  const StripsBlock<Traits>& block, int images) {
  using T = typename Traits::T;
  constexpr int kPiece = min_int(kVector, 4);  // tiles begin on such boundaries, where vectors are of more than one
  if constexpr (kVector >= kPiece && kPiece == 4)
    if (plan.out.pieces > 0) {  // of eight elements each
      int sources[kMostPieces][2];
#pragma unroll
      for (int p = 0; p < kMostPieces; ++p)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int part = 2 * (threadIdx.x + p * blockDim.x) + half, row = plan.out.row_divider.quotient(part);
          sources[p][half] = stage_chunk<Traits>(plan.tiles, row) * kChunk + part * kPiece - row * block.columns;
        }
#pragma unroll 1
      for (int k = 0; k < images; ++k, to += plan.out_image, from += plan.strips * plan.tiles * kChunk)
#pragma unroll
        for (int p = 0; p < kMostPieces; ++p) {
          const int piece = threadIdx.x + p * blockDim.x;
          if (piece >= plan.out.pieces) continue;
          Vector<T, kChunk> values;
#pragma unroll
          for (int half = 0; half < 2; ++half)
            reinterpret_cast<Vector<T, kPiece>&>(values.value[half * kPiece]) =
                *reinterpret_cast<const Vector<T, kPiece>*>(from + sources[p][half]);
          store_streaming(to + piece * kChunk, values);
        }
      return;
    }
  for (int k = 0; k < images; ++k, to += plan.out_image, from += plan.strips * plan.tiles * kChunk)
    for (int column = 0; at.column + column < block.columns; column += kVector << plan.out.lanes) {
      T* target = to + column;
      const T* source = from + column;
#pragma unroll 4
      for (int row = at.row; row < block.rows; row += plan.out.rows) {
        Vector<T, kVector> values;
#pragma unroll
        for (int e = 0; e < kVector; e += kPiece)
          reinterpret_cast<Vector<T, kPiece>&>(values.value[e]) =
              *reinterpret_cast<const Vector<T, kPiece>*>(source + e);
        store_streaming(target, values);
        source += plan.out.shared_step, target += plan.out.step;
      }
    }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBoundBlocks)
    strips_nchw_kernel(const __grid_constant__ DirectArgs args, const __grid_constant__ StripsPlan plan) {
  using T = typename Traits::T;
  const StripsBlock<Traits> block(args, plan, 1, blockIdx.x);
  const int first = threadIdx.x / 32 * kTileRows;  // of the warp's strips
  extern __shared__ __align__(16) unsigned char shared_memory[];
  T* const filter = reinterpret_cast<T*>(shared_memory);
  T* const tile = filter + Traits::kFilterElements;  // twice, if there are several steps
  const int tile_elements = plan.channel_pitch * kChunk;
  T* const stage = tile + (plan.steps > 1 ? 2 : 1) * tile_elements;
  clear_shared(shared_memory, static_cast<int>(reinterpret_cast<unsigned char*>(stage) - shared_memory));

  const CopyThread in(plan.in), out(plan.out);
  const int in_channel = plan.multiplier_divider.quotient(block.channel);
  const T* from = static_cast<const T*>(args.input) + block.image * plan.in_image + in_channel * plan.in_plane +
                  static_cast<int64_t>(block.in_row + in.row) * args.w + block.in_column + in.column;
  // An offset that the compiler is kept from computing anew in each step.
  const int in_first = ptx::opaque(strips_chunk<Traits>(plan, 0, block.top + in.row) * kChunk + block.left + in.column);
  T* to = static_cast<T*>(args.out) + block.image * plan.out_image + block.channel * plan.out_plane +
          static_cast<int64_t>(block.row + out.row) * args.out_w + block.column + out.column;
  const int out_first =
      stage_chunk<Traits>(plan.tiles, out.row) * kChunk + block.column - block.first_column + out.column;
  const auto load_images = [&](int image, int buffer) {
    if (image < block.image_end)
      with_vector(plan.in.vector, [&](auto vector) {
        load_strips_nchw<vector(), Traits>(tile + buffer * tile_elements + in_first, from, in, plan, block,
                                           min(plan.images, block.image_end - image));
      });
    from += plan.images * plan.in_image;
    commit_copies();
  };

  __syncthreads();
  load_images(block.image, 0);
  load_strips_filters<Traits>(filter, args, plan, block.channel, 1);
  float bias[4];
  load_bias(bias, bias_of<Traits>(args, block.channel));
  const unsigned address = ptx::opaque(strips_address<Traits>(tile, plan, first));
  unsigned* const place = stage_place<Traits>(stage, first);
  wait_for_all_copies();
  unsigned band[Traits::kKernelH][2];
  load_bands<Traits>(band, filter);

  int buffer = 0;
#pragma unroll 1
  for (int image = block.image; image < block.image_end; image += plan.images, buffer ^= 1) {
    load_images(image + plan.images, buffer ^ 1);
    unsigned results[Traits::kRows][2];
    const unsigned probe =
        walk_strips<Traits>(results, address + buffer * tile_elements * static_cast<int>(sizeof(T)), plan, band, bias);
    stage_strips<Traits>(place, results);
    if (__syncthreads_or(is_poisoned(probe))) {
      mend_strips<Traits>(stage, args, plan, image, 1, 0);
      __syncthreads();
    }
    with_vector(plan.out.vector, [&](auto vector) {
      store_strips_nchw<vector(), Traits>(to, stage + out_first, out, plan, block,
                                          min(plan.images, block.image_end - image));
    });
    to += plan.images * plan.out_image;
    wait_for_all_copies();  // and the stage is free
  }
}

// As few blocks an image as can be; of small images as many at a time as fill warps best. A block takes as many such steps
// as keep all multiprocessors busy for the shortest time, if beginning a block costs as much as a step.
template <class Traits>
int launch_strips_nchw(const DirectArgs& args, int, cudaStream_t stream) {
  constexpr int kMost = Traits::kWarps * kTileRows, kMostTiles = 15;
  const DeviceLimits& device = device_limits();
  StripsPlan plan = strips_plan(args);
  plan.group_divider = IntDivider(static_cast<unsigned>(args.out_c));
  plan.in_plane = static_cast<int64_t>(args.h) * args.w;
  plan.in_image = args.out_c / args.multiplier * plan.in_plane;
  plan.out_plane = static_cast<int64_t>(args.out_h) * args.out_w;
  plan.out_image = args.out_c * plan.out_plane;
  const int all_tiles = divide_up(args.out_w - plan.first_column, kChunk);
  const int all_strips = divide_up(args.out_h, Traits::kRows), images = static_cast<int>(args.n);
  const auto warps = [&] { return divide_up(plan.all_strips(), kTileRows); };
  const auto shared_bytes = [&](int buffers) {
    const int bytes = lay_out_strips<Traits>(&plan, 1);
    return bytes + 16 * ((buffers - 1) * plan.channel_pitch + Traits::kRows * Traits::kStageStrips);
  };
  plan.tiles = even_part(all_tiles, kMostTiles);
  plan.blocks_w = divide_up(all_tiles, plan.tiles);
  plan.images = 1;
  int most_strips = kMost / plan.tiles;
  do {
    plan.strips = even_part(all_strips, most_strips);
    plan.blocks_h = divide_up(all_strips, plan.strips);
    most_strips = plan.strips / 2;
  } while (shared_bytes(2) > kSharedBytesEverywhere && most_strips > 0);

  const int64_t blocks = args.out_c * plan.blocks_w * plan.blocks_h;  // of an image
  if (plan.blocks_w * plan.blocks_h == 1) {
    int best = 1, least = 0;
    for (; plan.images <= images && plan.all_strips() <= kMost; ++plan.images) {
      const bool few = blocks * divide_up(images, plan.images) < 4 * device.multiprocessors;
      if (plan.images > 1 && (few || shared_bytes(2) > kSharedBytesEverywhere)) break;
      const int cost = divide_up(100 * (warps() + 1), plan.images);  // what does not depend on warps is as much as one
      if (least == 0 || cost < least) least = cost, best = plan.images;
    }
    plan.images = even_part(images, best);
  }
  const int all_steps = divide_up(images, plan.images);
  const int resident = min_int(Traits::kMinBlocks * Traits::kWarps / warps(),
                               device.shared_bytes / (shared_bytes(2) + kBlockSharedBytes));
  plan.steps = best_steps(blocks, all_steps, resident, 1, 1);
  const int bytes = shared_bytes(plan.steps > 1 ? 2 : 1);
  if (bytes > device.shared_bytes_block) return kTooLittleSharedMemory;

  const auto copy_plan = [&](const void* pointer, int row, int boundary, int columns) {
    CopyPlan copy{copy_width(pointer, row, boundary)};
    while (1 << copy.lanes < divide_up(min_int(row, columns * kChunk), copy.vector)) ++copy.lanes;
    while (32 * warps() >> copy.lanes < Traits::kRows) --copy.lanes;
    copy.rows = (32 * warps() >> copy.lanes) / Traits::kRows * Traits::kRows;
    copy.step = copy.rows * row;
    return copy;
  };
  // Vectors of eight outputs are read in fours, where tiles begin on such a boundary.
  const int boundary = boundary_of(plan.first_column);
  plan.in = copy_plan(args.input, args.w, kChunk, plan.pitch);
  plan.in.shared_step = strips_chunk<Traits>(plan, 0, plan.in.rows) * kChunk;
  plan.out = copy_plan(args.out, args.out_w, boundary == 4 && plan.blocks_w == 1 ? kChunk : boundary, plan.tiles);
  plan.out.shared_step = stage_chunk<Traits>(plan.tiles, plan.out.rows) * kChunk;

  if (plan.blocks_w * plan.blocks_h == 1 && args.padding_h >= 0 && args.padding_w >= 0) {
    const int most = kMostPieces * 32 * warps(), first_in_column = plan.first_chunk * kChunk;
    const int64_t in_pieces = plan.in_plane / plan.in.vector, out_pieces = plan.out_plane / kChunk;
    if (plan.in.vector > 1 && in_pieces <= most && first_in_column <= 0 &&
        first_in_column + plan.pitch * kChunk >= args.w) {
      plan.in.pieces = static_cast<int>(in_pieces);
      plan.in.row_divider = SmallDivider(args.w / plan.in.vector);
    }
    if (plan.out.vector >= 4 && out_pieces <= most && copy_width(args.out, plan.out_plane) == kChunk) {
      plan.out.pieces = static_cast<int>(out_pieces);
      plan.out.row_divider = SmallDivider(args.out_w / 4);
    }
  }

  const auto kernel = strips_nchw_kernel<Traits>;
  if (const int error = allow_shared_bytes(kernel, bytes)) return error;
  const int64_t grid = blocks * divide_up(all_steps, plan.steps);
  kernel<<<static_cast<unsigned>(grid), 32 * warps(), bytes, stream>>>(args, plan);
  return cudaGetLastError();
}

}  // namespace depthwise
