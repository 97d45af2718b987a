// Fibers: the context switch, which lane runs next, and how a run ends.
#pragma once

namespace msl_rt {

// Saves the callee-saved registers on this stack, its pointer in *save, and resumes `to`.
#if defined(__x86_64__)
__attribute__((naked, noinline)) static void switch_stack(void **, void *) {
  __asm__("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
          "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
          "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n retq\n");
}
#else
__attribute__((naked, noinline)) static void switch_stack(void **, void *) {
  __asm__("sub sp, sp, #160\n"
          "stp x19, x20, [sp, #0]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n"
          "stp x25, x26, [sp, #48]\n stp x27, x28, [sp, #64]\n stp x29, x30, [sp, #80]\n"
          "stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n stp d12, d13, [sp, #128]\n"
          "stp d14, d15, [sp, #144]\n"
          "mov x9, sp\n str x9, [x0]\n mov sp, x1\n"
          "ldp x19, x20, [sp, #0]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n"
          "ldp x25, x26, [sp, #48]\n ldp x27, x28, [sp, #64]\n ldp x29, x30, [sp, #80]\n"
          "ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n"
          "ldp d14, d15, [sp, #144]\n add sp, sp, #160\n ret\n");
}
#endif

static void *fresh_stack(ulong top, void (*start)()) {
  ulong *p = reinterpret_cast<ulong *>(top);
#if defined(__x86_64__)
  p -= 8;
  for (int i = 0; i < 8; i++) p[i] = 0;
  p[6] = reinterpret_cast<ulong>(start);
#else
  p -= 20;
  for (int i = 0; i < 20; i++) p[i] = 0;
  p[11] = reinterpret_cast<ulong>(start);
#endif
  return p;
}

__attribute__((noreturn, noinline)) static void leave(Worker *w) {
  void *unused;
  switch_stack(&unused, w->main_sp);
  __builtin_unreachable();
}

__attribute__((noinline)) static Fault &fault_at(Worker *w, uint kind, uint line) {
  Fault &f = w->fault;
  f = Fault();
  f.kind = kind;
  f.line = line;
  for (int i = 0; i < 3; i++) f.group[i] = w->group[i];
  f.thread = w->lane->tid;
  f.other_thread = ~0u;
  w->status = 1;
  return f;
}

__attribute__((noreturn, noinline)) static void diverged(Worker *w, const Lane *a, uint op, uint line,
                                                         uint other_tid, uint other_op,
                                                         uint other_line) {
  Fault &f = fault_at(w, FAULT_DIVERGENCE, line);
  f.thread = a->tid;
  f.op = op;
  f.other_thread = other_tid;
  f.other_op = other_op;
  f.other_line = other_line;
  leave(w);
}

// No lane can run and some have not finished: says who waits, and who does not come.
__attribute__((noreturn, noinline)) static void stuck(Worker *w) {
  const Lane *waiting = nullptr;
  for (uint i = 0; i < w->n_threads; i++) {
    const Lane *l = &w->lanes[i];
    if (l->op == OP_FINISHED) continue;
    if (!waiting || (waiting->op == OP_THREADGROUP_BARRIER && l->op != OP_THREADGROUP_BARRIER)) waiting = l;
  }
  const bool whole = waiting->op == OP_THREADGROUP_BARRIER;
  const Lane *other = nullptr;
  for (uint i = 0; i < w->n_threads; i++) {
    const Lane *l = &w->lanes[i];
    if (l == waiting || (!whole && l->simd != waiting->simd)) continue;
    if (l->op != waiting->op || l->line != waiting->line) {
      other = l;
      break;
    }
  }
  if (!other) other = waiting;
  diverged(w, waiting, waiting->op, waiting->line, other->tid, other->op, other->line);
}

// Gives the processor to the next lane that can run: this simdgroup's first.
static void run_next(Worker *w) {
  Lane *me = w->lane;
  Simd *s = me->simd;
  uint m = s->ready;
  if (__builtin_expect(m == 0, 0)) {
    w->simds_ready &= ~(1u << s->index);
    const uint sm = w->simds_ready;
    if (sm == 0) {
      if (w->simds_left == 0) leave(w);
      stuck(w);
    }
    const uint above = sm & ~((2u << s->index) - 1u);
    s = &w->simds[__builtin_ctz(above ? above : sm)];
    m = s->ready;
    Lane *next = &s->lanes[__builtin_ctz(m)];
    w->lane = next;
    switch_stack(&me->sp, next->sp);
    return;
  }
  const uint above = m & ~(me->bit | (me->bit - 1u));
  Lane *next = &s->lanes[__builtin_ctz(above ? above : m)];
  if (next == me) return;
  w->lane = next;
  switch_stack(&me->sp, next->sp);
}

static void block(Worker *w, uint op, uint line) {
  Lane *me = w->lane;
  me->op = op;
  me->line = line;
  me->simd->ready &= ~me->bit;
  run_next(w);
  me->op = OP_NONE;
}

static void skipped(Worker *w, const Lane *me, uint op, uint line);

static void lane_main() {
  Worker *w = worker();
  w->task();
  w = worker();
  Lane *me = w->lane;
  Simd *s = me->simd;
  me->op = OP_FINISHED;
  s->ready &= ~me->bit;
  s->done |= me->bit;
  if (s->done == s->present) {
    w->simds_left--;
    for (uint i = 0; i < s->count; i++) {
      if (s->lanes[i].seq != s->head) skipped(w, &s->lanes[i], OP_FINISHED, 0);
    }
  }
  run_next(w);
  __builtin_unreachable();
}

// Spreads the hot ends of the stacks over cache sets that would otherwise coincide.
static ulong stack_top(const Worker *w, uint i) {
  const ulong hi = reinterpret_cast<ulong>(w) + MSL_STACKS + (i + 1ul) * MSL_STACK;
  return hi - 64u - (i * 0x340u & 0x3fc0u);
}

static ulong mix(ulong z) {
  z += 0x9e3779b97f4a7c15ul;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ul;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebul;
  return z ^ (z >> 31);
}

// A permutation of 0..n from a seed.
static void permute(uint *p, uint n, ulong seed) {
  for (uint i = 0; i < n; i++) p[i] = i;
  if (seed == 0) return;
  for (uint i = n; i > 1; i--) {
    seed = mix(seed);
    const uint j = static_cast<uint>(seed % i);
    const uint t = p[i - 1];
    p[i - 1] = p[j];
    p[j] = t;
  }
}

static void lay_out(Worker *w, const Launch *l, uint n, ulong seed) {
  const uint simds = (n + MSL_LANES - 1) / MSL_LANES;
  uint order[MSL_LANES], lanes[MSL_LANES];
  permute(order, simds, seed);
  w->n_threads = n;
  w->n_simds = simds;
  w->simds_left = simds;
  w->simds_ready = simds == 32 ? ~0u : (1u << simds) - 1u;
  uint slot = 0;
  for (uint k = 0; k < simds; k++) {
    Simd *s = &w->simds[k];
    const uint first = order[k] * MSL_LANES;
    const uint count = n - first < MSL_LANES ? n - first : MSL_LANES;
    permute(lanes, count, seed ? mix(seed ^ (k + 1)) : 0);
    s->count = count;
    s->present = count == 32 ? ~0u : (1u << count) - 1u;
    s->ready = s->present;
    s->done = s->arrived = s->head = s->min_seq = 0;
    s->barrier_head = ~0u;
    s->last_clock = s->last_device_clock = 0;
    s->index = k;
    s->lanes = &w->lanes[slot];
    for (uint i = 0; i < count; i++, slot++) {
      Lane *t = &w->lanes[slot];
      t->simd = s;
      t->bit = 1u << i;
      t->lane = lanes[i];
      t->tid = first + lanes[i];
      t->seq = t->sync = t->op = t->line = 0;
      t->pos[0] = t->tid % l->threads[0];
      t->pos[1] = t->tid / l->threads[0] % l->threads[1];
      t->pos[2] = t->tid / (l->threads[0] * l->threads[1]);
      t->stack_lo = reinterpret_cast<ulong>(w) + MSL_STACKS + slot * MSL_STACK;
      t->sp = fresh_stack(stack_top(w, slot), lane_main);
    }
  }
}

// Set by the first run: what the loader runs before must not look for a worker.
static bool running = false;

static uint start(Worker *w, const Launch *l, uint n, ulong seed, void (*task)()) {
  w->launch = l;
  w->status = 0;
  w->task = task;
  w->arrived = 0;
  w->clock = 1;
  w->last_clock = w->last_device_clock = 0;
  w->last_range = l->ranges;
  lay_out(w, l, n, seed);
  running = true;
  w->lane = &w->lanes[0];
  switch_stack(&w->main_sp, w->lane->sp);
  return w->status;
}

static uint run_group(Worker *w, const Launch *l, ulong group) {
  w->group[0] = static_cast<uint>(group % l->groups[0]);
  w->group[1] = static_cast<uint>(group / l->groups[0] % l->groups[1]);
  w->group[2] = static_cast<uint>(group / l->groups[0] / l->groups[1]);
  w->group_stamp = static_cast<uint>(group % 0x3ffffeul) + 1u;
  if (++w->arena_stamp == 0x3fffffu) {
    // Stamps would repeat: forget them all.
    __builtin_memset(w->written, 0, sizeof(w->written));
    __builtin_memset(w->read, 0, sizeof(w->read));
    w->arena_stamp = 1;
  }
  // All ones is a NaN in every float format: reads of what nobody wrote do not pass unseen.
  __builtin_memset(w->arena, 0xff, l->arena_bytes);
  return start(w, l, l->threads[0] * l->threads[1] * l->threads[2],
               l->shuffle ? mix(l->shuffle ^ mix(group)) : 0, l->entry);
}

// Runs `task` on a fiber of its own, with no memory bound.
static void run_alone(Worker *w, void (*task)()) {
  Launch l = Launch();
  l.threads[0] = l.threads[1] = l.threads[2] = 1;
  l.module_hi = ~0ul;
  start(w, &l, 1, 0, task);
}

#ifdef MSL_CHECKED
static constexpr uint is_checked = 1;
#else
static constexpr uint is_checked = 0;
#endif

} // namespace msl_rt
