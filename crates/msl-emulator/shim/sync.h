// Rendezvous of a simdgroup and of a threadgroup.
#pragma once

namespace metal {
enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16,
};
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<uint>(a) | static_cast<uint>(b));
}
} // namespace metal

namespace msl_rt {

// This lane and another have passed different numbers of matrix operations: names the first one
// that the slower of the two skipped.
__attribute__((noreturn, noinline)) static void skipped(Worker *w, const Lane *me, uint op, uint line) {
  const Simd *s = me->simd;
  const Lane *low = me, *high = me;
  for (uint i = 0; i < s->count; i++) {
    const Lane *l = &s->lanes[i];
    if (l->seq < low->seq) low = l;
    if (l->seq > high->seq) high = l;
  }
  const MatrixOp &o = s->ops[(low->seq + 1u) % MSL_RING];
  const bool mine = low == me;
  diverged(w, high, o.kind, o.line, low->tid, mine ? op : low->op, mine ? line : low->line);
}

// Waits for every lane of the simdgroup; true for the one that came last.
__attribute__((noinline)) static bool simd_sync(Worker *w, uint op, uint line) {
  Lane *me = w->lane;
  Simd *s = me->simd;
  if (s->arrived == 0) {
    s->sync_op = op;
    s->sync_line = line;
    s->sync_tid = me->tid;
    s->sync_seq = me->seq;
  } else {
    if (s->sync_op != op || s->sync_line != line) {
      diverged(w, me, op, line, s->sync_tid, s->sync_op, s->sync_line);
    }
    if (s->sync_seq != me->seq) skipped(w, me, op, line);
  }
  me->sync++;
  if (++s->arrived < s->count) {
    block(w, op, line);
    return false;
  }
  s->arrived = 0;
  s->ready = s->present;
  return true;
}

__attribute__((noinline)) static void group_barrier(uint flags, uint line) {
  Worker *w = worker();
  Lane *me = w->lane;
  Simd *s = me->simd;
  if (w->arrived == 0) {
    w->barrier_line = line;
    w->barrier_tid = me->tid;
  } else if (w->barrier_line != line) {
    diverged(w, me, OP_THREADGROUP_BARRIER, line, w->barrier_tid, OP_THREADGROUP_BARRIER, w->barrier_line);
  }
  w->arrived++;
  me->op = OP_THREADGROUP_BARRIER;
  me->line = line;
  // A simdgroup's lanes arrive with as many matrix operations behind them.
  if (s->barrier_head == ~0u) s->barrier_head = s->head;
  if (me->seq != s->head || s->barrier_head != s->head) skipped(w, me, OP_THREADGROUP_BARRIER, line);
  if (w->arrived < w->n_threads) {
    block(w, OP_THREADGROUP_BARRIER, line);
    return;
  }
  w->arrived = 0;
  w->counts.threadgroup_barriers++;
  w->clock++;
  if (flags & 2u) w->last_clock = w->clock;
  if (flags & 1u) w->last_device_clock = w->clock;
  w->simds_ready = w->n_simds == 32 ? ~0u : (1u << w->n_simds) - 1u;
  for (uint i = 0; i < w->n_simds; i++) {
    w->simds[i].ready = w->simds[i].present;
    w->simds[i].barrier_head = ~0u;
  }
  me->op = OP_NONE;
}

__attribute__((noinline)) static void simd_barrier(uint flags, uint line) {
  Worker *w = worker();
  // It orders nothing that a program could see: only checked runs look at who comes.
  if (flags == 0 && !w->launch->checked) {
    if (w->lane->lane == 0) w->counts.simdgroup_barriers++;
    return;
  }
  if (simd_sync(w, OP_SIMDGROUP_BARRIER, line)) {
    Simd *s = w->lane->simd;
    w->counts.simdgroup_barriers++;
    w->clock++;
    if (flags & 2u) s->last_clock = w->clock;
    if (flags & 1u) s->last_device_clock = w->clock;
  }
}

} // namespace msl_rt

namespace metal {
MSL_FN void threadgroup_barrier(mem_flags f, uint line = __builtin_LINE()) {
  msl_rt::group_barrier(static_cast<uint>(f), line);
}
MSL_FN void simdgroup_barrier(mem_flags f, uint line = __builtin_LINE()) {
  msl_rt::simd_barrier(static_cast<uint>(f), line);
}
} // namespace metal
