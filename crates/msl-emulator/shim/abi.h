// What the host and the compiled program share. Mirrored by src/abi.rs, field by field.
#pragma once

#define MSL_ABI_VERSION 2u
#define MSL_BUFFERS 31
#define MSL_MAX_THREADS 1024
#define MSL_LANES 32
// One worker's memory: aligned to its size, so that any stack pointer finds its worker.
#define MSL_REGION (512ul << 20)
#define MSL_STACKS (64ul << 20)
#define MSL_STACK (256ul << 10)
#define MSL_GUARD (64ul << 10)
#define MSL_ARENA (128u << 10)

namespace msl_rt {

struct Buffer {
  uchar *ptr;
  ulong len;
};

// A stretch of memory that a checked dispatch may touch. `shadow` is two stamps a byte, or null
// for what cannot be written.
struct Range {
  uchar *lo;
  uchar *hi;
  ulong *shadow;
  uint index;
  uint writable;
};

// A threadgroup variable, as bytes [lo, hi) of the arena.
struct ArenaVar {
  uint lo;
  uint hi;
};

struct Launch {
  void (*entry)();
  Buffer buffers[MSL_BUFFERS];
  uint arena_offset[MSL_BUFFERS];
  uint groups[3];
  uint threads[3];
  uint arena_bytes;
  uint checked;
  uint n_ranges;
  uint n_vars;
  const Range *ranges;
  const ArenaVar *vars;
  ulong module_lo;
  ulong module_hi;
  ulong shuffle;
};

enum FaultKind : uint {
  FAULT_NONE = 0,
  FAULT_OUT_OF_BOUNDS,
  FAULT_READ_ONLY,
  FAULT_ARENA_BOUNDS,
  FAULT_RACE,
  FAULT_DEVICE_RACE,
  FAULT_UNWRITTEN,
  FAULT_MISALIGNED,
  FAULT_OTHER_STACK,
  FAULT_DIVERGENCE,
  FAULT_OPERANDS,
  FAULT_STALE,
};

// What a thread was doing when it stopped, for divergence.
enum OpKind : uint {
  OP_NONE = 0,
  OP_FINISHED,
  OP_THREADGROUP_BARRIER,
  OP_SIMDGROUP_BARRIER,
  OP_SIMD,
  OP_LOAD,
  OP_STORE,
  OP_MULTIPLY,
  OP_FILL,
};

struct Fault {
  uint kind;
  uint write;
  uint group[3];
  uint thread;
  uint other_thread;
  uint other_group;
  uint op;
  uint other_op;
  uint line;
  uint other_line;
  uint index;
  uint size;
  long offset;
  ulong pc;
  ulong other_pc;
};

struct Counts {
  ulong multiplies;
  ulong threadgroup_barriers;
  ulong simdgroup_barriers;
  ulong device_read;
  ulong device_written;
  ulong threadgroup_read;
  ulong threadgroup_written;
  ulong exp2;
};

struct KernelRecord {
  const char *name;
  const void *key;
  void (*entry)();
  const uint *arg_sizes;
  uint n_args;
  uint max_threads; // 0: no limit of its own
};

struct ConstantRecord {
  uint index;
  uint size;
  void *value;
  bool *defined; // null for a derived one
};

// A threadgroup variable of one kernel instance; the host writes `offset`.
struct ThreadgroupRecord {
  const void *key;
  uint site;
  uint bytes;
  uint align;
  uint offset;
  ThreadgroupRecord *next;
};

struct Worker;

struct Table {
  uint abi;
  uint checked;
  const KernelRecord *kernels;
  ulong n_kernels;
  const ConstantRecord *constants;
  ulong n_constants;
  const ConstantRecord *derived;
  ulong n_derived;
  ThreadgroupRecord *const *threadgroup;
  // Evaluates the constants that are derived from function constants.
  void (*derive)(Worker *);
  // Runs one threadgroup; 0 when it ended, 1 when it left a fault.
  uint (*run)(Worker *, const Launch *, ulong group);
  Fault *(*fault)(Worker *);
  Counts *(*counts)(Worker *);
};

} // namespace msl_rt
