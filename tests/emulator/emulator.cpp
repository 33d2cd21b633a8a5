// Runs kernels on the CPU: blocks one after the other, the threads of a block as coroutines of one thread.
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
#include <vector>

#include "ptx.cuh"

namespace emulator {

Registers registers;

namespace {

constexpr int kMaxThreads = 1024, kStackBytes = 256 << 10, kSharedCapacity = 320 << 10;
constexpr int kLaunchFailure = 719;

struct Copy {
  unsigned char* shared;
  const void* global;
  int width, bytes;
};

enum class State { kReady, kAtBarrier, kInWarp, kEnded };
struct Thread {
  State state = State::kEnded;
  bool started = false;
  jmp_buf at;
  ucontext_t start;
  std::vector<std::vector<Copy>> groups;  // of copies; the last is not committed
};
struct Warp {
  void (*work)(void* const* lanes);
  void* lanes[32];
  int arrived;
};
// Who wrote and read two bytes of shared memory last, and between which barriers.
struct Cell {
  unsigned written, read;
  short writer, reader;
};
constexpr short kSeveral = -1;
struct Memory {
  const char* name;
  uintptr_t begin, end;
  bool writable;
};
struct StaticShared {
  int line, begin, end;
};

Thread threads[kMaxThreads];
Warp warps[kMaxThreads / 32];
unsigned char* const stacks = static_cast<unsigned char*>(
    mmap(nullptr, size_t{kMaxThreads} * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
jmp_buf scheduler;
int current = -1, num_threads;  // -1: the host
int arrived, votes, last_votes;  // of the barrier
unsigned interval = 1;           // between two barriers

alignas(1024) unsigned char shared[kSharedCapacity];
Cell cells[kSharedCapacity / 2];
int dynamic_bytes, shared_end;
std::vector<StaticShared> static_shared_memory;
std::vector<Memory> memory;
std::map<const void*, int> allowed_shared_bytes;
int device[3] = {132, 228 << 10, 227 << 10};  // an H200's multiprocessors and shared memory: of each, of a block

void (*kernel_body)(const void*);
const void* kernel_arguments;
int error;
char text[300];

void suspend() {
  if (_setjmp(threads[current].at) == 0) _longjmp(scheduler, 1);
}

void fail(const char* format, ...) {
  const dim3 t = registers.thread, b = registers.block;
  const int length = std::snprintf(text, sizeof(text), current < 0 ? "" : "thread (%u, %u, %u) of block (%u, %u, %u): ",
                                   t.x, t.y, t.z, b.x, b.y, b.z);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text + length, sizeof(text) - length, format, arguments);
  va_end(arguments);
  error = kLaunchFailure;
  if (current >= 0) _longjmp(scheduler, 1);
}

// One thread's access to shared memory.
void access_shared(int thread, unsigned offset, size_t bytes, bool write) {
  bool inside = offset + bytes <= static_cast<unsigned>(dynamic_bytes);
  for (const StaticShared& s : static_shared_memory)
    inside = inside || (offset >= static_cast<unsigned>(s.begin) && offset + bytes <= static_cast<unsigned>(s.end));
  if (!inside) fail("%s %zu bytes of shared memory at %u, of %d", write ? "writes" : "reads", bytes, offset, dynamic_bytes);
  for (unsigned k = offset / 2; k <= (offset + bytes - 1) / 2; ++k) {
    Cell& cell = cells[k];
    if (cell.written == interval && cell.writer != thread)
      fail("%s shared memory at %u, which thread %d writes without a barrier between", write ? "writes" : "reads", 2 * k,
           cell.writer);
    if (write) {
      if (cell.read == interval && cell.reader != thread)
        fail("writes shared memory at %u, which another thread reads without a barrier between", 2 * k);
      cell.written = interval, cell.writer = static_cast<short>(thread);
    } else {
      cell.reader = cell.read == interval && cell.reader != thread ? kSeveral : static_cast<short>(thread);
      cell.read = interval;
    }
  }
}

void access_global(const void* pointer, size_t bytes, bool write) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  const Memory* nearest = nullptr;
  for (const Memory& m : memory) {
    // A copy takes whole aligned granules of 16 bytes, of which the first may begin before the tensor.
    if (at >= (write ? m.begin : m.begin & ~uintptr_t{15}) && at + bytes <= m.end && (m.writable || !write)) return;
    if (nearest == nullptr || (at >= m.begin && m.begin >= nearest->begin)) nearest = &m;
  }
  fail("%s %zu bytes at offset %td of %s, which has %td", write ? "writes" : "reads", bytes,
       nearest ? at - nearest->begin : at, nearest ? nearest->name : "nothing",
       nearest ? nearest->end - nearest->begin : 0);
}

void access(const void* pointer, size_t bytes, bool write, bool aligned) {
  if (current < 0) return;
  const auto* const at = static_cast<const unsigned char*>(pointer);
  if (static_cast<size_t>(at - (stacks + size_t{kStackBytes} * current)) < kStackBytes) return;
  if (aligned && reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
    fail("%s %zu bytes at an address that is no multiple of them", write ? "writes" : "reads", bytes);
  if (static_cast<size_t>(at - shared) < kSharedCapacity)
    access_shared(current, static_cast<unsigned>(at - shared), bytes, write);
  else
    access_global(pointer, bytes, write);
}

void run_thread() {
  for (;;) {
    kernel_body(kernel_arguments);
    threads[current].state = State::kEnded;
    suspend();
  }
}

void resume(int index) {
  Thread& thread = threads[index];
  current = index;
  const dim3& size = registers.threads;
  registers.thread = dim3(index % size.x, index / size.x % size.y, index / size.x / size.y);
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.at, 1);
    thread.started = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stacks + size_t{kStackBytes} * index;
    thread.start.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.start, run_thread, 0);
    setcontext(&thread.start);
  }
  current = -1;
}

void run_block() {
  ++interval;
  std::memset(shared, 0xff, shared_end);
  static_shared_memory.clear();
  shared_end = (dynamic_bytes + 15) / 16 * 16 + 16;
  arrived = votes = 0;
  for (Warp& warp : warps) warp.arrived = 0;
  for (int t = 0; t < num_threads; ++t) threads[t].state = State::kReady, threads[t].groups.assign(1, {});
  for (bool goes_on = true; goes_on;) {
    goes_on = false;
    for (int k = 0; k < num_threads && error == 0; ++k) {
      const int t = interval % 2 ? k : num_threads - 1 - k;
      if (threads[t].state == State::kReady) resume(t), goes_on = true;
    }
  }
  for (int t = 0; t < num_threads && error == 0; ++t)
    if (threads[t].state != State::kEnded)
      fail("block (%u, %u, %u) hangs: thread %d waits %s, but %d of %d threads have come", registers.block.x,
           registers.block.y, registers.block.z, t,
           threads[t].state == State::kAtBarrier ? "at a barrier" : "for its warp",
           threads[t].state == State::kAtBarrier ? arrived : warps[t / 32].arrived,
           threads[t].state == State::kAtBarrier ? num_threads : 32);
}

// The lane of a warp that comes last does the work of all.
void together(void (*work)(void* const*), void* own) {
  Warp& warp = warps[current / 32];
  if (warp.arrived > 0 && warp.work != work) fail("lanes of its warp are at different operations");
  warp.work = work;
  warp.lanes[current % 32] = own;
  if (++warp.arrived < 32) {
    threads[current].state = State::kInWarp;
    suspend();
    return;
  }
  work(warp.lanes);
  warp.arrived = 0;
  for (int t = current / 32 * 32; t < current / 32 * 32 + 32; ++t) threads[t].state = State::kReady;
}

}  // namespace

void launch(const void* kernel, const Launch& shape, void (*body)(const void*), const void* arguments, int bytes) {
  const int64_t count = int64_t{shape.threads.x} * shape.threads.y * shape.threads.z;
  const int allowed = std::max(48 << 10, allowed_shared_bytes[kernel]);
  if (count < 1 || count > kMaxThreads || shape.threads.z > 64 || int64_t{shape.blocks.x} * shape.blocks.y * shape.blocks.z < 1 ||
      shape.blocks.x > INT32_MAX || shape.blocks.y > 65535 || shape.blocks.z > 65535 || shape.shared_bytes > allowed)
    return fail("invalid launch: blocks (%u, %u, %u), threads (%u, %u, %u), %d bytes of shared memory", shape.blocks.x,
                shape.blocks.y, shape.blocks.z, shape.threads.x, shape.threads.y, shape.threads.z, shape.shared_bytes);
  kernel_body = body, kernel_arguments = arguments;
  num_threads = static_cast<int>(count);
  dynamic_bytes = shape.shared_bytes, shared_end = kSharedCapacity;
  registers.threads = shape.threads, registers.blocks = shape.blocks;
  device_memory("arguments", const_cast<void*>(arguments), bytes, false);
  device_memory("registers", &registers, sizeof(registers), false);
  for (unsigned z = 0; z < shape.blocks.z && error == 0; ++z)
    for (unsigned y = 0; y < shape.blocks.y && error == 0; ++y)
      for (unsigned x = 0; x < shape.blocks.x && error == 0; ++x) {
        registers.block = dim3(x, y, z);
        run_block();
      }
  memory.resize(memory.size() - 2);
  if (error)
    for (Thread& thread : threads) thread.started = false;  // their stacks hold what the error interrupted
}

int barrier(bool vote) {
  votes += vote;
  if (++arrived < num_threads) {
    threads[current].state = State::kAtBarrier;
    suspend();
  } else {
    arrived = 0, last_votes = votes, votes = 0, ++interval;
    for (int t = 0; t < num_threads; ++t) threads[t].state = State::kReady;
  }
  return last_votes;
}

int lane() { return current % 32; }

uint64_t shuffle(uint64_t word, int source_lane) {
  struct Lane {
    uint64_t word;
    int source;
    uint64_t result;
  } own{word, source_lane & 31, 0};
  together(
      [](void* const* lanes) {
        for (int l = 0; l < 32; ++l) {
          auto* const lane = static_cast<Lane*>(lanes[l]);
          lane->result = static_cast<Lane*>(lanes[lane->source])->word;
        }
      },
      &own);
  return own.result;
}

void check_global_read(const void* pointer, int bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("reads %d bytes at an address that is no multiple of them", bytes);
  access_global(pointer, bytes, false);
}

void* dynamic_shared() { return shared; }

void* static_shared(int line, int bytes) {
  for (const StaticShared& s : static_shared_memory)
    if (s.line == line) return shared + s.begin;
  static_shared_memory.push_back({line, shared_end, shared_end + bytes});
  shared_end = (shared_end + bytes + 15) / 16 * 16 + 16;
  if (shared_end > kSharedCapacity) fail("static shared memory of %d bytes", bytes);
  return shared + static_shared_memory.back().begin;
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

int last_error() {
  const int last = error;
  error = 0;
  return last;
}
const char* error_text() { return text; }

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

unsigned shared_address(const void* pointer) { return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - shared); }

void copy_async(void* to, const void* global, int width, int bytes) {
  const unsigned offset = shared_address(to);
  if (offset >= kSharedCapacity || offset % width != 0 || reinterpret_cast<uintptr_t>(global) % width != 0)
    fail("copies %d bytes to or from addresses that are no multiples of them", width);
  if (bytes < 0 || bytes > width) fail("copies %d of %d bytes", bytes, width);
  if (bytes > 0) access_global(global, bytes, false);
  access_shared(current, offset, width, true);
  std::memset(to, 0xff, width);
  threads[current].groups.back().push_back({static_cast<unsigned char*>(to), global, width, bytes});
}

void commit_copies() { threads[current].groups.emplace_back(); }

void wait_for_copies(int pending) {
  auto& groups = threads[current].groups;
  while (static_cast<int>(groups.size()) > pending + 1) {
    for (const Copy& copy : groups.front()) {
      access_shared(current, shared_address(copy.shared), copy.width, true);
      std::memset(copy.shared, 0, copy.width);
      std::memcpy(copy.shared, copy.global, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

void wait_for_all_copies() {
  commit_copies();
  wait_for_copies(0);
}

void load_matrices(unsigned* matrix, int count, unsigned address) {
  struct Lane {
    unsigned* matrix;
    int count;
    unsigned address;
  } own{matrix, count, address};
  together(
      [](void* const* lanes) {
        for (int m = 0; m < static_cast<Lane*>(lanes[0])->count; ++m)
          for (int row = 0; row < 8; ++row) {
            const unsigned from = static_cast<Lane*>(lanes[8 * m + row])->address;
            if (from >= kSharedCapacity || from % 16 != 0) fail("ldmatrix reads a row at %u", from);
            access_shared(current / 32 * 32 + 8 * m + row, from, 16, false);
            for (int k = 0; k < 4; ++k)
              std::memcpy(static_cast<Lane*>(lanes[4 * row + k])->matrix + m, shared + from + 4 * k, 4);
          }
      },
      &own);
}

// The tensor cores truncate: the sum of the products and of d is rounded towards zero.
void multiply(const Product& product) {
  together(
      [](void* const* lanes) {
        const auto of = [&](int lane) -> const Product& { return *static_cast<const Product*>(lanes[lane]); };
        const auto element = [&](unsigned pair, int k) { return of(0).convert(static_cast<unsigned short>(pair >> 16 * (k % 2))); };
        float a[16][16], b[16][8];
        for (int k = 0; k < of(0).k; ++k) {
          for (int m = 0; m < 16; ++m) a[m][k] = element(of(m % 8 * 4 + k % 8 / 2).a[m / 8 + k / 8 * 2], k);
          for (int n = 0; n < 8; ++n) b[k][n] = element(of(n * 4 + k % 8 / 2).b[k / 8], k);
        }
        for (int m = 0; m < 16; ++m)
          for (int n = 0; n < 8; ++n) {
            float& d = of(m % 8 * 4 + n / 2).d[m / 8 * 2 + n % 2];
            double sum = d;
            for (int k = 0; k < of(0).k; ++k) sum += static_cast<double>(a[m][k]) * b[k][n];
            d = static_cast<float>(sum);
            if (std::fabs(static_cast<double>(d)) > std::fabs(sum)) d = std::nextafter(d, 0.f);
          }
      },
      const_cast<Product*>(&product));
}

}  // namespace depthwise::ptx

// ---- The calls that -fsanitize=thread makes

#define ANSWER(bytes)                                                                                          \
  extern "C" void __tsan_read##bytes(void* at) { emulator::access(at, bytes, false, true); }                   \
  extern "C" void __tsan_write##bytes(void* at) { emulator::access(at, bytes, true, true); }                   \
  extern "C" void __tsan_unaligned_read##bytes(void* at) { emulator::access(at, bytes, false, false); }        \
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

extern "C" void emulator_set_device(int multiprocessors, int shared_bytes, int shared_bytes_block) {
  emulator::device[0] = multiprocessors, emulator::device[1] = shared_bytes, emulator::device[2] = shared_bytes_block;
}
