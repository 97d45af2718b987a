// The state of one worker: its fibers, simdgroups, threadgroup memory and shadow memory.
#pragma once

namespace msl_rt {

typedef float float8v __attribute__((ext_vector_type(8)));

// Matrix operations in flight in a simdgroup; a lane may be ahead of another by as many.
#define MSL_RING 128u

struct Simd;

struct Lane {
  void *sp;
  Simd *simd;
  uint tid;     // linear thread index in the threadgroup
  uint lane;    // index in the simdgroup
  uint bit;     // 1 << slot, the slot being the order in which lanes run
  uint seq;     // matrix operations passed
  uint sync;    // lane exchanges passed
  uint op;      // what it waits for
  uint line;    // where
  uint pos[3];
  ulong stack_lo;
};

struct MatrixOp {
  uint kind;
  uint line;
  uint gather;  // operands that every lane must bring
  uint arrived;
  const void *ptr;
};

struct Simd {
  uint ready;
  uint present;
  uint done;
  uint count;
  uint index;
  uint arrived;
  uint sync_op;
  uint sync_line;
  uint sync_tid;
  uint sync_seq;
  uint barrier_head;
  uint head;     // matrix operations begun
  uint min_seq;  // a lower bound of what every lane has passed
  uint last_clock; // of the last simdgroup barrier that orders threadgroup memory
  uint last_device_clock;
  Lane *lanes;
  alignas(64) uchar exchange[2][MSL_LANES * 16];
  alignas(64) uchar result[2][64];
  alignas(64) MatrixOp ops[MSL_RING];
  alignas(64) float data[MSL_RING][64];
};

struct Cell {
  ulong stamp;
  ulong pc;
};

struct Worker {
  Lane *lane;
  const Launch *launch;
  void *main_sp;
  void (*task)();
  uint status;
  uint n_threads;
  uint n_simds;
  uint simds_ready;
  uint simds_left;
  uint arrived;
  uint barrier_line;
  uint barrier_tid;
  uint clock;
  uint last_clock;
  uint last_device_clock;
  uint group[3];
  uint group_stamp; // the threadgroup, for device memory
  uint arena_stamp; // runs of any threadgroup so far, for threadgroup memory
  const Range *last_range;
  Counts counts;
  Fault fault;
  Lane lanes[MSL_MAX_THREADS];
  Simd simds[MSL_LANES];
  alignas(4096) uchar arena[MSL_ARENA];
  alignas(4096) Cell written[MSL_ARENA];
  Cell read[MSL_ARENA];
};
static_assert(sizeof(Worker) <= MSL_STACKS, "a worker must fit before the stacks");
static_assert(MSL_STACKS + MSL_MAX_THREADS * MSL_STACK <= MSL_REGION, "stacks must fit");

MSL_FN Worker *worker() {
  ulong sp;
#if defined(__x86_64__)
  __asm__("mov %%rsp, %0" : "=r"(sp));
#else
  __asm__("mov %0, sp" : "=r"(sp));
#endif
  return reinterpret_cast<Worker *>(sp & ~(MSL_REGION - 1));
}

static inline void count_exp2() { worker()->counts.exp2++; }

} // namespace msl_rt
