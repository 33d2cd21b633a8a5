// Runs kernels on the CPU: blocks, or clusters of two, one after the other, their threads as coroutines of one thread.
//
// g++ -fsanitize=thread puts a call before every access to memory that is not a plain local variable; here these calls
// are answered not by its library but by checks of what a GPU would do:
// - an access outside the tensors and the shared memory of the launch, or off its type's alignment;
// - two threads at the same shared memory, one of them writing, with no __syncthreads between;
// - barriers and warp operations that not all threads reach.
// Shared memory starts as NaN, and is NaN again where an asynchronous copy is under way: it arrives when it is waited
// for. The first error ends the launch, and is what cudaGetErrorString tells.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <utility>
#include <vector>

#include "ptx.cuh"

namespace emulator {

Registers registers;

namespace {

constexpr int kSeveral = -1;
constexpr int kMaxThreads = 1024, kMaxCluster = 2, kSharedCapacity = 320 << 10;
constexpr size_t kStackBytes = 256 << 10;

struct Copy {
  void* shared;
  const void* global;
  int width, bytes;
};
struct Thread {
  const char* waits;  // for what; null: ready
  bool started, ended;
  jmp_buf at;
  ucontext_t start;
  std::vector<std::vector<Copy>> groups;  // of copies; the last one is not committed
  unsigned cluster_phase;                 // of the cluster's barrier, when it arrived there
};
struct Warp {
  int arrived, turn;
  unsigned interval;         // between two of its barriers
  unsigned words[2][32][8];  // what the lanes brought, at this turn and the one before
};
struct CopyBarrier {   // an mbarrier
  int count, pending;  // arrivals: of a phase, and those that are still to come
  int64_t bytes;       // likewise
  unsigned phase;
  std::vector<Copy> copies;  // they arrive when they are waited for
};
struct Cell {              // two bytes of shared memory: who wrote and read them last, and between which barriers
  unsigned written, read;  // of the block
  unsigned warp_written, warp_read;  // of the writer's and the reader's warp
  int writer, reader, reader_warp;   // or kSeveral
};
struct Memory {
  const char* name;
  uintptr_t begin, end;
  bool writable;
};
struct StaticShared {
  int line, begin, end;
};
struct Block {
  alignas(1024) unsigned char shared[kSharedCapacity];
  Cell cells[kSharedCapacity / 2];
  int static_bytes, shared_end;
  std::vector<StaticShared> statics;
  std::map<unsigned, CopyBarrier> copy_barriers;
  int arrived, votes, last_votes;  // at the barrier
  unsigned interval = 1;           // between two barriers
};

Thread threads[kMaxCluster * kMaxThreads];
Warp warps[kMaxCluster * kMaxThreads / 32];
auto* const stacks =
    static_cast<unsigned char*>(mmap(nullptr, kMaxCluster * kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
jmp_buf scheduler;
int current = -1, num_threads;  // -1: the host; of a block
Block cluster[kMaxCluster];
Block* block = cluster;  // the current thread's
int cluster_size, cluster_arrived;
unsigned cluster_phase;  // of the cluster's barrier

int dynamic_bytes, all_bytes;
std::vector<Memory> memory;
std::map<const void*, int> allowed_shared_bytes;
constexpr const char *kWaitsForCopies = "copies", *kWaitsForCluster = "cluster";
// An H200's multiprocessors; shared memory of each, of a block; L2 cache; clusters.
int device[5] = {132, 228 << 10, 227 << 10, 50 << 20, EMULATED_ARCH >= 900};

void (*body)(const void*);
const void* body_arguments;
int error;
char error_message[300];

void suspend() {
  if (_setjmp(threads[current].at) == 0) _longjmp(scheduler, 1);
}

void fail(const char* format, ...) {
  const dim3 t = registers.thread, b = registers.block;
  int length = 0;
  if (current >= 0)
    length = std::sprintf(error_message, "thread (%u, %u, %u) of block (%u, %u, %u): ", t.x, t.y, t.z, b.x, b.y, b.z);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_message + length, sizeof(error_message) - length, format, arguments);
  va_end(arguments);
  error = 719;
  if (current >= 0) _longjmp(scheduler, 1);
}

void check_alignment(const void* pointer, int bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fail("accesses %d bytes at an address that is no multiple of them", bytes);
}

void access_shared(Block& block, int thread, int offset, int bytes, bool write) {
  const unsigned interval = block.interval;
  const char* const does = write ? "writes" : "reads";
  const auto holds = [&](const StaticShared& s) { return offset >= s.begin && offset + bytes <= s.end; };
  if (offset + bytes > dynamic_bytes && !std::any_of(block.statics.begin(), block.statics.end(), holds))
    fail("%s %d bytes of shared memory at %d, of %d", does, bytes, offset, dynamic_bytes);
  const int warp = thread / 32;
  const unsigned warp_interval = warps[warp].interval;
  for (int k = offset / 2; k <= (offset + bytes - 1) / 2; ++k) {
    Cell& cell = block.cells[k];
    const bool written = cell.written == interval && (cell.writer / 32 != warp || cell.warp_written == warp_interval);
    const bool others_write = written && cell.writer != thread;
    const bool read = cell.read == interval && (cell.reader_warp != warp || cell.warp_read == warp_interval);
    const bool others_read = read && (cell.reader != thread || cell.reader_warp != warp);
    if (others_write || (write && others_read))
      fail("%s shared memory at %d, which another thread %s, without a barrier between", does, 2 * k,
           others_write ? "writes" : "reads");
    if (write) {
      cell.written = interval, cell.warp_written = warp_interval, cell.writer = thread;
    } else {
      cell.reader_warp = read && cell.reader_warp != warp ? kSeveral : warp;
      cell.reader = others_read ? kSeveral : thread;
      cell.read = interval, cell.warp_read = warp_interval;
    }
  }
}

void access_global(const void* pointer, int bytes, bool write) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  const Memory* nearest = &memory.front();
  for (const Memory& m : memory) {
    // Copies take whole granules of 16 bytes, of which the first may begin before the tensor.
    if (at >= (write ? m.begin : m.begin & ~uintptr_t{15}) && at + bytes <= m.end && (m.writable || !write)) return;
    if (m.begin <= at && m.begin >= nearest->begin) nearest = &m;
  }
  fail("%s %d bytes at offset %td of %s, which has %td", write ? "writes" : "reads", bytes, at - nearest->begin,
       nearest->name, nearest->end - nearest->begin);
}

void access(const void* pointer, int bytes, bool write, bool aligned) {
  if (current < 0) return;
  const auto* const at = static_cast<const unsigned char*>(pointer);
  if (static_cast<size_t>(at - (stacks + kStackBytes * current)) < kStackBytes) return;
  if (aligned) check_alignment(pointer, bytes);
  if (static_cast<size_t>(at - block->shared) < kSharedCapacity)
    access_shared(*block, current, static_cast<int>(at - block->shared), bytes, write);
  else
    access_global(pointer, bytes, write);
}

void run_thread() {
  for (;;) {
    body(body_arguments);
    threads[current].ended = true;
    suspend();
  }
}

void resume(int index) {
  Thread& thread = threads[index];
  const dim3& size = registers.threads;
  const int rank = index / num_threads, in_block = index % num_threads;
  registers.thread = dim3(in_block % size.x, in_block / size.x % size.y, in_block / size.x / size.y);
  registers.block.x = registers.block.x / cluster_size * cluster_size + rank;
  current = index, block = cluster + rank;
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.at, 1);
    thread.started = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stacks + kStackBytes * index;
    thread.start.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.start, run_thread, 0);
    setcontext(&thread.start);
  }
  current = -1;
}

// The cluster of this block and the next, or the block alone.
void run_cluster(dim3 first) {
  registers.block = first;
  for (Block& b : cluster) {
    ++b.interval;
    std::fill_n(b.shared, b.shared_end, 0xff);
    b.statics.clear(), b.static_bytes = 0;
    b.copy_barriers.clear();
    b.shared_end = (dynamic_bytes + 15) / 16 * 16 + 16;
    b.arrived = b.votes = 0;
  }
  cluster_arrived = 0;
  for (Warp& warp : warps) warp.arrived = 0;
  const int all_threads = cluster_size * num_threads;
  for (int t = 0; t < all_threads; ++t) {
    threads[t].waits = nullptr, threads[t].ended = false;
    threads[t].groups.assign(1, {});
  }
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    for (int k = 0; k < all_threads && error == 0; ++k) {
      const int t = cluster->interval % 2 ? k : all_threads - 1 - k;  // not always in the same order
      if (threads[t].waits == nullptr && !threads[t].ended) resume(t), goes_on = true;
    }
  }
  for (int t = 0; t < all_threads && error == 0; ++t)
    if (!threads[t].ended)
      fail("block (%u, %u, %u) hangs: thread %d waits for its %s, to which not all threads come",
           first.x + t / num_threads, first.y, first.z, t % num_threads, threads[t].waits);
}

// Waits until `count` threads from `first` on have come; whether this is the last.
bool meet(const char* what, int* come, int first, int count) {
  if (++*come < count) {
    threads[current].waits = what;
    suspend();
    return false;
  }
  *come = 0;
  for (int t = first; t < first + count; ++t) threads[t].waits = nullptr;
  return true;
}

// What every lane of the warp brings to the operation `kind`.
using Words = const unsigned (*)[8];
Words exchange(unsigned kind, const unsigned* words, int count) {
  Warp& warp = warps[current / 32];
  auto& brought = warp.words[warp.turn];
  brought[lane()][7] = kind;
  std::copy_n(words, count, brought[lane()]);
  if (meet("warp", &warp.arrived, current / 32 * 32, 32)) warp.turn ^= 1;
  for (const auto& others : brought)
    if (others[7] != kind) fail("lanes of its warp are at different operations");
  return brought;
}

}  // namespace

void launch(const void* kernel, const Launch& shape, void (*new_body)(const void*), const void* arguments, int bytes) {
  const dim3 &blocks = shape.blocks, &size = shape.threads;
  const int64_t count = int64_t{size.x} * size.y * size.z;
  const int allowed = std::max(48 << 10, allowed_shared_bytes[kernel]);
  if (count < 1 || count > kMaxThreads || size.z > 64 || blocks.x < 1 || blocks.y < 1 || blocks.z < 1 ||
      blocks.x > INT32_MAX || blocks.y > 65535 || blocks.z > 65535 || shape.shared_bytes > allowed ||
      shape.cluster > kMaxCluster || blocks.x % shape.cluster != 0)
    return fail("invalid launch: blocks (%u, %u, %u), threads (%u, %u, %u), %d bytes of shared memory", blocks.x,
                blocks.y, blocks.z, size.x, size.y, size.z, shape.shared_bytes);
  body = new_body, body_arguments = arguments;
  num_threads = static_cast<int>(count), cluster_size = shape.cluster;
  dynamic_bytes = shape.shared_bytes;
  for (Block& b : cluster) b.shared_end = kSharedCapacity;
  all_bytes = allowed_shared_bytes[kernel] > 0 ? device[2] : 48 << 10;
  registers.threads = size, registers.blocks = blocks;
  device_memory("arguments", const_cast<void*>(arguments), bytes, false);
  device_memory("registers", &registers, sizeof(registers), false);
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x && error == 0; x += cluster_size) run_cluster(dim3(x, y, z));
  memory.resize(memory.size() - 2);
  if (error)
    for (Thread& thread : threads) thread.started = false;  // their stacks hold what the error interrupted
}

int barrier(bool vote) {
  Block& b = *block;
  b.votes += vote;
  if (meet("barrier", &b.arrived, current / num_threads * num_threads, num_threads))
    b.last_votes = b.votes, b.votes = 0, ++b.interval;
  return b.last_votes;
}

void warp_barrier() {
  Warp& warp = warps[current / 32];
  if (meet("warp", &warp.arrived, current / 32 * 32, 32)) ++warp.interval;
}

int lane() { return current % 32; }

uint64_t shuffle(uint64_t word, int source_lane) {
  const unsigned words[2] = {static_cast<unsigned>(word), static_cast<unsigned>(word >> 32)};
  const unsigned* const source = exchange(1, words, 2)[source_lane & 31];
  return source[0] | static_cast<uint64_t>(source[1]) << 32;
}

void check_global_read(const void* pointer, int bytes) {
  check_alignment(pointer, bytes);
  access_global(pointer, bytes, false);
}

void* dynamic_shared() { return block->shared; }

void* static_shared(int line, int bytes) {
  Block& b = *block;
  for (const StaticShared& s : b.statics)
    if (s.line == line) return b.shared + s.begin;
  b.statics.push_back({line, b.shared_end, b.shared_end + bytes});
  b.shared_end = (b.shared_end + bytes + 15) / 16 * 16 + 16;
  b.static_bytes += bytes;
  if (b.shared_end > kSharedCapacity || dynamic_bytes + b.static_bytes > all_bytes)
    fail("%d bytes of static shared memory beside %d", b.static_bytes, dynamic_bytes);
  return b.shared + b.statics.back().begin;
}

void check_threads(int most, int) {
  if (num_threads > most) fail("%d threads, launch bounds %d", num_threads, most);
}

int allow_shared_bytes(const void* kernel, int bytes) {
  if (bytes > device[2]) return cudaErrorInvalidValue;
  allowed_shared_bytes[kernel] = bytes;
  return cudaSuccess;
}

int device_attribute(int attribute) { return device[attribute]; }

int last_error() { return std::exchange(error, 0); }
const char* error_text() { return error_message; }

void* device_memory(const char* name, void* pointer, int64_t bytes, bool writable) {
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  memory.push_back({name, begin, begin + bytes, writable});
  if (writable) std::memset(pointer, 0xff, bytes);
  return pointer;
}
void forget_memory() { memory.clear(); }

}  // namespace emulator

namespace depthwise::ptx {

using namespace emulator;

unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - block->shared);
}

void* at_shared_address(unsigned address) { return block->shared + address; }

// What a block writes to another's memory is checked as if it were the other's, which a cluster's barrier is as well.
constexpr unsigned kWindow = 1 << 24;

unsigned address_in_cluster(unsigned address, int rank) {
  if (rank < 0 || rank >= cluster_size) fail("a cluster of %d has no block %d", cluster_size, rank);
  return address + kWindow * static_cast<unsigned>(rank);
}

void store_in_cluster(unsigned address, uint4 words) {
  Block& other = cluster[address / kWindow];
  unsigned char* const to = other.shared + address % kWindow;
  check_alignment(to, 16);
  access_shared(other, current, static_cast<int>(address % kWindow), 16, true);
  std::memcpy(to, &words, 16);
}

void arrive_at_cluster_barrier() {
  threads[current].cluster_phase = cluster_phase;
  if (++cluster_arrived < cluster_size * num_threads) return;
  cluster_arrived = 0, ++cluster_phase;
  for (Block& b : cluster) ++b.interval;
  for (Thread& thread : threads)
    if (thread.waits == kWaitsForCluster) thread.waits = nullptr;
}

void wait_at_cluster_barrier() {
  while (cluster_phase == threads[current].cluster_phase) {
    threads[current].waits = kWaitsForCluster;
    suspend();
  }
}

void copy_async(void* to, const void* global, int width, int bytes) {
  check_alignment(to, width);
  check_alignment(global, width);
  if (bytes < 0 || bytes > width) fail("copies %d of %d bytes", bytes, width);
  if (bytes > 0) access_global(global, bytes, false);
  access_shared(*block, current, shared_address(to), width, true);
  std::memset(to, 0xff, width);
  threads[current].groups.back().push_back({to, global, width, bytes});
}

void commit_copies() { threads[current].groups.emplace_back(); }

void wait_for_copies(int pending) {
  auto& groups = threads[current].groups;
  for (; static_cast<int>(groups.size()) > pending + 1; groups.erase(groups.begin()))
    for (const Copy& copy : groups.front()) {
      access_shared(*block, current, shared_address(copy.shared), copy.width, true);
      std::memset(copy.shared, 0, copy.width);
      std::memcpy(copy.shared, copy.global, copy.bytes);
    }
}

void wait_for_all_copies() {
  commit_copies();
  wait_for_copies(0);
}

void initialise_barrier(unsigned barrier, int count) { block->copy_barriers[barrier] = {count, count, 0, 0, {}}; }

// What comes to a barrier: arrivals and bytes.
void come(unsigned barrier, int arrivals, int64_t bytes) {
  CopyBarrier& b = block->copy_barriers.at(barrier);
  b.pending -= arrivals, b.bytes -= bytes;
  if (b.pending < 0 || (b.pending == 0 && b.bytes < 0)) fail("more comes to a barrier than it expects");
  if (b.pending > 0 || b.bytes > 0) return;
  b.pending = b.count, ++b.phase;
  for (Thread& thread : threads)
    if (thread.waits == kWaitsForCopies) thread.waits = nullptr;
}

void expect_bytes(unsigned barrier, int bytes) { come(barrier, 1, -bytes); }
void arrive(unsigned barrier) { come(barrier, 1, 0); }

void copy_bulk(unsigned address, const void* global, int bytes, unsigned barrier) {
  unsigned char* const to = block->shared + address;
  check_alignment(to, 16);
  check_alignment(global, 16);
  if (bytes <= 0 || bytes % 16 != 0 || static_cast<int>(address) + bytes > dynamic_bytes)
    fail("copies %d bytes to shared memory at %u, of %d", bytes, address, dynamic_bytes);
  access_global(global, bytes, false);
  std::memset(to, 0xff, bytes);
  block->copy_barriers.at(barrier).copies.push_back({to, global, bytes, bytes});
  come(barrier, 0, bytes);
}

void wait_for_barrier(unsigned barrier, unsigned parity) {
  CopyBarrier& b = block->copy_barriers.at(barrier);
  while (b.phase % 2 == parity) {
    threads[current].waits = kWaitsForCopies;
    suspend();
  }
  for (const Copy& copy : b.copies) std::memcpy(copy.shared, copy.global, copy.bytes);
  b.copies.clear();
}

// The lanes' addresses of matrices of eight rows, which are read as far as `count` matrices go.
Words matrix_rows(unsigned kind, int count, unsigned address) {
  if (lane() < 8 * count) {
    check_alignment(block->shared + address, 16);
    access_shared(*block, current, address, 16, false);
  }
  return exchange(kind, &address, 1);
}

void load_matrices(unsigned* matrix, int count, unsigned address) {
  const Words addresses = matrix_rows(2, count, address);
  for (int m = 0; m < count; ++m)
    std::memcpy(matrix + m, block->shared + addresses[8 * m + lane() / 4][0] + lane() % 4 * 4, 4);
}

void load_matrices_transposed(unsigned* matrix, int count, unsigned address) {
  const Words addresses = matrix_rows(4, count, address);
  for (int m = 0; m < count; ++m)
    for (int k = 0; k < 2; ++k)
      std::memcpy(reinterpret_cast<unsigned char*>(matrix + m) + 2 * k,
                  block->shared + addresses[8 * m + lane() % 4 * 2 + k][0] + lane() / 4 * 2, 2);
}

// The tensor cores truncate: the sum of the products and of d is rounded towards zero.
void multiply(float* d, const unsigned* words, int count, float (*convert)(unsigned short)) {
  const Words lanes = exchange(count, words, count);
  const int k_words = count / 3;  // chunks of eight: two words of A, then one of B
  for (int e = 0; e < 4; ++e) {
    const int m = lane() / 4 + e / 2 * 8, n = lane() % 4 * 2 + e % 2;
    double sum = d[e];
    for (int k = 0; k < 8 * k_words; ++k) {
      const unsigned a = lanes[m % 8 * 4 + k % 8 / 2][m / 8 + k / 8 * 2];
      const unsigned b = lanes[n * 4 + k % 8 / 2][2 * k_words + k / 8];
      const auto half = [&](unsigned pair) { return double{convert(static_cast<unsigned short>(pair >> k % 2 * 16))}; };
      sum += half(a) * half(b);
    }
    d[e] = static_cast<float>(sum);
    if (std::fabs(double{d[e]}) > std::fabs(sum)) d[e] = std::nextafter(d[e], 0.f);
  }
}

}  // namespace depthwise::ptx

// ---- The calls that -fsanitize=thread makes

#define ANSWER(bytes)                                                                                   \
  extern "C" void __tsan_read##bytes(void* at) { emulator::access(at, bytes, false, true); }            \
  extern "C" void __tsan_write##bytes(void* at) { emulator::access(at, bytes, true, true); }            \
  extern "C" void __tsan_unaligned_read##bytes(void* at) { emulator::access(at, bytes, false, false); } \
  extern "C" void __tsan_unaligned_write##bytes(void* at) { emulator::access(at, bytes, true, false); }
ANSWER(1)
ANSWER(2)
ANSWER(4)
ANSWER(8)
ANSWER(16)
extern "C" void __tsan_read_range(void* at, size_t bytes) { emulator::access(at, bytes, false, false); }
extern "C" void __tsan_write_range(void* at, size_t bytes) { emulator::access(at, bytes, true, false); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_init() {}

extern "C" void emulator_set_device(int multiprocessors, int shared_bytes, int shared_bytes_block, int l2_bytes) {
  const int values[] = {multiprocessors, shared_bytes, shared_bytes_block, l2_bytes};
  std::copy(values, values + 4, emulator::device);
}
