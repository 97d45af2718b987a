// Checked runs: every access of the program arrives here through the compiler's thread-sanitizer
// instrumentation, and is tested for bounds, permission, races, alignment and unwritten memory.
#pragma once

namespace msl_rt {

// A stamp says who accessed a byte and when: group 22 bits, agent 11, atomic 1, clock 30.
// An agent is a thread, a whole simdgroup (collective), or a set of readers.
#define MSL_COLLECTIVE 1024u
#define MSL_READERS 1056u
#define MSL_ALL_READERS 2047u
#define MSL_ALL_GROUPS 0x3ffffful

MSL_FN ulong stamp_of(ulong group, uint agent, uint atomic, uint clock) {
  return group << 42 | static_cast<ulong>(agent) << 31 | static_cast<ulong>(atomic) << 30 |
         (clock & 0x3fffffffu);
}
MSL_FN ulong stamp_group(ulong s) { return s >> 42; }
MSL_FN uint stamp_agent(ulong s) { return static_cast<uint>(s >> 31) & 0x7ffu; }
MSL_FN bool stamp_atomic(ulong s) { return s >> 30 & 1u; }
MSL_FN uint stamp_clock(ulong s) { return static_cast<uint>(s) & 0x3fffffffu; }
MSL_FN uint agent_simd(uint a) { return a < MSL_COLLECTIVE ? a / MSL_LANES : (a - MSL_COLLECTIVE) & 31u; }
MSL_FN uint agent_thread(uint a) {
  return a < MSL_COLLECTIVE ? a : a == MSL_ALL_READERS ? ~0u : agent_simd(a) * MSL_LANES;
}

struct Access {
  Worker *w;
  uint agent;
  uint simd;
  bool write;
  bool atomic;
  uint last;      // the last threadgroup barrier that orders this memory
  uint simd_last; // the last simdgroup barrier that does
  ulong pc;
  uint line;
};

__attribute__((noinline)) static Fault &access_fault(const Access &a, uint kind, uint size) {
  Fault &f = fault_at(a.w, kind, a.line);
  f.pc = a.pc;
  f.write = a.write;
  f.size = size;
  return f;
}

// Whether an earlier access of the same threadgroup is ordered before this one.
MSL_FN bool ordered(const Access &a, ulong prev) {
  const uint agent = stamp_agent(prev), clock = stamp_clock(prev);
  if (agent == a.agent || clock < a.last || (a.atomic && stamp_atomic(prev))) return true;
  return agent != MSL_ALL_READERS && agent_simd(agent) == a.simd && clock < a.simd_last;
}

// The read stamp after one more reader.
MSL_FN ulong join_reader(const Access &a, ulong prev, ulong group) {
  uint agent = a.agent;
  const bool stale = stamp_group(prev) != group || stamp_clock(prev) < a.last;
  if (!stale && stamp_agent(prev) != agent) {
    const uint p = stamp_agent(prev);
    if (p == MSL_ALL_READERS || agent_simd(p) != a.simd) {
      agent = MSL_ALL_READERS;
    } else if (stamp_clock(prev) >= a.simd_last) {
      agent = MSL_READERS + a.simd;
    }
  }
  return stamp_of(group, agent, a.atomic && (stale || stamp_atomic(prev)), a.w->clock);
}

__attribute__((noreturn, noinline)) static void arena_race(const Access &a, const Cell &prev, uint offset,
                                                           uint size) {
  Fault &f = access_fault(a, FAULT_RACE, size);
  f.offset = offset;
  f.other_thread = agent_thread(stamp_agent(prev.stamp));
  f.other_pc = prev.pc;
  leave(a.w);
}

// `pc` of a cell: a return address, or a line when small.
MSL_FN ulong cell_pc(const Access &a) { return a.line ? a.line : a.pc; }

static void check_arena(const Access &a, uint offset, uint size) {
  Worker *w = a.w;
  const Launch *l = w->launch;
  bool inside = false;
  for (uint i = 0; i < l->n_vars; i++) {
    if (offset >= l->vars[i].lo && offset + size <= l->vars[i].hi) inside = true;
  }
  if (!inside) {
    access_fault(a, FAULT_ARENA_BOUNDS, size).offset = offset;
    leave(w);
  }
  const ulong group = w->arena_stamp;
  for (uint i = offset; i < offset + size; i++) {
    Cell &wr = w->written[i], &rd = w->read[i];
    const bool known = stamp_group(wr.stamp) == group;
    if (known && !ordered(a, wr.stamp)) arena_race(a, wr, i, size);
    if (a.write) {
      if (stamp_group(rd.stamp) == group && !ordered(a, rd.stamp)) arena_race(a, rd, i, size);
      wr.stamp = stamp_of(group, a.agent, a.atomic, w->clock);
      wr.pc = cell_pc(a);
    } else {
      if (!known) {
        access_fault(a, FAULT_UNWRITTEN, size).offset = i;
        leave(w);
      }
      rd.stamp = join_reader(a, rd.stamp, group);
      rd.pc = cell_pc(a);
    }
  }
  (a.write ? w->counts.threadgroup_written : w->counts.threadgroup_read) += size;
}

__attribute__((noreturn, noinline)) static void device_race(const Access &a, const Range &r, ulong prev, ulong at,
                                                            uint size) {
  Fault &f = access_fault(a, FAULT_DEVICE_RACE, size);
  f.index = r.index;
  f.offset = static_cast<long>(at);
  const ulong g = stamp_group(prev);
  f.other_group = g == MSL_ALL_GROUPS ? ~0u : static_cast<uint>(g - 1u);
  f.other_thread = agent_thread(stamp_agent(prev));
  leave(a.w);
}

static void check_device(const Access &a, ulong addr, uint size) {
  Worker *w = a.w;
  const Launch *l = w->launch;
  const Range *r = w->last_range;
  const Range *const end = l->ranges + l->n_ranges;
  if (r >= end || addr < reinterpret_cast<ulong>(r->lo) || addr + size > reinterpret_cast<ulong>(r->hi)) {
    const Range *near = nullptr;
    ulong near_by = ~0ul;
    for (r = l->ranges; r < end; r++) {
      const ulong lo = reinterpret_cast<ulong>(r->lo), hi = reinterpret_cast<ulong>(r->hi);
      if (addr >= lo && addr + size <= hi) break;
      const ulong by = addr < lo ? lo - addr : addr + size - hi;
      if (by < near_by) near_by = by, near = r;
    }
    if (r == end) {
      if (!a.write && addr >= l->module_lo && addr + size <= l->module_hi) return;
      Fault &f = access_fault(a, FAULT_OUT_OF_BOUNDS, size);
      f.index = near ? near->index : ~0u;
      f.offset = near ? static_cast<long>(addr - reinterpret_cast<ulong>(near->lo)) : static_cast<long>(addr);
      leave(w);
    }
    w->last_range = r;
  }
  if (a.write && !r->writable) {
    // The same memory may be bound a second time, for writing.
    for (const Range *o = l->ranges; o < end; o++) {
      if (o->writable && addr >= reinterpret_cast<ulong>(o->lo) && addr + size <= reinterpret_cast<ulong>(o->hi)) r = o;
    }
  }
  const ulong at = addr - reinterpret_cast<ulong>(r->lo);
  if (a.write && !r->writable) {
    Fault &f = access_fault(a, FAULT_READ_ONLY, size);
    f.index = r->index;
    f.offset = static_cast<long>(at);
    leave(w);
  }
  (a.write ? w->counts.device_written : w->counts.device_read) += size;
  if (!r->shadow) return;
  const ulong group = w->group_stamp;
  for (ulong i = at; i < at + size; i++) {
    ulong *const wr = &r->shadow[2 * i], *const rd = wr + 1;
    // Exchanges, so that of two threadgroups on two cores one sees the other.
    if (a.write) {
      const ulong old = __atomic_exchange_n(wr, stamp_of(group, a.agent, a.atomic, w->clock), __ATOMIC_SEQ_CST);
      const ulong seen = __atomic_load_n(rd, __ATOMIC_SEQ_CST);
      const ulong both[2] = {old, seen};
      for (ulong s : both) {
        if (s == 0 || (a.atomic && stamp_atomic(s))) continue;
        if (stamp_group(s) != group || !ordered(a, s)) device_race(a, *r, s, at, size);
      }
    } else {
      const ulong prev = __atomic_load_n(rd, __ATOMIC_RELAXED);
      ulong next = join_reader(a, prev, group);
      if (prev && stamp_group(prev) != group) {
        next = stamp_of(MSL_ALL_GROUPS, MSL_ALL_READERS, a.atomic && stamp_atomic(prev), w->clock);
      }
      __atomic_exchange_n(rd, next, __ATOMIC_SEQ_CST);
      const ulong s = __atomic_load_n(wr, __ATOMIC_SEQ_CST);
      if (s == 0 || (a.atomic && stamp_atomic(s))) continue;
      if (stamp_group(s) != group || !ordered(a, s)) device_race(a, *r, s, at, size);
    }
  }
}

__attribute__((noinline)) static void check_access(Worker *w, ulong addr, uint size, bool write, bool atomic,
                                                   bool collective, ulong pc, uint line) {
  const Lane *me = w->lane;
  const Simd *s = me->simd;
  const bool local = (addr ^ reinterpret_cast<ulong>(w)) < MSL_REGION;
  Access a;
  a.w = w;
  a.simd = me->tid / MSL_LANES;
  a.agent = collective ? MSL_COLLECTIVE + a.simd : me->tid;
  a.write = write;
  a.atomic = atomic;
  a.pc = pc;
  a.line = line;
  a.last = local ? w->last_clock : w->last_device_clock;
  a.simd_last = local ? s->last_clock : s->last_device_clock;
  if (!local) return check_device(a, addr, size);
  const ulong arena = reinterpret_cast<ulong>(w->arena);
  if (addr >= arena && addr < arena + MSL_ARENA) return check_arena(a, static_cast<uint>(addr - arena), size);
  access_fault(a, FAULT_OTHER_STACK, size);
  leave(w);
}

// The common case, a thread's own stack, ends here.
MSL_FN void on_access(const void *p, uint size, uint align, bool write, void *pc) {
  if (__builtin_expect(!running, 0)) return;
  const ulong addr = reinterpret_cast<ulong>(p);
  Worker *w = worker();
  if (addr - w->lane->stack_lo < MSL_STACK) return;
  if (__builtin_expect((addr & (align - 1u)) != 0, 0)) {
    Fault &f = fault_at(w, FAULT_MISALIGNED, 0);
    f.pc = reinterpret_cast<ulong>(pc);
    f.size = size;
    f.write = write;
    leave(w);
  }
  check_access(w, addr, size, write, false, false, reinterpret_cast<ulong>(pc), 0);
}

static void on_range(const void *p, ulong n, bool write, void *pc) {
  const uchar *b = static_cast<const uchar *>(p);
  for (; n > 0;) {
    const uint k = n > 64 ? 64u : static_cast<uint>(n);
    on_access(b, k, 1, write, pc);
    b += k;
    n -= k;
  }
}

} // namespace msl_rt

#ifdef MSL_CHECKED
#define MSL_HOOK extern "C" __attribute__((noinline, used, visibility("hidden")))
#define MSL_HOOKS(n)                                                                               \
  MSL_HOOK void __tsan_read##n(void *p) {                                                          \
    msl_rt::on_access(p, n, n, false, __builtin_return_address(0));                                \
  }                                                                                                \
  MSL_HOOK void __tsan_write##n(void *p) {                                                         \
    msl_rt::on_access(p, n, n, true, __builtin_return_address(0));                                 \
  }                                                                                                \
  MSL_HOOK void __tsan_unaligned_read##n(void *p) {                                                \
    msl_rt::on_access(p, n, 1, false, __builtin_return_address(0));                                \
  }                                                                                                \
  MSL_HOOK void __tsan_unaligned_write##n(void *p) {                                               \
    msl_rt::on_access(p, n, 1, true, __builtin_return_address(0));                                 \
  }
MSL_HOOKS(1)
MSL_HOOKS(2)
MSL_HOOKS(4)
MSL_HOOKS(8)
MSL_HOOKS(16)
#undef MSL_HOOKS
MSL_HOOK void __tsan_init() {}
MSL_HOOK void *__tsan_memcpy(void *d, const void *s, ulong n) {
  msl_rt::on_range(s, n, false, __builtin_return_address(0));
  msl_rt::on_range(d, n, true, __builtin_return_address(0));
  return __builtin_memmove(d, s, n);
}
MSL_HOOK void *__tsan_memmove(void *d, const void *s, ulong n) {
  msl_rt::on_range(s, n, false, __builtin_return_address(0));
  msl_rt::on_range(d, n, true, __builtin_return_address(0));
  return __builtin_memmove(d, s, n);
}
MSL_HOOK void *__tsan_memset(void *d, int v, ulong n) {
  msl_rt::on_range(d, n, true, __builtin_return_address(0));
  return __builtin_memset(d, v, n);
}
#undef MSL_HOOK
#endif
