// How a kernel is called: its parameters are fetched one by one, converted to their own types.
#pragma once

namespace msl_rt {

template <class T> struct target { typedef T type; static constexpr uint size = 0; };
template <class T> struct target<T &> { typedef T type; static constexpr uint size = sizeof(T); };
template <class T> struct is_ref { static constexpr bool value = false; };
template <class T> struct is_ref<T &> { static constexpr bool value = true; };

template <class P, bool Ref> struct Bind;
// An argument that a function constant leaves out refers to zeros: the optimiser may load through a
// reference before it tests the constant. In checked runs loads stay where they are, and one is a fault.
template <class P> struct Bind<P, true> {
  typedef typename target<P>::type type;
  static P from(void *p) {
    alignas(type) static uchar absent[sizeof(type)];
    return *static_cast<type *>(p || is_checked ? p : absent);
  }
};
template <class P> struct Bind<P, false> {
  static P from(void *p) { return static_cast<P>(p); }
};

// A value of one to three dimensions, as whatever integer or vector the kernel asks for.
struct Triple {
  uint v[3];
};
template <class P> struct FromTriple {
  static P from(Triple t) { return static_cast<P>(t.v[0]); }
};
template <class T> struct FromTriple<metal::vec<T, 2>> {
  static metal::vec<T, 2> from(Triple t) {
    return metal::vec<T, 2>(static_cast<T>(t.v[0]), static_cast<T>(t.v[1]));
  }
};
template <class T> struct FromTriple<metal::vec<T, 3>> {
  static metal::vec<T, 3> from(Triple t) {
    return metal::vec<T, 3>(static_cast<T>(t.v[0]), static_cast<T>(t.v[1]), static_cast<T>(t.v[2]));
  }
};

template <int I> struct ArgBuffer {
  template <class P> static P get(Worker *w) { return Bind<P, is_ref<P>::value>::from(w->launch->buffers[I].ptr); }
};
template <int I> struct ArgArena {
  template <class P> static P get(Worker *w) {
    return Bind<P, is_ref<P>::value>::from(w->arena + w->launch->arena_offset[I]);
  }
};
#define MSL_ARG(name, ...)                                                                         \
  struct name {                                                                                    \
    template <class P> static P get(Worker *w) {                                                   \
      const Launch &l = *w->launch;                                                                \
      const Lane &t = *w->lane;                                                                    \
      const uint *g = w->group, *n = l.threads;                                                    \
      (void)l, (void)t, (void)g, (void)n;                                                          \
      return FromTriple<typename metal::remove_const<P>::type>::from(Triple{{__VA_ARGS__}});       \
    }                                                                                              \
  };
MSL_ARG(ArgThreadInGrid, g[0] * n[0] + t.pos[0], g[1] * n[1] + t.pos[1], g[2] * n[2] + t.pos[2])
MSL_ARG(ArgGroupInGrid, g[0], g[1], g[2])
MSL_ARG(ArgThreadInGroup, t.pos[0], t.pos[1], t.pos[2])
MSL_ARG(ArgIndexInGroup, t.tid, 0, 0)
MSL_ARG(ArgIndexInSimd, t.lane, 0, 0)
MSL_ARG(ArgSimdInGroup, t.tid / MSL_LANES, 0, 0)
MSL_ARG(ArgThreadsPerGroup, n[0], n[1], n[2])
MSL_ARG(ArgGroupsPerGrid, l.groups[0], l.groups[1], l.groups[2])
MSL_ARG(ArgThreadsPerGrid, l.groups[0] * n[0], l.groups[1] * n[1], l.groups[2] * n[2])
MSL_ARG(ArgSimdsPerGroup, w->n_simds, 0, 0)
MSL_ARG(ArgThreadsPerSimd, MSL_LANES, 0, 0)
MSL_ARG(ArgQuadInGroup, t.tid / 4, 0, 0)
MSL_ARG(ArgIndexInQuad, t.lane % 4, 0, 0)
#undef MSL_ARG

template <class... P, class... A> static inline void invoke(void (*fn)(P...), A...) {
  Worker *w = worker();
  fn(A::template get<P>(w)...);
}

template <class F> struct Sizes;
template <class... P> struct Sizes<void (*)(P...)> {
  static constexpr uint value[sizeof...(P) + 1] = {target<P>::size..., 0};
};

// Every threadgroup variable of every kernel instance puts itself on a list when the program is
// loaded; the host reads the sizes and writes the offsets.
static ThreadgroupRecord *threadgroup_records = nullptr;
struct Register {
  ThreadgroupRecord r;
  Register(const void *key, uint site, uint bytes, uint align) : r{key, site, bytes, align, 0, threadgroup_records} {
    threadgroup_records = &r;
  }
};
template <auto F, uint Site, uint Bytes, uint Align> struct ThreadgroupVar { static Register reg; };
template <auto F, uint Site, uint Bytes, uint Align>
Register ThreadgroupVar<F, Site, Bytes, Align>::reg(reinterpret_cast<const void *>(F), Site, Bytes, Align);

template <auto F, uint Site, uint Bytes, uint Align> static inline void *threadgroup_var() {
  return worker()->arena + ThreadgroupVar<F, Site, Bytes, Align>::reg.r.offset;
}

static Fault *fault_of(Worker *w) { return &w->fault; }
static Counts *counts_of(Worker *w) { return &w->counts; }

} // namespace msl_rt
